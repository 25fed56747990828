"""Which samples a run used, computed again from its order and compared with what its workers recorded.

Workers record with every step a hash of the ids of the samples that they were really given: the ids travel with the
rows, through every cut and permutation of the reader. The audit computes the same ids from the order alone. It reads no
data but, for the words of a place, a row group.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from elastictrain.data.holes import samples_of_run
from elastictrain.data.ids import SampleIds, lane_hash, running_hash, show_hash, step_hash
from elastictrain.data.live_order import EraOrder
from elastictrain.data.stages import stage_of
from elastictrain.protocol import Stage

if TYPE_CHECKING:
    from elastictrain.data.locate import SampleLocation
    from elastictrain.data.order import Int64Array, Window
    from elastictrain.data.sources import AnySource

_LANES_APART = 8
"""In samples of a source: a lane is within four of its share (`data.mixture`)."""


@dataclass(frozen=True, slots=True)
class AuditedStep:
    """`recorded`: by the workers, None where the run wrote none; `computed`: from the order, both in hexadecimal.
    `epoch`: of its first sample. `repeated`: samples of the step that the same epoch of their source had used before,
    more than `data.ragged: repeat` fills it up with. `dropped`: its lanes that did not count (`redundancy`); their
    samples are not among `samples`, and were not used.
    """

    step: int
    stage: int
    epoch: int
    samples: int
    recorded: str | None
    computed: str
    repeated: int
    dropped: tuple[int, ...] = ()

    @property
    def agrees(self) -> bool:
        """False when workers used other samples than the order says, or some a second time."""
        return self.recorded in (None, self.computed) and not self.repeated


@dataclass(slots=True)
class Verdict:
    """The sum of an audit. `running` and `running_recorded` are the running hashes after the last step, hexadecimal;
    `running_recorded` is None when a step has no record. `dropped`: lanes that did not count; `dropped_in`: the
    steps in which there were some.
    """

    steps: int = 0
    samples: int = 0
    unrecorded: int = 0
    differing: list[int] = field(default_factory=list)
    repeated: int = 0
    dropped: int = 0
    dropped_in: list[int] = field(default_factory=list)
    running: str = show_hash(0)
    running_recorded: str | None = show_hash(0)

    @property
    def agrees(self) -> bool:
        return not self.differing and not self.repeated

    def add(self, found: AuditedStep) -> None:
        """Take a step in; they must come ascending."""
        self.steps += 1
        self.samples += found.samples
        self.repeated += found.repeated
        self.dropped += len(found.dropped)
        self.dropped_in += [found.step] if found.dropped else []
        self.unrecorded += found.recorded is None
        if found.recorded is not None and found.recorded != found.computed:
            self.differing.append(found.step)
        self.running = _running(self.running, found.step, found.computed)
        before = self.running_recorded
        known = before is not None and found.recorded is not None
        self.running_recorded = _running(str(before), found.step, str(found.recorded)) if known else None


def _running(before: str, step: int, of_step: str) -> str:
    return show_hash(running_hash(int(before, 16), step, int(of_step, 16)))


class Samples(NamedTuple):
    """Samples of a batch that lie in one window: block, row in the block and id of each; shapes [samples]."""

    window: Window
    blocks: Int64Array
    rows: Int64Array
    ids: SampleIds


class Auditor:
    """Computes the samples of a run's steps. `open_source`: the data in the order of a stage; opened once for each."""

    def __init__(self, stages: Sequence[Stage], open_source: Callable[[Stage], AnySource]) -> None:
        self._stages, self._open = tuple(stages), open_source
        self._sources: dict[int, AnySource] = {}  # by stage
        self._windows: dict[tuple[int, int], Samples] = {}  # by (lane, source of a mixture)
        self._used: dict[tuple[int, str, int], dict[int, npt.NDArray[np.bool_]]] = {}
        self._filled_up: dict[tuple[int, str, int], int] = {}

    def source(self, step: int) -> tuple[AnySource, Stage]:
        """Return the data of a step of the run, and its stage."""
        stage = stage_of(self._stages, step)
        if stage.index not in self._sources:
            self._windows.clear()
            self._sources[stage.index] = self._open(stage)
        return self._sources[stage.index], stage

    def runs(self, step: int, lane: int) -> Iterator[Samples]:
        """Yield the samples of a lane's batch, in order, window by window."""
        source, stage = self.source(step)
        for window, start, stop in source.spans(stage.position(step), lane):
            place = (lane, window.source)
            if place not in self._windows or self._windows[place].window != window:
                blocks, rows = samples_of_run(window, 0, window.stop - window.start)
                self._windows[place] = Samples(window, blocks, rows, source.ids_of(window, blocks, rows))
            whole = self._windows[place]
            yield Samples(window, whole.blocks[start:stop], whole.rows[start:stop], whole.ids[start:stop])

    def ids(self, step: int, lane: int) -> SampleIds:
        """Return the ids of the samples of a lane's batch, in order."""
        return np.concatenate([run.ids for run in self.runs(step, lane)])

    def hash_of(self, step: int) -> int:
        """Return the hash of a step's samples, as workers record it."""
        lanes = self.source(step)[0].lanes
        return step_hash(lane_hash(lane, self.ids(step, lane)) for lane in range(lanes))

    def locations(self, step: int, lane: int) -> list[SampleLocation]:
        """Say where every sample of a lane's batch lies, in the batch's order."""
        source, _ = self.source(step)
        return [
            source.location(block, row, run.window.epoch)
            for run in self.runs(step, lane)
            for block, row in zip(run.blocks.tolist(), run.rows.tolist(), strict=True)
        ]

    def audit(
        self, recorded: Iterable[tuple[int, str | None]], dropped: Mapping[int, Sequence[int]] | None = None
    ) -> Iterator[AuditedStep]:
        """Compare the steps of a run, ascending, with what its workers `recorded` of each. `dropped`: by step, the
        lanes that did not count.
        """
        for step, hash_of_step in recorded:
            source, stage = self.source(step)
            hashes, samples, repeated, epoch = [], 0, 0, 0
            left_out = tuple(dropped.get(step, ())) if dropped else ()
            for lane in sorted(set(range(source.lanes)).difference(left_out)):
                runs = list(self.runs(step, lane))
                ids = np.concatenate([run.ids for run in runs])
                hashes.append(lane_hash(lane, ids))
                samples += len(ids)
                repeated += sum(self._use(source, stage, run) for run in runs)
                epoch = runs[0].window.epoch
            computed = show_hash(step_hash(hashes))
            yield AuditedStep(step, stage.index, epoch, samples, hash_of_step, computed, repeated, left_out)

    def _use(self, source: AnySource, stage: Stage, run: Samples) -> int:
        """Mark samples as used in an epoch; return how many were so already, beyond those that fill it up."""
        name, order = source.order_of(run.window)
        epoch = order.counts_as if isinstance(order, EraOrder) else run.window.epoch
        key = (stage.order, name, epoch)
        if key not in self._used:  # lanes are in two epochs at most, or in some more of a tiny source of a mixture
            apart = 1 + (_LANES_APART + stage.lane_batch_size) // order.samples_per_lane
            self._used = {k: v for k, v in self._used.items() if k[:2] != key[:2] or k[2] >= key[2] - apart}
            self._filled_up[key] = order.repeated_per_epoch
        used = self._used.setdefault(key, {})
        repeated = 0
        for block in np.unique(run.blocks).tolist():
            mine = run.rows[run.blocks == block]
            marks = used.get(block, np.zeros(0, dtype=bool))
            if len(marks) <= int(mine.max()):
                marks = np.concatenate([marks, np.zeros(int(mine.max()) + 1, dtype=bool)])
            repeated += int(marks[mine].sum()) + len(mine) - len(np.unique(mine))
            marks[mine] = True
            used[block] = marks
        expected = min(repeated, self._filled_up[key])
        self._filled_up[key] -= expected
        return repeated - expected

    def close(self) -> None:
        """Close all files."""
        for source in self._sources.values():
            source.close()


def describe_location(location: SampleLocation, rows_of: Callable[..., tuple[int, int]] | None = None) -> str:
    """Say in words where a sample lies. `rows_of`: finds the documents of a packed part (it reads the row group)."""
    parts = []
    for part in location.parts:
        words = [f"{part.file}, row group {part.row_group}"]
        rows = part.rows or (rows_of(part) if rows_of is not None else None)
        if rows is not None:
            words.append(f"row {rows[0]}" if rows[1] - rows[0] == 1 else f"rows {rows[0]} to {rows[1] - 1}")
        if part.tokens is not None:
            words.append(f"tokens {part.tokens[0]} to {part.tokens[1] - 1}")
        parts.append(", ".join(words))
    if location.filler_tokens:
        parts.append(f"{location.filler_tokens} tokens of filler")
    name = f"{location.source}: " if location.source else ""
    return name + "; ".join(parts)
