"""What shows that a tensor has changed while its copy was made, whoever looks first: its owner or who made the copy."""

from __future__ import annotations

import threading

import pytest
import torch

from elastictrain_checkpoint.torch import taking
from elastictrain_checkpoint.torch.taking import Taken, version_of


def watching(*tensors: torch.Tensor) -> Taken:
    return Taken(watched=[(str(i), one, version_of(one), one.data_ptr()) for i, one in enumerate(tensors)])


def test_a_change_that_nobody_announced_is_found_though_the_next_one_is_announced() -> None:
    first, second = torch.zeros(3), torch.zeros(3)
    taken = watching(first, second)
    second.add_(1)
    taken.settle()  # before the next step of an optimizer
    first.add_(1)
    assert taken.settle() == "1"


def test_an_announced_change_amid_the_last_look_is_no_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = [torch.zeros(3), torch.zeros(3)]
    taken = watching(*tensors)

    def step() -> None:
        taken.settle()
        for tensor in tensors:
            tensor.add_(1)

    owner = threading.Thread(target=step)

    def late(tensor: torch.Tensor) -> int:
        if owner.ident is None:
            owner.start()
            owner.join(0.2)  # it waits for this look to end
        return version_of(tensor)

    monkeypatch.setattr(taking, "version_of", late)
    assert taken.settle() == ""
    owner.join(30)
    assert tensors[1][0] == 1
