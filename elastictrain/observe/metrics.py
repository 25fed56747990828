"""One row per published step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

PHASE_KEYS = ("compute_s", "exchange_s", "mirror_s", "vote_s", "apply_s", "gather_s")
RATE_STEPS = 20
"""Steps that tokens/s is taken over where it is shown."""


class TakenOver(BaseModel):
    """See `MetricsRow`. Of several steps: the sums."""

    model_config = ConfigDict(frozen=True, extra="allow", populate_by_name=True)

    lanes: int = 0
    losers: dict[int, int] = Field(default_factory=dict, alias="from")
    takers: dict[int, int] = Field(default_factory=dict, alias="by")
    in_vain: int = 0


class MetricsRow(BaseModel):
    """What is known of a step after it has been published. Times in seconds.

    `tokens`, `samples`: of this step alone, over all lanes; `samples_hash`: of the ids of these samples, the same
    whoever had which lane (`elastictrain data audit` computes it again). `step_s`: from commit to commit. `phases`:
    see PHASE_KEYS.
    `data_wait`: of the publisher's compute, lost to its batches: waited for them, by what held them up (store, decode,
    tokenise, pack, copy, other), and spent in asking for them (call).
    `loss` and `grad_norm` are None when they were not finite. `skipped`: why the step changed nothing, or None.
    `taken_over`, where lanes are shared (`redundancy`): how many `lanes` others have computed than those whom they were
    dealt out to, `from` whom and `by` whom (worker: lanes), and how many were begun `in_vain`. `lanes_dropped`, where
    lanes may be dropped: those that do not count in this step; neither do their `samples` and `tokens`.
    """

    model_config = ConfigDict(frozen=True, extra="allow")

    step: int
    generation: int = 0
    loss: float | None = None
    grad_norm: float | None = None
    learning_rate: float | None = None
    tokens: int = 0
    samples: int = 0
    samples_hash: str | None = None
    step_s: float | None = None
    world: int = 0
    phases: dict[str, float | None] = Field(default_factory=dict)
    data_wait: dict[str, float | None] = Field(default_factory=dict)
    evaluation: dict[str, float | None] | None = None
    skipped: Any = None
    taken_over: TakenOver | None = None
    lanes_dropped: list[int] | None = None


def parse_rows(records: Iterable[Mapping[str, Any]]) -> list[MetricsRow]:
    """The rows among `records`; one that is not a row (torn in the middle and closed later) is passed over."""
    rows = []
    for record in records:
        try:
            rows.append(MetricsRow.model_validate(record))
        except ValidationError:
            continue
    return rows


class Happened:
    """Which steps have happened, in the order in which rows are written and the run goes back. The row of a step that
    was taken back may come late, from a worker that lives on: it is none.
    """

    def __init__(self) -> None:
        self.last_step = 0
        self._backs: list[tuple[int, int]] = []

    def went_back(self, step: int, up_to_generation: int | None) -> None:
        """Of the generations up to this one the steps after `step` have not happened. None (in older records): it is
        not known in which.
        """
        self.last_step = min(self.last_step, step)
        if up_to_generation is not None:
            self._backs.append((up_to_generation, step))

    def has(self, step: int, generation: int) -> bool:
        """False for what was taken back."""
        return not any(generation <= up_to and step > back for up_to, back in self._backs)

    def add(self, step: int, generation: int) -> bool:
        """A row comes; False when it is not to be written: it is there already, or was taken back."""
        if step <= self.last_step or not self.has(step, generation):
            return False
        self.last_step = step
        return True


def history(rows: Iterable[MetricsRow]) -> list[MetricsRow]:
    """What happened, steps ascending: a row at step `s` takes back every earlier row from `s` on.

    Only a run that went back to a checkpoint writes a step again, and what it had done after that step has then not
    happened.
    """
    kept: list[MetricsRow] = []
    for row in rows:
        while kept and kept[-1].step >= row.step:
            kept.pop()
        kept.append(row)
    return kept


def tokens_per_s(rows: Iterable[MetricsRow]) -> float | None:
    """Tokens over the seconds of their steps; None when no row says both."""
    timed = [(row.tokens, row.step_s) for row in rows if row.tokens and row.step_s]
    seconds = sum(step_s for _, step_s in timed)
    return sum(tokens for tokens, _ in timed) / seconds if seconds else None


def data_wait(rows: Iterable[MetricsRow]) -> tuple[float, dict[str, float]] | None:
    """Share of the steps' seconds that was lost to data, and its seconds by cause, largest first; None where no row
    says it.
    """
    told = [(row.data_wait, row.step_s) for row in rows if row.step_s and "data_wait" in row.model_fields_set]
    if not told:
        return None
    causes: dict[str, float] = {}
    for waited, _ in told:
        for cause, seconds in waited.items():
            causes[cause] = causes.get(cause, 0.0) + (seconds or 0.0)
    ordered = dict(sorted(causes.items(), key=lambda item: -item[1]))
    return sum(causes.values()) / sum(step_s for _, step_s in told), ordered


def taken_over(rows: Iterable[MetricsRow]) -> TakenOver | None:
    """The sums over these steps; None where no row says anything of it."""
    told = [row.taken_over for row in rows if row.taken_over is not None]
    if not told:
        return None
    losers, takers = Counter[int](), Counter[int]()
    for one in told:
        losers.update(one.losers)
        takers.update(one.takers)
    counts = {"losers": dict(losers), "takers": dict(takers)}
    return TakenOver(lanes=sum(one.lanes for one in told), in_vain=sum(one.in_vain for one in told), **counts)


def lanes_dropped(rows: Iterable[MetricsRow]) -> int | None:
    """How many lanes did not count in these steps; None where no row says anything of it."""
    told = [row.lanes_dropped for row in rows if row.lanes_dropped is not None]
    return sum(map(len, told)) if told else None
