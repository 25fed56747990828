"""Judge the simulator by mutants: bugs planted in the machine must be noticed by its books, or by the invariants."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from elastictrain.controller import moves, planning, policies, recovery, settle
from elastictrain.controller.core import Core
from elastictrain.controller.phases import Parking
from elastictrain.layout import Layout
from elastictrain.sim import Costs, FaultRates, Scenario, Violation, simulate
from tests.property.controller.mutants import (
    Plant,
    copies_from_the_dead,
    does_not_wait_for_all_reports,
    forgets_the_vote,
    gathers_only_to_joiners,
    goes_on_from_the_slowest,
    restores_the_oldest_checkpoint,
)


def copies_half_of_what_is_missing(patch: pytest.MonkeyPatch) -> None:
    real = planning.moves_between
    patch.setattr(planning, "moves_between", lambda *args: real(*args)[::2])


def keeps_no_mirrors(patch: pytest.MonkeyPatch) -> None:
    """Nothing is wrong with a single plan: only the invariants see what is missing."""
    real = policies.promoted

    def bare(*args: Any, **settings: Any) -> Layout:
        return real(*args, **settings | {"mirrors": False})

    patch.setattr(policies, "promoted", bare)


def forgets_a_corrupt_checkpoint_is_corrupt(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(moves, "drop_checkpoint", lambda core, event, out: True)


def believes_only_what_all_have_sealed(patch: pytest.MonkeyPatch) -> None:
    """A seal that some have seen, and not all, does not count."""
    real, mark = recovery.take_stock, Core.mark_sealed

    def late(core: Core, now_s: float) -> None:
        if not isinstance(core.state, Parking):
            mark(core, now_s)

    patch.setattr(Core, "mark_sealed", late)

    def deaf(layouts: Any, sealed: int, reports: Any, step: int) -> Any:
        return real(layouts, sealed, {w: replace(r, sealed_generation=0) for w, r in reports.items()}, step)

    patch.setattr(settle, "take_stock", deaf)


def learns_from_its_own_clock(patch: pytest.MonkeyPatch) -> None:
    """Not a function of the events alone: what replays the journal is another machine."""
    real, calls = Core.parking_limit_s, [0]

    def drifting(core: Core) -> float:
        calls[0] += 1
        return real(core) + calls[0] * 1e-3

    patch.setattr(Core, "parking_limit_s", drifting)


PLANTS: list[Plant] = [
    goes_on_from_the_slowest,
    forgets_the_vote,
    gathers_only_to_joiners,
    does_not_wait_for_all_reports,
    copies_half_of_what_is_missing,
    copies_from_the_dead,
    keeps_no_mirrors,
    restores_the_oldest_checkpoint,
    forgets_a_corrupt_checkpoint_is_corrupt,
    believes_only_what_all_have_sealed,
    learns_from_its_own_clock,
]


def days() -> None:
    for seed in range(25):
        rates = FaultRates(
            worker_death_h=1.0,
            worker_freeze_h=10.0,
            torn_apply_h=10.0,
            node_loss_h=3.0,
            node_notice_h=5.0,
            node_partition_h=10.0,
            controller_death_h=0.5,
            corrupt_checkpoint=0.3,
            split_vote=0.5,
            late_seal=0.8,
        )
        # Forming may take long, so that faults hit it too; without mirrors every loss goes back to a checkpoint.
        slow = {"forming_s": 60.0, "poll_s": 1.0} if seed % 2 else {}
        costs = Costs(checkpoint_every_s=120.0, checkpoint_write_s=10.0, **slow)
        sizes = {"workers": 6, "workers_per_node": 2, "min_workers": 2, "mirrors": seed % 3 > 0, "check": "all"}
        simulate(Scenario.model_validate({"hours": 2.0, "seed": seed, "rates": rates, "costs": costs, **sizes}))


def test_without_a_plant_all_is_well() -> None:
    days()


@pytest.mark.parametrize("plant", PLANTS, ids=lambda plant: plant.__name__)
def test_a_planted_bug_is_noticed(plant: Plant, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch)
    with pytest.raises(Violation):
        days()
