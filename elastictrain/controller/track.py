"""One worker as detection sees it: how long it has stood still, in time in which it could have run. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from elastictrain.signs import WAITING, NodeReport, WorkerSign


@dataclass(slots=True)
class Track:
    """One worker's process as it was last seen. `still_s`: time since its last progress in which it could have run;
    `held_up_s`: the rest of that time. `used_s`: processor time that it used meanwhile.
    """

    sign: WorkerSign
    node: str
    agent: int
    at_s: float
    late_s: float
    seen_s: float
    still_s: float = 0.0
    held_up_s: float = 0.0
    used_s: float = 0.0
    stopped_s: float = 0.0
    named: bool = False

    @property
    def is_waiting(self) -> bool:
        return self.sign.activity in WAITING

    def in_words(self) -> str:
        sign = self.sign
        return (
            f"worker {sign.worker} on {self.node}, process {sign.pid} (state {sign.state}), generation "
            f"{sign.generation}, {sign.activity.name.lower()} of step {sign.step}: {self.still_s:.2f} s without "
            f"progress, {self.held_up_s:.2f} s kept from running, {self.used_s:.2f} s of processor time"
        )

    @classmethod
    def first(cls, sign: WorkerSign, report: NodeReport, now_s: float) -> Track:
        return cls(sign, report.node, report.agent, report.at_s, report.late_s, now_s)

    def advance(self, sign: WorkerSign, report: NodeReport, now_s: float) -> float:
        """Take in what the worker looks like now; returns the seconds since it was last seen. A new agent has a new
        clock and new sums: nothing is known of the time between.
        """
        before, same_agent = self.sign, (self.node, self.agent) == (report.node, report.agent)
        passed_s = max(0.0, report.at_s - self.at_s) if same_agent else 0.0
        late_s = max(0.0, report.late_s - self.late_s) if same_agent else 0.0
        used_s = max(0.0, sign.cpu_s - before.cpu_s)
        held_up_s = min(passed_s, max(late_s, _held_up(before, sign, passed_s, used_s)))
        if sign.count != before.count:
            since_s = min(sign.age_s, passed_s)
            self.still_s = max(0.0, since_s - held_up_s)
            self.used_s = used_s * since_s / passed_s if passed_s else 0.0
            self.held_up_s, self.named = 0.0, False
        elif sign.count >= 0:
            self.still_s += passed_s - held_up_s
            self.held_up_s += held_up_s
            self.used_s += used_s
        stopped_on = sign.is_stopped and before.is_stopped and sign.count == before.count
        self.stopped_s = self.stopped_s + max(0.0, passed_s - late_s) if stopped_on else 0.0
        self.sign, self.node, self.agent = sign, report.node, report.agent
        self.at_s, self.late_s, self.seen_s = report.at_s, report.late_s, now_s
        return passed_s


def _held_up(before: WorkerSign, sign: WorkerSign, passed_s: float, used_s: float) -> float:
    """Seconds between two beats in which the worker was ready to run and got no processor. Where the kernel does not
    count them: a process that is ready at the beat had what it used, and was kept from the rest.
    """
    if sign.held_up_s is not None and before.held_up_s is not None:
        return max(0.0, sign.held_up_s - before.held_up_s)
    return max(0.0, passed_s - used_s) if sign.state == "R" else 0.0
