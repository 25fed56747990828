"""Copies through pages, with an engine on the host that works as late as it may."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

from elastictrain_checkpoint.errors import SaveTimeout
from elastictrain_checkpoint.torch import device
from elastictrain_checkpoint.torch.device import Bounced, Staging
from tests.support.late_engine import LateEngine


def state() -> dict[str, Any]:
    torch.manual_seed(0)
    return {
        "rows": torch.randn(50, 7),
        "turned": torch.randn(6, 9).t(),
        "half": torch.randn(100).bfloat16(),
        "flag": torch.tensor(True),
        "empty": torch.zeros(0, 3),
        "conjugate": torch.randn(5, dtype=torch.complex64).conj(),
    }


@pytest.mark.parametrize("bounce_bytes", [2, 64, 1000, 1 << 20])
def test_every_tensor_comes_through_whole(bounce_bytes: int) -> None:
    engine = LateEngine()
    bounced = Bounced(engine, bounce_bytes, deadline_s=30)
    memory: dict[str, int] = {}
    for turn in range(3):
        tensors = {name: value + turn if value.is_floating_point() else value for name, value in state().items()}
        found = bounced.begin(tensors, fresh=False)
        bounced.copied().synchronize()
        for name, value in tensors.items():
            assert found[name].dtype == value.dtype
            assert torch.equal(found[name], value), name
        places = {name: value.data_ptr() for name, value in found.items()}
        assert places == (memory or places), "the memory is used again"
        memory = places
    assert engine.follows == 3
    assert engine.pages >= 2
    held = sum(value.nbytes for value in state().values())
    assert held < bounced.size_bytes <= held + bounce_bytes


def test_pages_are_of_a_fixed_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "PAGE_BYTES", 100)
    engine = LateEngine()
    assert Bounced(engine, 1050, deadline_s=30).size_bytes == 1000
    assert engine.pages == 10
    with pytest.raises(ValueError, match=r"^bounce_bytes=1: two pages are needed at least"):
        Bounced(engine, 1, deadline_s=30)


def test_a_change_waits_until_all_is_through() -> None:
    engine = LateEngine()
    bounced = Bounced(engine, 64, deadline_s=30)
    engine.gate.clear()
    tensors = state()
    expected = tensors["rows"].clone()
    found = bounced.begin(tensors, fresh=False)
    opened = threading.Timer(0.05, engine.gate.set)
    opened.start()
    bounced.order()
    assert engine.gate.is_set()
    tensors["rows"].zero_()
    bounced.copied().synchronize()
    assert torch.equal(found["rows"], expected)
    opened.join()


def test_pages_that_are_in_use_are_waited_for() -> None:
    engine = LateEngine()
    bounced = Bounced(engine, 64, deadline_s=30)
    engine.gate.clear()
    first = bounced.begin(state(), fresh=False)
    opened = threading.Timer(0.05, engine.gate.set)
    opened.start()
    bounced.begin({name: value.clone() for name, value in state().items()}, fresh=True)
    assert engine.gate.is_set()
    assert torch.equal(first["rows"], state()["rows"])
    bounced.copied().synchronize()
    opened.join()


def test_memory_that_is_still_read_is_not_used_again() -> None:
    bounced = Bounced(LateEngine(), 64, deadline_s=30)
    first = bounced.begin(state(), fresh=False)
    second = bounced.begin({name: value.clone().zero_() for name, value in state().items()}, fresh=True)
    bounced.copied().synchronize()
    assert torch.equal(first["rows"], state()["rows"])
    assert not second["rows"].any()


def test_an_error_is_raised_by_who_waits_for_the_copies() -> None:
    engine = LateEngine()
    bounced = Bounced(engine, 64, deadline_s=30)
    engine.fails = 5
    bounced.begin(state(), fresh=False)
    bounced.order()
    with pytest.raises(RuntimeError, match=r"^the device is gone$"):
        bounced.copied().synchronize()
    found = bounced.begin(state(), fresh=False)
    bounced.copied().synchronize()
    assert torch.equal(found["rows"], state()["rows"]), "the pages can be used again"


def test_a_change_does_not_wait_for_ever() -> None:
    engine = LateEngine()
    bounced = Bounced(engine, 64, deadline_s=0.01)
    engine.gate.clear()
    bounced.begin(state(), fresh=False)
    with pytest.raises(SaveTimeout, match=r"^the state has not come from its device after 0\.01 s$"):
        bounced.order()
    engine.gate.set()
    bounced.copied().synchronize()


# --- all of it at once, in memory that is pinned ---


def test_staged_tensors_come_whole_into_memory_that_is_used_again() -> None:
    engine = LateEngine()
    staging = Staging(engine)
    memory: dict[str, int] = {}
    for turn in range(3):
        tensors = {name: value + turn if value.is_floating_point() else value for name, value in state().items()}
        expected = {name: value.clone() for name, value in tensors.items()}
        found = staging.begin(tensors, fresh=False, at_once={"half"})
        tensors["half"].zero_()
        assert engine.begun, "the host has waited for nothing"
        if turn:
            staging.order()
            tensors["rows"].zero_()
        staging.copied().synchronize()
        for name, value in expected.items():
            assert (found[name].dtype, found[name].shape) == (value.dtype, value.shape)
            assert torch.equal(found[name], value), name
        places = {name: value.data_ptr() for name, value in found.items()}
        assert places == (memory or places)
        memory = places
    assert (engine.follows, engine.pages) == (3, 1), "one piece of memory for all that is small"


def test_staged_memory_that_is_still_read_or_does_not_fit_is_not_used_again() -> None:
    staging = Staging(LateEngine())
    first = staging.begin(state(), fresh=False)
    staging.copied().synchronize()
    size = staging.size_bytes
    staging.begin({name: value.clone().zero_() for name, value in state().items()}, fresh=True)
    staging.copied().synchronize()
    assert torch.equal(first["rows"], state()["rows"])
    assert staging.size_bytes == size
    for other in ({"rows": torch.ones(50, 8)}, {"others": torch.ones(3)}):
        found = staging.begin(other, fresh=False)
        staging.copied().synchronize()
        assert found.keys() == other.keys()
        assert all(torch.equal(found[name], value) for name, value in other.items())
        assert staging.size_bytes == sum(value.nbytes for value in other.values()), "the rest is let go"


def test_staged_tensors_larger_than_a_slab_have_one_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "SLAB_BYTES", 256)
    staging = Staging(LateEngine())
    tensors = {str(number): torch.randn(size) for number, size in enumerate([3, 100, 50, 1, 20, 64])}
    found = staging.begin(tensors, fresh=False)
    staging.copied().synchronize()
    assert all(torch.equal(found[name], value) for name, value in tensors.items())
    assert [slab.nbytes for slab in staging._slabs] == [12, 400, 200, 144, 256]


def test_what_may_change_at_once_is_waited_for_and_nothing_else() -> None:
    class Counted(LateEngine):
        waits = 0

        def wait(self, token: Any) -> None:
            super().wait(token)
            self.waits += 1
            if self.waits == 3:  # all that is urgent: the rest waits until the test has looked
                self.gate.clear()

    engine = Counted()
    bounced = Bounced(engine, 200, deadline_s=30)
    tensors = {"later": torch.ones(100), "now": torch.arange(60.0)}
    found = bounced.begin(tensors, fresh=False, at_once={"now"})
    tensors["now"].zero_()
    assert torch.equal(found["now"], torch.arange(60.0))
    engine.gate.set()
    bounced.copied().synchronize()
    assert torch.equal(found["later"], torch.ones(100))
