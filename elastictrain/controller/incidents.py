"""The record of a fault, from its first sign to the first commit after it: what was seen, who was blamed, what was
decided, where the seconds went and what it cost. Pure data; `core.Core` fills it in.

The seconds are cut at the points that every recovery passes: last sign of life, detected (the first sign of trouble),
fenced (the last of the blamed is known to be gone), parked (the last survivor has reported), forming (the plan is out),
sealed, first commit.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

SIGHTINGS = 24
"""More of one incident than this are only counted: ten thousand workers lose the same peer at once."""
KEPT = 100
"""So many records does the ledger keep for the view; events.jsonl has all of them."""


@dataclass(frozen=True, slots=True)
class Sighting:
    """`source` (a worker, a node, the watch, a deadline) said `what` at `at_s`."""

    at_s: float
    source: str
    what: str


@dataclass(slots=True)
class Blame:
    """`worker` is held to be the cause: `why` in words, `evidence` a line each. `gone_s`: since when it is known to be
    gone.
    """

    worker: int
    node: str
    why: str
    evidence: tuple[str, ...] = ()
    gone_s: float | None = None


@dataclass(slots=True)
class Incident:
    """From the first sign of a loss (or the first member parked at a planned pause) to the first commit after the seal.

    Times are seconds on the shell's clock. `planned`: nobody was lost and nobody was troubled so far. `between_steps`:
    the members were parking at a commit, so that no step was under way. `workers`: the members that were lost.
    `notice`: a preemption asked for the pause.
    """

    cause: str
    detected_s: float
    world_before: int
    planned: bool
    workers: list[int] = field(default_factory=list)
    between_steps: bool = False
    parked_s: float | None = None
    steps_redone: int = 0
    restored_from: str | None = None
    notice: bool = False
    last_seen_s: float | None = None
    forming_s: float | None = None
    sealed_s: float | None = None
    sightings: list[Sighting] = field(default_factory=list)
    unlisted: int = 0
    blamed: list[Blame] = field(default_factory=list)
    decisions: list[str] = field(default_factory=list)
    generations: list[int] = field(default_factory=list)
    blocks_moved: int = 0
    elements_moved: int = 0
    step: int = 0
    world_after: int = 0
    joined: list[int] = field(default_factory=list)
    left: list[int] = field(default_factory=list)

    def saw(self, at_s: float, source: str, what: str) -> bool:
        """Add a sighting, once. False: it was known, or it is only counted."""
        if any((seen.source, seen.what) == (source, what) for seen in self.sightings):
            return False
        if len(self.sightings) >= SIGHTINGS:
            self.unlisted += 1
            return False
        self.sightings.append(Sighting(at_s, source, what))
        return True

    def blame(self, worker: int, node: str, why: str, evidence: tuple[str, ...] = ()) -> None:
        if all(blame.worker != worker for blame in self.blamed):
            self.blamed.append(Blame(worker, node, why, evidence))

    def gone(self, worker: int, now_s: float) -> None:
        for blame in self.blamed:
            if blame.worker == worker and blame.gone_s is None:
                blame.gone_s = now_s

    def decided(self, what: str) -> None:
        if what not in self.decisions:
            self.decisions.append(what)

    def summary(self, generation: int, sealed_s: float) -> dict[str, Any]:
        """The data of `recovery` and `resized`, announced at the seal; seconds count from the detection."""
        seconds = sealed_s - self.detected_s
        return {
            "cause": self.cause,
            "generation": generation,
            "workers": list(self.workers),
            "detected_s": self.detected_s,
            "parked_s": _since(self.detected_s, self.parked_s),
            "sealed_s": seconds,
            "seconds": seconds,
            "step": self.step,
            "steps_redone": self.steps_redone,
            "world_before": self.world_before,
            "world_after": self.world_after,
            "joined": list(self.joined),
            "left": list(self.left),
            "restored_from": self.restored_from,
        }

    def record(
        self, number: int, outcome: str, first_commit_s: float | None, lane_count: int, bytes_per_element: float
    ) -> dict[str, Any]:
        """The data of `incident`: the whole record as plain data.

        `outcome`: recovered, overtaken (the next fault came before the first commit), finished, failed, stopped.
        `seconds`: by part, None where there was none; `detect` from the last sign of life of whoever was blamed, where
        it is known; `fence` and `park` both from the detection, since they run side by side; `wait` for workers;
        `form` with its resharding; `first_commit` until the first commit after the seal has been published; `total`
        from the detection.
        """
        fenced = [blame.gone_s for blame in self.blamed if blame.gone_s is not None]
        end_s = first_commit_s if first_commit_s is not None else self.sealed_s
        moved = int(self.elements_moved * bytes_per_element) if bytes_per_element else None
        return {
            "number": number,
            "outcome": outcome,
            "cause": self.cause,
            "planned": self.planned,
            "detected_s": self.detected_s,
            "seen": [{"at_s": s.at_s, "source": s.source, "what": s.what} for s in self.sightings],
            "seen_more": self.unlisted,
            "blamed": [
                {"worker": b.worker, "node": b.node, "why": b.why, "evidence": list(b.evidence), "gone_s": b.gone_s}
                for b in self.blamed
            ],
            "workers": list(self.workers),
            "decided": list(self.decisions),
            "seconds": {
                "detect": _since(self.last_seen_s, self.detected_s),
                "fence": _since(self.detected_s, max(fenced, default=None)),
                "park": _since(self.detected_s, self.parked_s),
                "wait": _since(self.parked_s, self.forming_s),
                "form": _since(self.forming_s, self.sealed_s),
                "first_commit": _since(self.sealed_s, first_commit_s),
                "total": _since(self.detected_s, end_s),
            },
            "generations": list(self.generations),
            "step": self.step,
            "world_before": self.world_before,
            "world_after": self.world_after,
            "joined": list(self.joined),
            "left": list(self.left),
            "blocks_moved": self.blocks_moved,
            "bytes_moved": moved,
            "steps_redone": self.steps_redone,
            "lane_batches_redone": self.steps_redone * lane_count,
            "restored_from": self.restored_from,
        }


def _since(start_s: float | None, end_s: float | None) -> float | None:
    return None if start_s is None or end_s is None else end_s - start_s
