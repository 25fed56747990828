"""`save` and `async_save`: one call for those who own no saver, with the keywords of `torch.distributed.checkpoint`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist

from elastictrain_checkpoint.lazy import WhenBusy
from elastictrain_checkpoint.manifest import Manifest
from elastictrain_checkpoint.store import Store
from elastictrain_checkpoint.torch.outcome import TorchHandle
from elastictrain_checkpoint.torch.places import place_of
from elastictrain_checkpoint.torch.ranks import Group, group_of
from elastictrain_checkpoint.torch.saving import AsyncSaver, _savers
from elastictrain_checkpoint.torch.taking import EAGER

_INSTEAD = {
    "storage_writer": "it would write a format of its own. Pass its path as checkpoint_id, or a Store",
    "storage_reader": "it reads a format of its own. Pass its path as checkpoint_id, or a Store; what others have "
    "written comes in by `elastictrain ckpt import`",
    "planner": "what a planner decides is said by arguments: strict=False loads what fits, only=[…] a part, "
    "renamed={…} other names; who writes what is decided here",
    "async_stager": "nothing is staged: state is read while it stays as it is. Leave it out; done() and result() are "
    "of the checkpoint itself",
}
_WITHOUT_MEANING = {"use_collectives", "async_checkpointer_type"}
"""How DCP goes about it; here there is one way, which needs neither a process nor a plan of its own."""


def group_meant(call: str, group: Group, process_group: dist.ProcessGroup | None, no_dist: bool, more: Any) -> Group:
    """The group of a call with DCP's keywords.

    Args:
        call: of what function, for the errors.
        group: this library's own way to say it.
        process_group: DCP's: None is the default group.
        no_dist: DCP's: this process by itself.
        more: further keywords.

    Raises:
        TypeError: the group is said twice; a keyword of DCP's that has no meaning here, with what to use; or one that
            nobody knows.

    """
    for name, value in more.items():
        if name in _WITHOUT_MEANING or (name in _INSTEAD and value is None):
            continue
        if name not in _INSTEAD:
            raise TypeError(f"{call}() got an unexpected keyword argument {name!r}")
        path = getattr(value, "path", None)
        its = f" of {os.fspath(path)!r}" if isinstance(path, str | os.PathLike) else ""
        raise TypeError(f"{call}({name}=): a {type(value).__name__}{its} has no use here: {_INSTEAD[name]}")
    said = [name for name, given in (("process_group", process_group is not None), ("no_dist", no_dist)) if given]
    if said and group != "world":
        raise TypeError(f"{call}(group=, {said[0]}=): give one of the two")
    if no_dist:
        return None
    return process_group if process_group is not None else group


_Key = tuple[str | Store, int | None, int | None]
"""Place, group and `bounce_bytes`."""
_by_place: dict[_Key, AsyncSaver] = {}


def async_save(
    state_dict: Any,
    path: str | Path | Store | None = None,
    *,
    checkpoint_id: str | Path | Store | None = None,
    group: Group = "world",
    process_group: dist.ProcessGroup | None = None,
    no_dist: bool = False,
    step: int | None = None,
    lazy: bool | None = None,
    eager: Sequence[str] = EAGER,
    when_busy: WhenBusy = "wait",
    bounce_bytes: int | None = None,
    **more: Any,
) -> TorchHandle:
    """Save in the background; the state may change as soon as this returns, as with DCP's.

    Steps of optimizers are heard of: what is not written by then is copied first. What no known optimizer changes in
    its steps (none has stepped so far, and none stands in the state dict; averages, frozen weights) is copied at the
    call. Otherwise as `AsyncSaver.save`, by one saver for every path (or ``checkpoint_id``) and group; a new path takes
    over the memory of one that is done.

    Args:
        state_dict: as for `AsyncSaver.save`.
        path: a folder, an fsspec URL, or a store. It holds many steps.
        checkpoint_id: the same, as `torch.distributed.checkpoint` calls it.
        group: as for `AsyncSaver`.
        process_group: the same, as DCP calls it; None is the default group.
        no_dist: as DCP has it: this process saves by itself, as with ``group=None``.
        step: as for `AsyncSaver.save`.
        lazy: True copies nothing at the call but ``eager``, also where nobody is known to announce its changes; then
            call `before_mutation`. False copies everything now.
        eager: as for `AsyncSaver.save`.
        when_busy: as for `AsyncSaver.save`.
        bounce_bytes: as for `AsyncSaver`.
        more: DCP's ``use_collectives`` and ``async_checkpointer_type``, which mean nothing here.

    At the end of the process what still runs is waited for, and what has failed is warned of.

    Raises:
        TypeError: a keyword that DCP knows and that has no meaning here; the message says what to use.
        CheckpointError: as `AsyncSaver.save`.

    """
    place = place_of(path, checkpoint_id)
    meant = group_of(group_meant("async_save", group, process_group, no_dist, more))
    saver = _saver_of(place, meant, bounce_bytes)
    return saver.save(state_dict, step=step, lazy=lazy, eager=eager, when_busy=when_busy)


def _saver_of(place: str | Path | Store, group: dist.ProcessGroup | None, bounce_bytes: int | None) -> AsyncSaver:
    where = place if isinstance(place, Store) else str(place)
    key: _Key = (where, None if group is None else id(group), bounce_bytes)
    saver = _by_place.get(key)
    if saver is not None and saver in _savers:
        return saver
    # Scripts for DCP have a folder for every checkpoint: a saver for each would keep memory for each.
    for other, idle in list(_by_place.items()):
        if idle not in _savers:
            del _by_place[other]
        elif other[1:] == key[1:] and not idle.is_busy:
            idle.move_to(place if isinstance(place, Store) else Store(place))
            _by_place[key] = _by_place.pop(other)
            return idle
    _by_place[key] = AsyncSaver(place, group=group, bounce_bytes=bounce_bytes)
    return _by_place[key]


def save(
    state_dict: Any,
    path: str | Path | Store | None = None,
    *,
    checkpoint_id: str | Path | Store | None = None,
    group: Group = "world",
    process_group: dist.ProcessGroup | None = None,
    no_dist: bool = False,
    step: int | None = None,
    **more: Any,
) -> Manifest:
    """Save, and return when the checkpoint exists; arguments as for `async_save`.

    Raises:
        TypeError: as `async_save`.
        CheckpointError: as `AsyncSaver.save` and `TorchHandle.result`.

    """
    meant = group_meant("save", group, process_group, no_dist, more)
    saver = AsyncSaver(place_of(path, checkpoint_id), group=meant)
    try:
        return saver.save(state_dict, step=step).result()
    finally:
        saver.close()
