"""Saving state dicts, with or without stall, in one process or in many."""

from __future__ import annotations

import atexit
import os
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.hooks import RemovableHandle

from elastictrain_checkpoint.collector import no_collections
from elastictrain_checkpoint.commit import commit, list_steps
from elastictrain_checkpoint.dtypes import num_elements
from elastictrain_checkpoint.errors import CheckpointError, InvalidPiece, SaveFailed, StateChanged
from elastictrain_checkpoint.handle import DEADLINE_S, SaveHandle, SaveState
from elastictrain_checkpoint.lazy import MAX_COPY, LazySaver, WhenBusy
from elastictrain_checkpoint.manifest import Manifest
from elastictrain_checkpoint.pack import Piece
from elastictrain_checkpoint.part import Part
from elastictrain_checkpoint.shares import Spread, plan_shares
from elastictrain_checkpoint.store import Store
from elastictrain_checkpoint.torch import meeting
from elastictrain_checkpoint.torch.device import Bounced, CudaEngine, Staging
from elastictrain_checkpoint.torch.optimizers import changed_by_steps, listen, unlisten
from elastictrain_checkpoint.torch.outcome import TorchHandle
from elastictrain_checkpoint.torch.ranks import Group, group_of
from elastictrain_checkpoint.torch.sharded import Agreed, Facts, agree, exchange, facts_of, spreads_of
from elastictrain_checkpoint.torch.taking import EAGER, Changing, Taken, take_hosts
from elastictrain_checkpoint.torch.tree import Flat, as_buffer, describe, flatten, stored_facts


class AsyncSaver:
    """Saves state dicts to one place in the background. Its methods belong to the training thread.

    Args:
        path: a folder, an fsspec URL, or a store.
        group: every rank of it saves its share, and rank 0 commits. "world": the default group, if there is one. None:
            this process saves by itself.
        pool_bytes: memory for copies that is made at once; more is made when it is needed.
        max_copy: how large a fraction of the state a save may copy when a change comes before all is written; beyond it
            the change waits (see `LazySaver`). 1: never wait, and have memory for a second state.
        bounce_bytes: pinned memory for state on devices, as `Bounced` has it: changes wait until all is on the host. If
            not given, as much is pinned as the state has, and changes wait on the device only.
        deadline_s: no call waits longer, nor does rank 0 for the shares of others.

    """

    def __init__(
        self,
        path: str | Path | Store,
        *,
        group: Group = "world",
        pool_bytes: int = 0,
        max_copy: float = MAX_COPY,
        bounce_bytes: int | None = None,
        deadline_s: float = DEADLINE_S,
    ) -> None:
        self.store = path if isinstance(path, Store) else Store(path)
        self._group = group_of(group)
        self._lazy = LazySaver(self.store, pool_bytes=pool_bytes, max_copy=max_copy, deadline_s=deadline_s)
        self._deadline_s = deadline_s
        self._last_step = -1
        self._staging: Staging | Bounced | None = None
        self._bounce_bytes = bounce_bytes
        self._staged: Taken | None = None
        self._changing = Changing(EAGER)
        self._hooks: weakref.WeakKeyDictionary[torch.optim.Optimizer, RemovableHandle] = weakref.WeakKeyDictionary()
        _savers.add(self)

    @property
    def extra_bytes(self) -> int:
        """Host memory that saving has needed so far, beyond the state: the pool, and what is pinned for devices."""
        return self._lazy.pool.size_bytes + (self._staging.size_bytes if self._staging else 0)

    def save(
        self,
        state_dict: Mapping[str, Any],
        *,
        step: int | None = None,
        lazy: bool | None = True,
        eager: Sequence[str] = EAGER,
        when_busy: WhenBusy = "wait",
    ) -> TorchHandle:
        """Begin to save a state dict. Until its outcome is known, call `before_mutation` before every change, or
        `attach` the optimizer; or let `lazy=None` see to it.

        Args:
            state_dict: nested mappings, lists and tuples of tensors, numbers, strings, bytes and None. Modules,
                optimizers and whatever else keeps a state dict (DCP's `Stateful`) are asked for it.
            step: of the checkpoint; one after the newest if not given. A step that is there is not overwritten.
            lazy: False copies everything now, for code that cannot announce its changes. None announces the steps of
                every optimizer, and copies now what none of those in the state dict, or that have stepped before,
                changes in its steps.
            eager: patterns (as in fnmatch) of the names of tensors that change in between: copied now.
            when_busy: while an earlier save runs: wait for it, skip this one, or give the earlier one up.

        In several processes this is a collective, and the only one: all ranks call it with the same keys and shapes.

        Raises:
            InvalidPiece: something in the state dict cannot be stored, or ranks disagree; with its place.
            SaveFailed: an earlier save has failed and nobody has asked for its result. This one was not begun.
            SaveTimeout: an earlier save did not end in time.

        """
        problem: CheckpointError | None = None
        try:
            if when_busy == "wait":
                self._lazy.wait()
            self._lazy.check()
        except CheckpointError as error:
            problem = error
        if lazy is None:
            listen(self)
        handle = self._begin(state_dict, step, lazy, eager, when_busy, problem)
        if lazy is False and handle.state is not SaveState.SKIPPED:  # another save that runs is none of its business
            self._lazy.before_mutation(max_copy=1.0)
        return TorchHandle(handle, self)

    def _begin(
        self,
        state_dict: Mapping[str, Any],
        step: int | None,
        lazy: bool | None,
        eager: Sequence[str],
        when_busy: WhenBusy,
        problem: CheckpointError | None,
    ) -> SaveHandle:
        flat, facts = Flat(), Facts([], [], {}, frozenset())
        try:
            if problem is None:
                with no_collections():  # several small objects for every tensor
                    flat = flatten(state_dict)
                    if self._group is not None or flat.spread:
                        facts = facts_of(flat)
                    else:
                        facts = Facts([], [], flat.aliases, frozenset())
        except CheckpointError as error:
            problem = error
        except Exception as error:  # whatever a mapping of the caller's raises: the other ranks must not wait
            problem = InvalidPiece(f"the state dict cannot be taken apart: {type(error).__name__}: {error}")
            problem.__cause__ = error
        agreed = self._agree(facts, step, problem)
        for name in agreed.aliases:  # also those that this rank cannot see, because it holds nothing of them
            flat.tensors.pop(name, None)
        flat.aliases = agreed.aliases
        spreads = spreads_of(facts, flat.aliases, agreed.coordinates)
        step, attempt = self._choose(step)
        self._last_step = max(self._last_step, step)
        if agreed.busy and when_busy == "skip":
            handle = SaveHandle(step, self.store.url)
            handle._end(SaveState.SKIPPED)
            return handle
        with no_collections():
            taken, copied = self._take(flat, lazy, eager, fresh=self._lazy.is_busy)
        later: tuple[int, Callable[[], list[Piece]]] | None = None
        own = taken.own
        if self._group is None:
            later = len(taken.hosts), partial(_all_pieces, flat, taken)
            pieces = [
                Piece(name, *stored_facts(flat.tensors[name]), 0, as_buffer(taken.hosts[name])) for name in copied
            ]
        else:
            pieces, own = self._shares(flat, spreads, taken)
            names = {piece.name for piece in pieces}
            copied, own = (copied - own) & names, own & names
        return self._lazy.save(
            pieces,
            step=step,
            attempt=attempt,
            writer=self._writer,
            finish=self._finish(step, attempt, flat),
            intact=taken.changed,
            eager=copied,
            stable=own,
            ready=self._ready(taken, step),
            dropped=partial(meeting.say_dropped, self.store, step, attempt, self._writer) if self._group else None,
            when_busy=when_busy,
            later=later,
        )

    def before_mutation(self) -> None:
        """Call it right before the state changes; see `LazySaver.before_mutation`."""
        if self._staging is not None and self._staged is not None:
            self._staging.order()
            self._staged.settle()
        self._lazy.before_mutation()

    def attach(self, optimizer: torch.optim.Optimizer) -> RemovableHandle:
        """Call `before_mutation` before every step of the optimizer; a second call changes nothing."""
        if optimizer not in self._hooks:
            me = weakref.ref(self)

            def announce(*_: Any) -> None:
                saver = me()
                if saver is not None:
                    saver.before_mutation()

            self._hooks[optimizer] = optimizer.register_step_pre_hook(announce)
        return self._hooks[optimizer]

    def close(self, timeout_s: float | None = None) -> None:
        """Wait for what runs, and let go of the memory and of the optimizers; raises as `LazySaver.close`."""
        try:
            self._lazy.close(timeout_s)
        finally:
            for hook in self._hooks.values():
                hook.remove()
            self._hooks.clear()
            unlisten(self)
            self._staging = self._staged = None
            _savers.discard(self)

    @property
    def is_busy(self) -> bool:
        """Whether a save runs."""
        return self._lazy.is_busy

    def move_to(self, store: Store) -> None:
        """Save to another place from now on, with the memory that there is; only while nothing runs."""
        assert not self.is_busy, "a save that runs belongs to its place"
        self.store = store
        self._lazy.move_to(store)
        self._last_step = -1

    @property
    def _writer(self) -> str:
        return meeting.writer_name(dist.get_rank(self._group) if self._group else 0)

    def _agree(self, facts: Facts, step: int | None, problem: Exception | None) -> Agreed:
        """What all ranks say; raises the problem of any of them."""
        if self._group is not None:
            return agree(facts, ("step", step), self._lazy.is_busy, problem, self._group)
        if problem is not None:
            raise problem
        return Agreed(self._lazy.is_busy, facts.aliases, [facts.coordinates])

    def _choose(self, step: int | None) -> tuple[int, str]:
        """Step and attempt, the same on every rank."""
        chosen: list[Any] = [None, None, ""]
        failed: Exception | None = None
        if self._group is None or dist.get_rank(self._group) == 0:
            try:
                if step is None:
                    step = max([*list_steps(self.store), self._last_step]) + 1
                chosen = [step, os.urandom(6).hex(), ""]
            except Exception as error:  # the other ranks must not wait for what does not come
                failed, chosen[2] = error, f"{type(error).__name__}: {error}"
        if self._group is not None:
            dist.broadcast_object_list(chosen, group=self._group, group_src=0)
        if failed is not None:
            raise failed
        if chosen[2]:
            raise SaveFailed(f"rank 0 could not begin to save: {chosen[2]}")
        return chosen[0], chosen[1]

    def _take(self, flat: Flat, lazy: bool | None, eager: Sequence[str], *, fresh: bool) -> tuple[Taken, set[str]]:
        """What is saved: live, or in a copy where it does not lie together; and the names of what lies on the host and
        is to be copied at the call. These may change after it, and so may what the device copies at the call.
        """
        taken, on_device = take_hosts(flat)
        if self._changing.patterns != tuple(eager):
            self._changing = Changing(eager)
        copied = self._changing.among([*taken.hosts, *on_device])
        if lazy is None:
            copied |= taken.names_beyond(changed_by_steps(flat.optimizers))
        if on_device:
            at_once = set(on_device) if lazy is False else copied & on_device.keys()
            self._staging = self._staging or self._new_staging(next(iter(on_device.values())).device)
            staged = self._staging.begin(on_device, fresh=fresh, at_once=at_once)
            copied = taken.hosts.keys() - taken.own  # the little that is on the host
            taken.unwatch(at_once)
            taken.hosts |= staged
            taken.own |= set(on_device)
            taken.staged, self._staged = True, taken
        copied -= taken.own
        taken.unwatch(copied)
        return taken, copied

    def _new_staging(self, device: torch.device) -> Staging | Bounced:
        if self._bounce_bytes is None:
            return Staging(CudaEngine(device))
        return Bounced(CudaEngine(device), self._bounce_bytes, deadline_s=self._deadline_s)

    def _ready(self, taken: Taken, step: int) -> Callable[[], None] | None:
        if not taken.staged or self._staging is None:
            return None
        copied = self._staging.copied()

        def wait() -> None:
            copied.synchronize()
            changed = taken.settle()
            if changed:
                raise StateChanged(
                    f"step {step} was not saved: {changed} has changed while it was copied from its device. Call "
                    "before_mutation (or attach the optimizer) before every change"
                )

        return wait

    def _shares(self, flat: Flat, spreads: Sequence[Spread], taken: Taken) -> tuple[list[Piece], set[str]]:
        """What this process stores of what all have, and the names of what lies in memory of the save's own."""
        assert self._group is not None
        facts = {name: stored_facts(tensor) for name, tensor in flat.tensors.items()}
        if taken.staged:
            self._staging.copied().synchronize()  # type: ignore[union-attr]  # neighbours are sent what is copied
        rank, world = dist.get_rank(self._group), dist.get_world_size(self._group)
        found = exchange(spreads, taken.buffers(), plan_shares(spreads, world), self._group)
        pieces, own = [], set(taken.own)
        for spread in spreads:
            share, (dtype, shape) = found[spread.name], facts[spread.name]
            if not share.live and not share.own and (num_elements(shape) or rank):
                continue  # an empty tensor is stored too, by rank 0
            if not share.live:
                own.add(spread.name)
            pieces.append(Piece(spread.name, dtype, shape, share.start, [share.live, share.own]))
        return pieces, own

    def _finish(self, step: int, attempt: str, flat: Flat) -> Callable[[Part], Manifest]:
        world = dist.get_world_size(self._group) if self._group else 1
        info = {"world": world, "torch": str(torch.__version__)}

        def commit_all(parts: Sequence[Part]) -> Manifest:
            return commit(
                self.store,
                step=step,
                attempt=attempt,
                generation=1,
                parts=parts,
                tree=describe(flat),
                aliases=flat.aliases,
                info=info,
            )

        if self._group is None:
            return lambda part: commit_all([part])
        rank = dist.get_rank(self._group)
        return lambda part: meeting.meet(self.store, part, rank, world, commit_all, self._deadline_s)


def _all_pieces(flat: Flat, taken: Taken) -> list[Piece]:
    """What a process stores that saves by itself."""
    return [Piece(name, *stored_facts(flat.tensors[name]), 0, data) for name, data in taken.buffers().items()]


_savers: set[AsyncSaver] = set()


def before_mutation() -> None:
    """Tell every saver of this process that state is about to change; costs nothing when nothing is saved."""
    for saver in list(_savers):
        saver.before_mutation()


@atexit.register
def _wait_for_all() -> None:
    for saver in list(_savers):
        try:
            saver.close()
        except CheckpointError as error:
            warnings.warn(f"a checkpoint was lost as the process ended: {error}", RuntimeWarning, stacklevel=1)
