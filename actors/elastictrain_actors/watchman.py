"""Detection as the driver sees it: it asks every turn what has been noticed, and gets events for the machine.

Nothing here blocks, and nothing here kills: the machine decides, and its orders go to the agents.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

from elastictrain.controller import commands as cmd
from elastictrain.controller import events as ev
from elastictrain.controller.suspicion import Kind, Suspicion, Verdict
from elastictrain_actors.heartbeats import Heartbeats

UNHEARD_S = 30.0
"""Until then an agent's first beat may take; later, people are told that this node's loss will only be seen by Ray."""

Noticed = ev.WorkerDied | ev.WorkerFrozen | ev.GenerationHung | ev.NodeLost | ev.PreemptionNotice | cmd.Announce


class Watchman:
    """Joins the ear (`Heartbeats`) and the judgement (`Suspicion`). Used from one thread. `clock`: the driver's."""

    def __init__(
        self, heartbeats: Heartbeats, suspicion: Suspicion, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.heartbeats, self.suspicion, self._clock = heartbeats, suspicion, clock
        self._said_unheard: set[str] = set()
        self._said_going: set[str] = set()

    # --- what the effects and the driver tell it ---

    def agent_started(self, node: str, number: int) -> None:
        """Agent `number` of `node` has answered `follow`."""
        self.heartbeats.expect(node, number)

    def agent_died(self, node: str) -> None:
        """Ray says that the agent's process has died: start another one. The node is not judged until it beats."""
        self.heartbeats.forget(node)

    def formed(self, generation: int, members: Iterable[int]) -> None:
        """`Form` goes out."""
        self.suspicion.expect(generation, members, self._clock())

    def parking(self, generation: int) -> None:
        """`Park` goes out: waiting in this generation is over."""
        self.suspicion.expect(generation, (), self._clock())

    def worker_gone(self, worker: int) -> None:
        """Dead, retired or lost."""
        self.suspicion.forget(worker)

    # --- what it has noticed ---

    def look(self) -> list[Noticed]:
        """What is new since the last call. Call it every 0.1 s or so: the delay adds to every detection."""
        now_s = self._clock()
        found: list[Noticed] = []
        for report in self.heartbeats.poll():
            self.suspicion.observe(report, now_s)
            if report.going_s is not None and report.node not in self._said_going:
                self._said_going.add(report.node)
                found.append(ev.PreemptionNotice(0.0, now_s + report.going_s, None, report.node, report.going_why))
        return [*found, *self._lost(now_s), *map(_event, self.suspicion.verdicts(now_s)), *self._unheard()]

    def _lost(self, now_s: float) -> list[Noticed]:
        found: list[Noticed] = []
        for node, silent_s in self.heartbeats.silent().items():
            workers = self.suspicion.workers_on(node)
            self.heartbeats.forget(node)
            for worker in workers:
                self.suspicion.forget(worker)
            reason = f"no round trip of heartbeats for {silent_s:.1f} s"
            found.append(ev.NodeLost(0.0, node, reason, workers, now_s - silent_s))
        return found

    def _unheard(self) -> list[Noticed]:
        late = {node: s for node, s in self.heartbeats.unheard().items() if s > UNHEARD_S}
        new, self._said_unheard = late.keys() - self._said_unheard, set(late)
        return [
            cmd.Announce(
                "agent_unheard",
                {"node": node, "seconds": round(late[node], 1), "address": f"{self.heartbeats.host}:udp",
                 "consequence": "no UDP between this node and the controller: only Ray will notice its loss"},
            )
            for node in sorted(new)
        ]  # fmt: skip


def _event(verdict: Verdict) -> Noticed:
    if verdict.kind is Kind.HUNG_COLLECTIVE:
        return ev.GenerationHung(0.0, verdict.generation, verdict.reason, verdict.worker, verdict.evidence)
    if verdict.kind is Kind.STORAGE or verdict.worker is None:
        return cmd.Announce("storage_stalled", {"reason": verdict.reason, "evidence": list(verdict.evidence)})
    if verdict.kind is Kind.GONE:
        return ev.WorkerDied(0.0, verdict.worker, "its process is gone, says the agent of its node")
    return ev.WorkerFrozen(0.0, verdict.worker, verdict.reason, verdict.evidence, verdict.last_seen_s)
