"""What a save holds on to when its call returns: the tensors as they are now, and what would show that one has changed.

The training waits for this and for nothing else, so it is kept short; views of the memory, pieces and plans are made in
the background.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from fnmatch import translate

import torch
from torch.distributed.tensor import DTensor

from elastictrain_checkpoint.torch.optimizers import memory_of
from elastictrain_checkpoint.torch.tree import Flat, as_buffer

EAGER = ("*running_mean", "*running_var", "*num_batches_tracked", "*n_averaged")
"""What changes between two optimizer steps, and is small: copied at the call. Statistics of torch's normalisation
layers, which change in a forward, and the count of `torch.optim.swa_utils.AveragedModel`.
"""


@dataclass(slots=True)
class Taken:
    """The tensors of one save, as they will be read.

    Attributes:
        hosts: name → contiguous tensor on the host that holds the bytes.
        own: names of those that are the save's own.
        watched: (name, tensor, version, address) of what may not change before it is read.
        staged: whether some came from a device.
        early: what had changed before its owner said that it would (`settle`).

    """

    hosts: dict[str, torch.Tensor] = field(default_factory=dict)
    own: set[str] = field(default_factory=set)
    watched: list[tuple[str, torch.Tensor, int, int]] = field(default_factory=list)
    staged: bool = False
    early: str = ""
    lock: threading.Lock = field(default_factory=threading.Lock)

    def buffers(self) -> dict[str, memoryview]:
        """The bytes of every tensor."""
        return {name: as_buffer(host) for name, host in self.hosts.items()}

    def names_beyond(self, memories: Collection[int]) -> set[str]:
        """Names of what is watched and is no view of these memories (addresses, as of `memory_of`)."""
        return {name for name, tensor, _, _ in self.watched if memory_of(tensor) not in memories}

    def unwatch(self, names: Collection[str]) -> None:
        """These may change from now on."""
        if names:
            self.watched = [one for one in self.watched if one[0] not in names]

    def changed(self) -> str:
        """The first watched tensor that is not as it was. Edits of `.data` cannot be seen."""
        for name, tensor, version, address in self.watched:
            if version_of(tensor) != version or tensor.data_ptr() != address:
                return name
        return ""

    def settle(self) -> str:
        """Nothing is watched from now on: what changes next does so after the copy. Returns the first that had changed
        before, now or at an earlier call. By the owner before every change, and by whoever has the copy, in any order.
        """
        with self.lock:
            self.early = self.early or self.changed()
            self.watched = []
            return self.early


def version_of(tensor: torch.Tensor) -> int:
    """How often a tensor was changed in place; -1 if nobody counts."""
    return -1 if tensor.is_inference() else tensor._version


def take_hosts(flat: Flat) -> tuple[Taken, dict[str, torch.Tensor]]:
    """Take what is on the host, copied only where it does not lie together; the rest, by name, is on devices. The
    tensors of ``flat`` are detached: whoever gives a parameter other memory afterwards does so without them.
    """
    taken = Taken()
    on_device: dict[str, torch.Tensor] = {}
    hosts, watched = taken.hosts, taken.watched
    for name, tensor in flat.tensors.items():
        local = flat.tensors[name] = tensor.detach()
        if flat.spread and isinstance(local, DTensor):
            local = local.to_local()
        if is_staged(local):
            on_device[name] = local
            watched.append((name, local, version_of(local), local.data_ptr()))
            continue
        address = local.data_ptr()
        if local.is_cpu and local.is_contiguous() and not local.is_complex() and not local.is_neg():
            hosts[name] = local
            watched.append((name, local, version_of(local), address))
            continue
        whole = hosts[name] = local.resolve_conj().resolve_neg().to("cpu").contiguous()
        if whole.data_ptr() != address:
            taken.own.add(name)
        else:
            watched.append((name, local, version_of(local), address))
    return taken, on_device


def is_staged(tensor: torch.Tensor) -> bool:
    """Whether it is copied from its device in the background."""
    return tensor.is_cuda


class Changing:
    """The names that fit patterns (as in fnmatch). A state has the same names at every save: they are compared once."""

    def __init__(self, patterns: Sequence[str]) -> None:
        self.patterns = tuple(patterns)
        self._wanted = re.compile("|".join(map(translate, patterns)) or r"(?!)")
        self._known: dict[str, bool] = {}

    def among(self, names: Iterable[str]) -> set[str]:
        """Those of the names that fit."""
        listed, known = list(names), self._known
        try:
            return {name for name in listed if known[name]}
        except KeyError:
            self._known = known = {name: self._wanted.match(name) is not None for name in listed}
            return {name for name, fits in known.items() if fits}
