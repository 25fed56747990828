"""Saving without stall: the state is written while it is used, and copied only where it is about to change.

Between two updates a training state does not change. `LazySaver.save` therefore only remembers where the state lies and
returns; a thread reads live memory and writes it. Just before the next update, `before_mutation` copies what that
thread has not read yet (*copy-on-step*) and lets the update go on. A fast store, or a long step, needs no copy at all.
No more than a fraction of the state is ever copied (`max_copy`): what is beyond that the update waits for, while the
thread goes on writing. So memory is bounded, and the price is time where storage is slow; `max_copy=1` turns it round.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, Literal

import numpy as np

from elastictrain_checkpoint.changes import Changes, plan_changes
from elastictrain_checkpoint.collector import no_collections
from elastictrain_checkpoint.handle import DEADLINE_S, SaveHandle, SaveState
from elastictrain_checkpoint.hashing import block_sum
from elastictrain_checkpoint.incremental import Base, check_base
from elastictrain_checkpoint.pace import Pace
from elastictrain_checkpoint.pack import DEFAULT_PACK_BYTES, Piece, record_of
from elastictrain_checkpoint.part import Part, check_names
from elastictrain_checkpoint.paths import step_folder
from elastictrain_checkpoint.pool import Pool
from elastictrain_checkpoint.rope import Rope, as_rope
from elastictrain_checkpoint.running import MAX_COPY as MAX_COPY
from elastictrain_checkpoint.running import MIN_COPY_BYTES as MIN_COPY_BYTES
from elastictrain_checkpoint.running import Job, Superseded
from elastictrain_checkpoint.running import copy_bytes as copy_bytes
from elastictrain_checkpoint.store import Store
from elastictrain_checkpoint.threads import Standby
from elastictrain_checkpoint.units import Bytes, CellHashes, PlannedPack, make_part, plan_units

YIELD_S, YIELD_PIECE_S = 0.001, 5e-6
"""Planning does not let go of Python's lock: whoever has begun the save goes on first, and gives the device work. For
every piece of the state there is something that it must let go of.
"""
WhenBusy = Literal["wait", "skip", "supersede"]


def _always_intact() -> str:
    return ""


class LazySaver:
    """Writes one writer's share of checkpoints in the background. Its methods belong to the training thread.

    Args:
        store: where.
        pool_bytes: memory for copies that is made at once; more is made when it is needed.
        max_copy: how large a fraction of the state may be copied, from 0 to 1; up to `MIN_COPY_BYTES` always may (but
            not at 0). The less, the longer an update waits that comes while storage has not got the rest yet.
        pack_bytes: as for `PackWriter`.
        deadline_s: no call waits longer.

    Attributes:
        pool: memory for copies; `pool.size_bytes` is what saving has needed beyond the state.

    """

    def __init__(
        self,
        store: Store,
        *,
        pool_bytes: int = 0,
        max_copy: float = MAX_COPY,
        pack_bytes: int = DEFAULT_PACK_BYTES,
        deadline_s: float = DEADLINE_S,
    ) -> None:
        if not 0 <= max_copy <= 1:
            raise ValueError(f"max_copy={max_copy} is not a fraction of the state, from 0 to 1")
        self.pool = Pool(pool_bytes)
        self.max_copy = max_copy
        self._store, self._pack_bytes, self._deadline_s = store, pack_bytes, deadline_s
        self._jobs: list[Job] = []
        self._failed: list[SaveHandle] = []
        self._arena: dict[tuple[str, int], list[Bytes]] = {}
        self._pace = Pace()
        self._thread = Standby("elastictrain-save")

    def save(
        self,
        pieces: Sequence[Piece],
        *,
        step: int,
        attempt: str,
        writer: str,
        finish: Callable[[Part], Any] | None = None,
        intact: Callable[[], str] | None = None,
        eager: Iterable[str] = (),
        stable: Iterable[str] = (),
        ready: Callable[[], None] | None = None,
        dropped: Callable[[BaseException | None], None] | None = None,
        when_busy: WhenBusy = "wait",
        base: Callable[[], Base | None] | None = None,
        later: tuple[int, Callable[[], Sequence[Piece]]] | None = None,
    ) -> SaveHandle:
        """Begin a save; the buffers of the pieces may change only after a call of `before_mutation`.

        Args:
            pieces: as for `PackWriter.write`.
            step: as for `PackWriter`.
            attempt: as for `PackWriter`.
            writer: as for `PackWriter`; a name must not come again in an attempt.
            finish: called with the part when it is durable, in the background, for example to commit; what it gives is
                the result of the save. Without it the part is.
            intact: says what has changed without `before_mutation`, "" if nothing has; then the save fails.
            eager: names of tensors that change in between (running statistics in a forward, say): copied now.
            stable: names of tensors whose buffers are the save's own already, and are never copied.
            ready: waits until the bytes of `stable` buffers are there; called in the background before they are read.
            dropped: called in the background when the save has failed (with the error) or was superseded (None).
            when_busy: while an earlier save runs: wait for it, skip this one, or give the earlier one up (if its commit
                has not begun, when it can be given up no more).
            base: gives an earlier step, so that only what has changed since is written, as for `PackWriter`; called in
                the background. All is written if it gives None, or if the state is about to change before it has
                answered: no change waits for it.
            later: about how many pieces there are, and what gives them all, called in the background: `pieces` need
                then be none but those of `eager`, whose copies take the place of what it gives for them.

        Raises:
            SaveFailed: an earlier save has failed and nobody has asked for its result. This one was not begun.
            SaveTimeout: the earlier save did not end in time.
            InvalidPiece: a name that cannot be a path, or a buffer in `eager` that is none. Others fail the save.

        """
        check_names(attempt=attempt, writer=writer)
        self.check()
        handle = SaveHandle(step, self._store.url)
        running = [job for job in self._jobs if not job.handle.done]
        if running and when_busy == "skip":
            handle._end(SaveState.SKIPPED)
            return handle
        for job in running:
            if when_busy != "supersede" or not job.cancel():
                job.handle._wait(self._deadline_s)
        self.check()
        self._jobs = [job for job in self._jobs if not job.handle.done]
        copied, own = set(eager), set(stable)
        frozen = self._copied(pieces, copied)
        job = Job(handle, self.pool, finish, intact or _always_intact, self._pace.begin(time.perf_counter()))
        self._jobs.append(job)
        names = (step, attempt, writer)
        self._thread.give(partial(self._run, job, frozen, later, copied | own, ready, dropped, base, names))
        return handle

    def move_to(self, store: Store) -> None:
        """Write to another place from now on, with the memory that there is; only while nothing runs."""
        self._store = store

    @property
    def is_busy(self) -> bool:
        """Whether a save runs."""
        return any(not job.handle.done for job in self._jobs)

    def before_mutation(self, *, max_copy: float | None = None) -> None:
        """Call it right before the state changes: copies what the running save has not read yet, up to `max_copy` (this
        saver's if not given), and waits while more than that is left. What has gone wrong with a save, also that it was
        given up because storage took too long, is not raised here, where it would end a step of training, but by the
        next `save`, `wait`, `check` or `close`, and by the handle.
        """
        for job in self._jobs:
            begun = time.perf_counter()
            if not job.seen:
                job.seen = True
                self._pace.windows_s.append(begun - job.course.begun_s)
            if not job.handle.done:
                job.freeze(self._deadline_s, self.max_copy if max_copy is None else max_copy)
                job.handle.stall_s += time.perf_counter() - begun
            self._note(job.handle)

    def check(self) -> None:
        """Raise the failure of a save that nobody has asked for yet.

        Raises:
            SaveFailed: once for each.

        """
        for job in self._jobs:
            self._note(job.handle)
        while self._failed:
            handle = self._failed.pop(0)
            if not handle._seen:
                handle.result(0)

    def wait(self, timeout_s: float | None = None) -> None:
        """Wait until no save runs.

        Raises:
            SaveTimeout: one takes longer.
            SaveFailed: as from `check`.

        """
        for job in self._jobs:
            if not job.handle.done:
                job.handle._wait(self._deadline_s if timeout_s is None else timeout_s)
        self.check()

    def give_up(self) -> list[SaveHandle]:
        """Supersede every save that runs and whose commit has not begun; at once, without waiting for the storage. The
        state may change afterwards. Failures so far are left to their handles. Gives what was given up.
        """
        for job in self._jobs:
            job.handle._seen = True
        return [job.handle for job in self._jobs if not job.handle.done and job.cancel()]

    def close(self, timeout_s: float | None = None) -> None:
        """`wait`, and let go of the memory."""
        try:
            self.wait(timeout_s)
        finally:
            self.pool, self._arena = Pool(), {}
            self._thread.close()

    def _note(self, handle: SaveHandle) -> None:
        if handle.done and handle.state is SaveState.FAILED and not handle._seen and handle not in self._failed:
            self._failed.append(handle)

    def _copied(self, pieces: Sequence[Piece], eager: set[str]) -> list[Piece]:
        """The pieces, those of the names in `eager` with data of their own, in memory that is used again."""
        unknown = eager - {piece.name for piece in pieces}
        if unknown:
            raise ValueError(f"eager names {sorted(unknown)[:5]}, which are not among the pieces")
        out = []
        for piece in pieces:
            if piece.name not in eager:
                out.append(piece)
                continue
            rope = as_rope(piece.data, piece.name, 1)
            kept = self._memory((piece.name, piece.start), rope)
            for buffer, view in zip(kept, rope, strict=True):
                buffer[:] = np.frombuffer(view, dtype=np.uint8)
            out.append(Piece(piece.name, piece.dtype, piece.shape, piece.start, [buffer.data for buffer in kept]))
        return out

    def _memory(self, key: tuple[str, int], rope: Rope) -> list[Bytes]:
        """The arena's buffers for one piece. No save that could still be committed reads the old ones."""
        kept = self._arena.get(key)
        if kept is None or [len(buffer) for buffer in kept] != [len(view) for view in rope]:
            kept = [np.empty(len(view), dtype=np.uint8) for view in rope]
            self._arena[key] = kept
        return kept

    # --- the writer's thread ---

    def _run(
        self,
        job: Job,
        frozen: list[Piece],
        later: tuple[int, Callable[[], Sequence[Piece]]] | None,
        stable: set[str],
        ready: Callable[[], None] | None,
        dropped: Callable[[BaseException | None], None] | None,
        base: Callable[[], Base | None] | None,
        names: tuple[int, str, str],
    ) -> None:
        try:
            time.sleep(YIELD_S + YIELD_PIECE_S * (later[0] if later else len(frozen)))
            with no_collections():
                pieces = frozen if later is None else _in_place(later[1](), frozen)
                own = {number for number, piece in enumerate(pieces) if piece.name in stable}
                job.start(plan_units(pieces, self._pack_bytes, own))
            if ready is not None:
                ready()
            earlier, changes = None if base is None else base(), None
            if earlier is not None and job.plan_anew():
                check_base(earlier, names[0])
                changes = plan_changes(pieces, earlier, self._pack_bytes, own)
                if len(own) < len(pieces):
                    job.check()  # whoever announces a change waits until all is planned: there may have been none
                job.start(changes.plan)
            part = self._write(job, *names, changes)
            with job.lock:
                if job.cancelled:
                    raise Superseded
                job.finishing = True
            if job.finish is None:
                job.handle._end(SaveState.WRITTEN, part)
            else:
                job.handle._end(SaveState.COMMITTED, job.finish(part))
        except Superseded:
            _tell(dropped, None)
            job.handle._end(SaveState.SUPERSEDED)
        except BaseException as error:  # whatever it is, it must reach the thread that trains
            _tell(dropped, error)
            job.handle._end(SaveState.FAILED, error=error)
        finally:
            job.close()

    def _write(self, job: Job, step: int, attempt: str, writer: str, changes: Changes | None = None) -> Part:
        assert job.plan is not None
        plan = job.plan
        hashes = CellHashes(plan.pieces) if changes is None else None
        folder = f"{step_folder(step)}/{attempt}"
        files = []
        for number, pack in enumerate(plan.packs):
            path = f"{folder}/{writer}-{number:02d}.safetensors"
            sums: list[int] = []
            size = self._store.create(path, _Stream(job, pack, hashes, sums))
            files.append(record_of(path, size, pack.data_start, sums))
        if changes is not None:
            return changes.part(files, step=step, attempt=attempt, writer=writer)
        assert hashes is not None
        with no_collections():
            return make_part(plan, files, hashes, step=step, attempt=attempt, writer=writer)


def _tell(dropped: Callable[[BaseException | None], None] | None, error: BaseException | None) -> None:
    """Those who depend on a save that has failed. A storage that has failed fails here once more."""
    try:
        if dropped is not None:
            dropped(error)
    except Exception:  # the outcome must be known all the same
        logging.getLogger(__name__).exception("nobody could be told that a save was dropped")


def _in_place(pieces: Sequence[Piece], frozen: Sequence[Piece]) -> Sequence[Piece]:
    """The pieces, copies in the place of what they are copies of."""
    if not frozen:
        return pieces
    copies = {(piece.name, piece.start): piece for piece in frozen}
    return [copies.get((piece.name, piece.start), piece) for piece in pieces]


class _Stream:
    """The bytes of a pack, each unit summed, and hashed unless it was before, from the bytes that are written; with
    what `Store.create` may ask about them.
    """

    def __init__(self, job: Job, pack: PlannedPack, hashes: CellHashes | None, sums: list[int]) -> None:
        self._job, self._pack, self._hashes, self._sums = job, pack, hashes, sums
        self.size_bytes = pack.size_bytes
        self._lent: memoryview | None = None

    def lend(self, memory: memoryview) -> None:
        self._lent = memory

    def __iter__(self) -> Iterator[memoryview]:
        for unit in self._pack.units:
            number, data = self._job.take(self._lent)
            self._sums.append(block_sum(data))
            if self._hashes is not None:
                self._hashes.add(unit, data)
            yield data
            self._job.wrote(number)

    def past_cache(self) -> bool:
        return self._job.past_cache()
