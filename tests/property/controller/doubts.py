"""What the model knows of silent corruption: the doubts that the controller has heard, and what follows from them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from elastictrain.controller import Phase
from elastictrain.controller import events as ev
from elastictrain.protocol import FormPlan

STEPPING = (Phase.FORMING, Phase.RUNNING, Phase.PARKING)


class Doubts:
    """Whatever a live member says of its generation against its state, or another's, must be honoured."""

    def __init__(self) -> None:
        self.open: list[int] = []  # good steps that the controller has heard of and not gone back to
        self.distrusts = False  # it has gone back in doubt: newer checkpoints must be removed

    def hear(self, event: ev.Event, generation: int, phase: Phase, members: Iterable[int]) -> None:
        """`members`: whose word counts."""
        if not isinstance(event, ev.WorkerParked | ev.WorkerFailed) or event.generation != generation:
            return
        said = event.report.doubt if isinstance(event, ev.WorkerParked) else event.doubt
        about = event.report.worker if isinstance(event, ev.WorkerParked) else event.worker
        if said is not None and phase in STEPPING and about in members:
            self.open.append(said.good_step)

    def settled(self, checkpoints: Mapping[int, str]) -> dict[int, str]:
        """The job has gone back: the checkpoints that may still be believed."""
        self.distrusts = bool(self.open)
        kept = {step: path for step, path in checkpoints.items() if step <= min(self.open, default=step)}
        self.open = []
        return kept

    def check(self, plan: FormPlan) -> None:
        """No generation may forget them."""
        assert not self.open, f"{plan} goes on from a state that is in doubt: good was step {self.open}"
        keeps = plan.restore is not None and not plan.restore.discard_newer
        assert not (keeps and self.distrusts), f"{plan} keeps what is in doubt"
