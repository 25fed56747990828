"""Generations that end in vain have a limit: first whoever the trouble comes from is replaced, then the run fails."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elastictrain.controller import FailureBudget, Phase
from elastictrain.controller import commands as cm
from elastictrain.controller import events as ev
from elastictrain.errors import ConfigError
from elastictrain.protocol import Doubt
from tests.unit.controller.scene import Scene, announced, every, only

BUDGET = FailureBudget()


def in_vain(scene: Scene, worker: int, *, seal: bool = True, doubt: Doubt | None = None) -> list[cm.Command]:
    """The generation is sealed (or not), `worker` is troubled, and all park without having committed anything."""
    scene.now_s += 1.0
    if seal:
        scene.seal()
    out = scene.send(ev.WorkerTroubled(scene.now_s, scene.generation, worker, "connection reset"))
    sealed = scene.generation if seal else scene.ledger.sealed
    members = [w for w in scene.plan.layout.workers if w in scene.ledger.workers]
    return out + scene.park(*members, applied=scene.plan.step, sealed_generation=sealed, doubt=doubt)


def spares(**changes: Any) -> Scene:
    """Three workers and two that wait."""
    scene = Scene(spares=2, **changes)
    scene.ready(*scene.ledger.workers)
    return scene


def test_after_five_in_a_row_the_most_troubled_is_replaced() -> None:
    scene = spares()
    for worker in (1, 2, 1, 0):
        out = in_vain(scene, worker)
        assert every(cm.Kill, out) == []
        assert scene.machine.phase is Phase.FORMING
    out = in_vain(scene, 2)
    (kill,) = every(cm.Kill, out)
    assert kill.worker == 2, "as often as worker 1, and later"
    assert kill.reason == (
        "5 generations in a row ended without a commit, 2 of them by trouble of this worker, last: "
        "worker 2 lost a peer: connection reset"
    )
    assert scene.machine.phase is Phase.PARKING, "until it is gone"
    assert [what for _, what in scene.ledger.nodes["node2"].failures] == ["troubled"]
    assert [len(times) for times in scene.ledger.failures.values()] == [1]
    assert only(cm.StartWorker, out).worker == 5, "a new one is asked for at once"
    out = scene.die(2)
    assert only(cm.Form, out).plan.layout.workers == (0, 1, 3)
    scene.seal()
    record = announced(scene.send(ev.Progress(scene.now_s, scene.generation, 1)), "incident")
    assert [blamed["worker"] for blamed in record["blamed"]] == [2]
    assert len(record["blamed"][0]["evidence"]) == 2


def test_when_two_replacements_have_not_helped_the_run_fails_and_says_who_and_why() -> None:
    scene = spares()
    for victim in range(BUDGET.vain_replaced):
        for _ in range(BUDGET.vain):
            out = in_vain(scene, victim)
        assert only(cm.Kill, out).worker == victim
        scene.die(victim)
    for _ in range(BUDGET.vain - 1):
        assert every(cm.EndRun, in_vain(scene, 2)) == []
    end = only(cm.EndRun, in_vain(scene, 2))
    assert end.outcome == "failed"
    error = end.error or ""
    workers = ", ".join(map(str, scene.plan.layout.workers))
    assert error.startswith(
        f"ClusterError: no step after 0 could be committed: the last 5 generations, of workers {workers}, ended "
        "without a commit although nobody was lost (generation 11: worker 2 lost a peer: connection reset; generation"
    )
    assert "Replacing worker 0 (worker 0 lost a peer: connection reset), worker 1 (worker 1 lost" in error
    assert error.endswith("at their logs; the job can be started again from the beginning")


def test_generations_that_were_never_sealed_count_too() -> None:
    scene = spares()
    for _ in range(BUDGET.vain - 1):
        assert every(cm.Kill, in_vain(scene, 1, seal=False)) == []
    assert only(cm.Kill, in_vain(scene, 1, seal=False)).worker == 1


@pytest.mark.parametrize("what", ["commit", "death", "arrival"])
def test_a_commit_a_death_and_an_arrival_are_a_new_start(what: str) -> None:
    scene = spares()
    for _ in range(BUDGET.vain - 1):
        in_vain(scene, 1)
    scene.seal()
    if what == "commit":
        scene.send(ev.WorkerTroubled(scene.now_s, scene.generation, 1, "connection reset"))
        scene.park(0, 1, 2, applied=1)
    elif what == "death":
        scene.die(0)
        scene.park(1, 2, applied=0)
    else:
        scene.send(ev.AddRequested(scene.now_s))
        scene.park(0, 1, 2, applied=1)  # at the commit that carried the pause flag
        assert len(scene.plan.layout.workers) == 4
    for _ in range(BUDGET.vain - 1):
        out = in_vain(scene, 1)
        assert every(cm.Kill, out) == []
    assert every(cm.Kill, in_vain(scene, 1)) != []


def test_without_replacement_and_nobody_to_spare_it_fails_at_once() -> None:
    scene = Scene(replace=False, min_workers=3)
    scene.ready(0, 1, 2)
    for _ in range(BUDGET.vain - 1):
        assert every(cm.EndRun, in_vain(scene, 1)) == []
    error = only(cm.EndRun, in_vain(scene, 1)).error or ""
    assert "There was nobody to replace. Look at the network between their nodes" in error


def test_without_replacement_a_smaller_world_is_tried() -> None:
    scene = Scene(replace=False)
    scene.ready(0, 1, 2)
    for _ in range(BUDGET.vain):
        out = in_vain(scene, 1)
    assert only(cm.Kill, out).worker == 1
    assert only(cm.Form, scene.die(1)).plan.layout.workers == (0, 2)


def test_rather_one_whose_blocks_have_another_holder() -> None:
    scene = spares(mirrors=False, block_shares={1: 0.0})
    for worker in (1, 0, 1, 0, 2):
        out = in_vain(scene, worker)
    assert only(cm.Kill, out).worker == 1, "it holds nothing"


def test_a_doubt_that_comes_back_and_back_accuses_its_suspects() -> None:
    """Every time the job goes back, computes again, and the copies differ again."""
    scene = spares(checkpoint=True)
    doubt = Doubt(0, "workers [1, 2] have different copies", (1, 2))
    for _ in range(BUDGET.vain - 1):
        assert every(cm.Kill, in_vain(scene, 0, doubt=doubt)) == []
        assert scene.plan.restore is not None
    out = in_vain(scene, 0, doubt=doubt)
    assert only(cm.Kill, out).worker in (1, 2)
    assert "have different copies" in every(cm.Kill, out)[0].reason
    assert "went_back" not in [c.kind for c in out if isinstance(c, cm.Announce)], "when it is gone"


def test_steps_that_are_computed_again_are_no_progress_but_not_in_vain() -> None:
    """After going back, trouble now and then with commits in between ends no run."""
    scene = spares(checkpoint=True)
    scene.seal()
    scene.send(ev.Progress(1.0, 1, 50))
    scene.send(ev.WorkerTroubled(1.0, 1, 0, "x"))
    scene.park(0, 1, 2, applied=50, doubt=Doubt(0, "differ", ()))
    assert scene.plan.step == 0
    for applied in range(1, 20):
        scene.seal()
        scene.send(ev.WorkerTroubled(scene.now_s, scene.generation, 0, "x"))
        out = scene.park(0, 1, 2, applied=applied)
        assert only(cm.Form, out).plan.step == applied
    assert len(scene.ledger.vain) <= 1


@pytest.mark.parametrize("wrong", [{"vain": 0}, {"vain_replaced": -1}])
def test_limits_that_make_no_sense_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=r"^a failure budget needs counts of at least 1"):
        FailureBudget(**wrong)  # type: ignore[arg-type]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_whoever_is_troubled_it_ends(data: st.DataObject) -> None:
    """Trouble in every generation, sealed or not, by anybody: so many generations and no more."""
    replace = data.draw(st.booleans())
    scene = Scene(spares=data.draw(st.integers(0, 2)), replace=replace, mirrors=data.draw(st.booleans()))
    scene.ready(*scene.ledger.workers)
    most = (BUDGET.vain_replaced + 1) * BUDGET.vain
    most += BUDGET.vain_replaced  # who stands in may arrive a generation later, and an arrival is a new start
    for _ in range(most):
        assert scene.machine.phase is Phase.FORMING
        troubled = data.draw(st.sampled_from(scene.plan.layout.workers))
        out = in_vain(scene, troubled, seal=data.draw(st.booleans()))
        if scene.machine.phase is Phase.FAILED:
            break
        for kill in every(cm.Kill, out):
            scene.die(kill.worker)
            scene.ready(*[w for w, facts in scene.ledger.workers.items() if facts.role.value == "starting"])
    assert scene.machine.phase is Phase.FAILED
    assert "ended without a commit although nobody was lost" in (only(cm.EndRun, out).error or "")
