"""How much failure a run puts up with, as data; and the pure questions asked of what has failed so far.

Without limits an elastic run repeats a user's error for ever: every death is answered by a fresh worker, which dies of
the same. What tells an error in the job from bad luck is that it comes back *at the same place*: the same step, no
commit in between, and whoever computes one certain lane is the one that dies. (NVRx ends a run after three cycles
without progress; torchrun and Ray Train count restarts only, so that a long run on many machines needs a large number
and a short one a small one.)
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from elastictrain.errors import ConfigError

WINDOW_S = 3600.0
"""Failures are counted over the last hour."""


@dataclass(frozen=True, slots=True)
class FailureBudget:
    """Nobody has to set these.

    `same_lane`: rounds in a row that may lose a worker at one step while one lane is common to all that were lost.
    `same_step`: rounds in a row that may lose any worker, or hang, at one step. `same_torn`: applies of one step that
    may fail with the same error. `formings`: formings in a row that may take too long. `per_hour` +
    `per_hour_per_worker` x workers.max: failures of one cause in an hour. `node_failures`: failures in an hour after
    which a node is set aside for `node_rest_s`; never more than `node_share` of the known nodes. `vain`: so many
    generations in a row that end without a commit, although nobody was lost, cost a worker its place; `vain_replaced`:
    so many workers at one step.
    """

    same_lane: int = 3
    same_step: int = 8
    same_torn: int = 2
    formings: int = 6
    per_hour: int = 100
    per_hour_per_worker: float = 2.0
    node_failures: int = 3
    node_rest_s: float = 4 * 3600.0
    node_share: float = 1 / 3
    vain: int = 5
    vain_replaced: int = 2

    def __post_init__(self) -> None:
        counts = (self.same_lane, self.same_step, self.same_torn, self.formings, self.per_hour, self.node_failures)
        wrong = min(*counts, self.vain) < 1 or self.vain_replaced < 0
        if wrong or self.per_hour_per_worker < 0 or self.node_rest_s < 0 or not 0 <= self.node_share < 1:
            raise ConfigError(f"a failure budget needs counts of at least 1 and a node_share below 1; got {self}")

    def hourly(self, workers: int) -> int:
        """How many failures of one cause an hour may bring to a run of at most `workers`."""
        return self.per_hour + int(self.per_hour_per_worker * workers)


@dataclass(frozen=True, slots=True)
class Loss:
    """A worker that was lost in a round, by itself: not with its node, not on request. `kind`: died, frozen, torn,
    corrupt. `lanes`: those it was computing; none while its generation was forming.
    """

    worker: int
    kind: str
    cause: str
    lanes: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Round:
    """A generation that ended with `losses`, or hung, before the job had come further than `reached`. `exact`: that is
    known from survivors; else it is what was published, which is one step behind.
    """

    generation: int
    losses: tuple[Loss, ...]
    hung: str = ""
    exact: bool = True


def common_lanes(rounds: Sequence[Round]) -> set[int]:
    """The lanes that the lost workers of every one of these rounds were computing."""
    shared: set[int] | None = None
    for one in rounds:
        lanes = {lane for loss in one.losses for lane in loss.lanes}
        shared = lanes if shared is None else shared & lanes
    return shared or set()


def error_line(text: str) -> str:
    """What an error says, to compare two of them: the last line of a traceback, numbers masked (addresses, bytes)."""
    lines = [line.strip() for line in text.strip().splitlines() if line.strip()]
    return re.sub(r"0x[0-9a-f]+|\d+(\.\d+)?", "#", lines[-1]) if lines else ""


def verdict(budget: FailureBudget, rounds: Sequence[Round], reached: int, resume: str) -> str | None:
    """Why the run must end after these `rounds` without progress beyond step `reached`, for the user; or None."""
    step = f"step {reached + 1}" + ("" if any(one.exact for one in rounds) else f" or {reached + 2}")
    torn = _torn(rounds[-budget.same_torn :]) if len(rounds) >= budget.same_torn else None
    if torn is not None:
        who = " and then ".join(f"on {_people(one)}" for one in rounds[-budget.same_torn :])
        return (
            f"RecipeError: {step} could be computed but not applied: the update failed with the same error "
            f"{budget.same_torn} times, {who}. Another try would fail in the same way. The exception comes from the "
            f"recipe's optimizer; {resume}. The error of worker {torn.worker}:\n{torn.cause}"
        )
    last = [one for one in rounds if any(loss.lanes for loss in one.losses)][-budget.same_lane :]
    lanes = sorted(common_lanes(last)) if len(last) >= budget.same_lane else []
    if lanes:
        return _repeated(step, last, f"Whoever computes {_lanes(lanes)} of this step is lost", resume)
    if len(rounds) >= budget.same_step:
        return _repeated(step, rounds, "No other step was committed in between", resume)
    return None


def _torn(rounds: Sequence[Round]) -> Loss | None:
    """The last of the torn applies, if each of these rounds has one with the same error."""
    found: Loss | None = None
    lines: set[str] | None = None
    for one in rounds:
        torn = [loss for loss in one.losses if loss.kind == "torn"]
        said = {error_line(loss.cause) for loss in torn}
        lines = said if lines is None else lines & said
        found = next((loss for loss in torn if error_line(loss.cause) in lines), None)
    return found if lines else None


def _repeated(step: str, rounds: Sequence[Round], place: str, resume: str) -> str:
    losses = [f"worker {loss.worker} ({loss.cause})" for one in rounds for loss in one.losses]
    losses += [f"generation {one.generation} hung ({one.hung})" for one in rounds if one.hung]
    listed = "; ".join(losses[:8]) + (f"; and {len(losses) - 8} more" if len(losses) > 8 else "")
    return (
        f"RecipeError: {step} cannot be committed: it has failed {len(rounds)} times in a row, each time on fresh "
        f"workers: {listed}. {place}, so another try would fail in the same way. The usual cause is that a worker runs "
        "out of memory: lower lane_batch_size (and raise lanes to keep the batch), raise workers.cpus so that fewer "
        "workers share a node, or give them nodes with more memory. Otherwise look at what the recipe does at this "
        f"step: a crash in native code, a loop that never ends; {resume}"
    )


def _people(one: Round) -> str:
    numbers = [str(loss.worker) for loss in one.losses if loss.kind == "torn"]
    return f"worker {numbers[0]}" if len(numbers) == 1 else f"workers {', '.join(numbers)}"


def _lanes(lanes: Sequence[int]) -> str:
    return f"lane {lanes[0]}" if len(lanes) == 1 else f"one of the lanes {', '.join(map(str, lanes[:8]))}"
