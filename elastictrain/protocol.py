"""What the controller and the workers say to each other about a generation. Plain frozen records; no torch, no Ray."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from elastictrain.layout import Layout, Move


@dataclass(frozen=True, slots=True)
class Doubt:
    """The state of a generation is not to be trusted: checks have found a difference, and no copy of it is known to be
    right. Only what was stored at or before `good_step` is. `suspects`: workers of which at least one is wrong, where
    it is not known which.
    """

    good_step: int
    reason: str
    suspects: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class ParkReport:
    """A promise (invariant R3): from now on only a newer generation moves this worker's state.

    `applied_step`: the last step whose apply has ended here (0: initial state). `sealed_generation`: the newest
    generation whose seal this worker has seen complete. `gathered`: the compute-dtype parameters of `applied_step` are
    whole here. `vote`: the result of the vote for `applied_step`, byte for byte (None right after a seal that saw no
    step yet, or when it may be forgotten: R1). `computing`: it had begun to compute `applied_step + 1`. `holds_next`:
    it holds its reduced gradients for that step. `doubt`: the state here must not be gone on from.
    """

    worker: int
    generation: int
    applied_step: int
    sealed_generation: int
    gathered: bool
    vote: bytes | None = None
    holds_next: bool = False
    computing: bool = True
    doubt: Doubt | None = None


COUNTED_SUMS = 2
"""So many sums of gradients have room in `ModelFacts.fixed_bytes`."""


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What the controller and the user need to know of a model; from `meta` tensors, without its memory. The first
    `active_blocks` blocks have gradients; `fixed_bytes` has room for `COUNTED_SUMS` sums of them.
    """

    block_elements: tuple[int, ...]
    parameters: int
    optimizer: str
    state_tensors: int
    fixed_bytes: int
    bytes_per_held_element: int
    active_blocks: int = 0


@dataclass(frozen=True, slots=True)
class Ready:
    """What a prepared worker says of itself. `prepared_s`: seconds of each part of its preparation; `store`: address of
    the store in this process, where the generations that it leads meet.
    """

    worker: int
    pid: int
    numerics: dict[str, str]
    fingerprint: dict[str, object]
    memory_bytes: int | None
    prepared_s: dict[str, float]
    store: str = ""
    node: str = ""
    labels: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Row:
    """One published step for metrics.jsonl."""

    values: dict[str, Any]


@dataclass(frozen=True, slots=True)
class StepSignals:
    """What all workers of `generation` said of `step` with their votes: `stragglers.signals` records in rank order.
    `age_s`: how long it had waited in the outbox when a controller asked for it.
    """

    generation: int
    step: int
    records: bytes
    age_s: float = field(default=0.0, compare=False)


@dataclass(frozen=True, slots=True)
class Awaited:
    """For people, who see it in the status; nothing is decided by it. `why`: what the data of a worker's next step wait
    for; None: they wait no more.
    """

    worker: int
    why: str | None


@dataclass(frozen=True, slots=True)
class Restore:
    """Where a generation takes its state from when it does not come from live holders.

    `step` 0 with `checkpoint` None is the recipe's initial state. `discard_newer`: what was stored after `step` is not
    to be trusted and is removed, so that nobody goes on from it. `insist`: the user has asked for this one, so the run
    ends if it is damaged, instead of taking an older one.
    """

    step: int
    checkpoint: str | None
    discard_newer: bool = False
    insist: bool = False


@dataclass(frozen=True, slots=True)
class ReadBytes:
    """What a generation has read of the checkpoint that it restores. `stored`: the bytes of all its packs. `by_worker`:
    (worker, bytes that it has read from the first store). `healed`: hash blocks that were not whole there, and came
    from another store.
    """

    stored: int
    by_worker: tuple[tuple[int, int], ...]
    healed: int = 0


@dataclass(frozen=True, slots=True)
class FormPlan:
    """All that a worker needs to enter a generation.

    `step` is the commit at which the generation is sealed. Workers that have applied only `step - 1` roll forward with
    `roll_forward` (the vote result that a survivor applied), under `previous`, the layout in force when it was voted.
    Then `moves` copy blocks, then the owners publish parameters to the workers in `gather_to`, then the seal.
    `given_up`: generation and step of the newest checkpoint that the controller has heard to have come to nothing.
    """

    generation: int
    step: int
    layout: Layout
    previous: Layout | None
    moves: tuple[Move, ...]
    roll_forward: bytes | None
    restore: Restore | None
    gather_to: tuple[int, ...]
    store: str
    published_step: int = 0
    checkpointed_step: int = 0
    given_up: tuple[int, int] = (0, 0)
    joiners: tuple[int, ...] = field(default=())

    @property
    def first_known(self) -> int:
        """The first member in rank order that is no newcomer (the first of all when all are)."""
        return next((w for w in self.layout.workers if w not in self.joiners), self.layout.workers[0])


@dataclass(frozen=True, slots=True)
class Stage:
    """A stretch of a run whose data come in one order. It is recorded in every manifest from then on.

    A job that is resumed with another number of lanes (or lane batch size) gets a new stage, whose order starts anew at
    `from_step`, with a seed of its own. With another mixture, or with samples taken out (`elastictrain data skip`), the
    stage `continues` the order that began with stage `begun`: the step after `from_step` is step `at` of it.
    `jumps`: steps `[a, b)` of the order that are passed over; `holes`: (block, start, stop, at) of samples that are not
    used from step `at` of the order on; `skips`: how many of the run's requests to skip something are in these.
    """

    index: int = 0
    from_step: int = 0
    lanes: int = 0
    lane_batch_size: int = 0
    continues: bool = False
    begun: int | None = None
    at: int = 0
    jumps: tuple[tuple[int, int], ...] = ()
    holes: tuple[tuple[int, int, int, int], ...] = ()
    skips: int = 0
    mixture: tuple[Mapping[str, Any], ...] | None = None
    """The plan of a mixture, as `data.mixture.Segment.as_json` writes it; steps are those of the run."""
    data: str | None = None
    """Names the data of its order (`data.fingerprint.identity`) in a run whose data have changed; None: those of the
    settings."""
    renamed: Mapping[str, str] | None = None
    """How sources of the settings whose data have changed are called in the mixture's order: as new sources."""

    @property
    def order(self) -> int:
        """The stage with which the order began; its seed is that of the order."""
        return self.index if self.begun is None else self.begun

    def position(self, step: int) -> int:
        """The step of the order whose samples step `step` of the run uses."""
        position = self.at + max(0, step - 1 - self.from_step)
        for first, end in sorted(self.jumps):
            position += end - first if position >= first else 0
        return position

    def as_json(self) -> dict[str, Any]:
        """What a manifest keeps: four numbers, and whatever else says something."""
        always = ("index", "from_step", "lanes", "lane_batch_size")
        values = {one.name: (getattr(self, one.name), one.default) for one in fields(self)}
        return {name: value for name, (value, usual) in values.items() if name in always or value != usual}

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Stage:
        """Read a stage back from JSON, where tuples are lists."""
        known = {name: record[name] for name in cls.__slots__ if name in record}
        for name in ("jumps", "holes"):
            known[name] = tuple(tuple(int(n) for n in item) for item in known.get(name, ()))
        mixture = known.get("mixture")
        return cls(**{**known, "mixture": None if mixture is None else tuple(dict(one) for one in mixture)})
