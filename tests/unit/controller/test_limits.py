"""Failure budgets, nodes that are set aside, and what an incident's record says."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastictrain.controller import FailureBudget, Phase, view
from elastictrain.controller import commands as cm
from elastictrain.controller import events as ev
from elastictrain.controller.budgets import Loss, Round, common_lanes, error_line, verdict
from elastictrain.controller.nodes import Nodes, count_failure, keep_only, should_set_aside, take_back, to_avoid
from elastictrain.errors import ConfigError
from tests.unit.controller.scene import Scene, announced, every, only

BUDGET = FailureBudget()


def died(worker: int, *lanes: int, kind: str = "died", cause: str = "SIGKILL") -> Round:
    return Round(worker, (Loss(worker, kind, cause, lanes),))


def test_three_rounds_that_share_a_lane_are_the_jobs_error() -> None:
    rounds = [died(1, 2, 3), died(4, 3, 4), died(5, 3)]
    assert verdict(BUDGET, rounds[:2], 7, "r") is None
    assert verdict(BUDGET, rounds, 7, "the job can be resumed from step 5 (c5)") == (
        "RecipeError: step 8 cannot be committed: it has failed 3 times in a row, each time on fresh workers: "
        "worker 1 (SIGKILL); worker 4 (SIGKILL); worker 5 (SIGKILL). Whoever computes lane 3 of this step is lost, so "
        "another try would fail in the same way. The usual cause is that a worker runs out of memory: lower "
        "lane_batch_size (and raise lanes to keep the batch), raise workers.cpus so that fewer workers share a node, "
        "or give them nodes with more memory. Otherwise look at what the recipe does at this step: a crash in native "
        "code, a loop that never ends; the job can be resumed from step 5 (c5)"
    )


def test_different_lanes_are_bad_luck_until_the_step_has_cost_eight_rounds() -> None:
    rounds = [died(n, n) for n in range(8)]
    assert verdict(BUDGET, rounds[:7], 7, "r") is None
    assert "No other step was committed in between" in (verdict(BUDGET, rounds, 7, "r") or "")


def test_deaths_while_forming_have_no_lane() -> None:
    rounds = [died(1, 3), died(2), died(3), died(4, 3)]
    assert verdict(BUDGET, rounds, 7, "r") is None
    assert verdict(BUDGET, [*rounds, died(5, 3, 4)], 7, "r") is not None


@given(st.lists(st.lists(st.sets(st.integers(0, 5), max_size=3), max_size=3), max_size=5))
def test_common_lanes_are_those_of_every_round(rounds: list[list[set[int]]]) -> None:
    made = [Round(n, tuple(Loss(w, "died", "x", tuple(s)) for w, s in enumerate(one))) for n, one in enumerate(rounds)]
    expected = {lane for lane in range(6) if rounds and all(any(lane in s for s in one) for one in rounds)}
    assert common_lanes(made) == expected


def test_two_torn_applies_with_the_same_error_are_the_jobs_error() -> None:
    text = "Traceback ...\nRuntimeError: tried 20.5 MiB at 0x7f3a, worker {}"
    first = Round(1, tuple(Loss(w, "torn", text.format(w), (w,)) for w in (0, 1)))
    second = Round(2, (Loss(2, "torn", text.format(2), (0,)),))
    other = Round(2, (Loss(2, "torn", "Traceback ...\nValueError: another", (0,)),))
    assert verdict(BUDGET, [first, other], 7, "r") is None
    words = verdict(BUDGET, [first, second], 7, "r") or ""
    assert words.startswith("RecipeError: step 8 could be computed but not applied: the update failed with the same")
    assert "2 times, on workers 0, 1 and then on worker 2." in words
    assert words.endswith("The error of worker 2:\n" + text.format(2))


def test_errors_are_compared_without_their_numbers() -> None:
    assert error_line("a\nb\nOOM: 12.5 of 80 at 0xff\n\n") == error_line("x\nOOM: 13 of 81.0 at 0x1")
    assert error_line("OOM") != error_line("NaN")
    assert error_line("") == ""


@pytest.mark.parametrize("wrong", [{"same_lane": 0}, {"node_share": 1.0}, {"per_hour_per_worker": -1.0}])
def test_a_budget_that_makes_no_sense_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=r"^a failure budget needs counts of at least 1"):
        FailureBudget(**wrong)  # type: ignore[arg-type]


NODE = st.sampled_from("abcdefg")


@given(st.lists(st.tuples(NODE, st.floats(0.0, 9000.0)), max_size=60), st.sets(NODE, max_size=7))
def test_never_more_than_a_third_of_the_nodes_is_set_aside(failures: list[tuple[str, float]], known: set[str]) -> None:
    """Against a plain recount of the last hour."""
    nodes: Nodes = {}
    keep_only(nodes, known, 0.0)
    failures.sort(key=lambda item: item[1])
    for index, (node, now_s) in enumerate(failures):
        count_failure(nodes, node, now_s, "died")
        recent = sum(other == node and now_s - 3600.0 < at_s for other, at_s in failures[: index + 1])
        aside = [n for n, facts in nodes.items() if facts.aside_until_s is not None]
        expected = recent >= 3 and node not in aside and len(aside) + 1 <= len(nodes) // 3
        assert should_set_aside(BUDGET, nodes, node) == expected
        if expected:
            nodes[node].aside_until_s = now_s + 100.0
    assert len(to_avoid(nodes)) < len(nodes) or not nodes
    back = take_back(nodes, 1e6)
    assert to_avoid(nodes) == ()
    assert all(not nodes[node].failures for node in back)


def test_a_node_is_set_aside_avoided_shown_and_taken_back() -> None:
    scene = Scene(initial_workers=3, max_workers=3, spares=1)
    scene.send(ev.ClusterChanged(0.0, ("node0", "node1", "node2", "node3"), "4 nodes"))
    scene.ready(0, 1, 2)
    scene.seal()
    for worker, now_s in ((3, 1.0), (4, 2.0)):
        out = scene.send(ev.WorkerStartFailed(now_s, worker, "no CUDA", False, node="node3"))
        assert {start.avoid for start in every(cm.StartWorker, out)} == {()}
    out = scene.send(ev.WorkerDied(3.0, 5, "its process ended", node="node3"))
    assert announced(out, "node_set_aside") == {"node": "node3", "failures": ["start"] * 3, "after_s": 4 * 3600.0}
    assert view(scene.machine)["nodes_set_aside"] == {"node3": ["start"] * 3}
    out = scene.send(ev.AddRequested(4.0))
    assert {start.avoid for start in every(cm.StartWorker, out)} <= {("node3",)}
    scene.send(ev.Tick(70.0))
    out = scene.send(ev.Tick(3.0 + 4 * 3600.0))
    assert announced(out, "node_taken_back") == {"node": "node3"}
    assert view(scene.machine)["nodes_set_aside"] == {}


def test_formings_that_never_end_are_limited() -> None:
    scene = Scene()
    scene.ready(0, 1, 2)
    for attempt in range(BUDGET.formings):
        assert scene.machine.phase is Phase.FORMING, attempt
        deadline_s = scene.machine.next_deadline_s()
        assert deadline_s is not None
        scene.now_s = deadline_s
        out = scene.send(ev.Tick(deadline_s))
        if scene.machine.phase is Phase.PARKING:
            scene.park(0, 1, 2, applied=0, sealed_generation=0)
    error = only(cm.EndRun, out).error or ""
    assert error.startswith(
        "ClusterError: generation 6, and 5 before it, could not be formed: forming took longer than"
    )


def test_a_corrupt_worker_is_killed_and_counts_against_its_node() -> None:
    scene = Scene(replace=False).run()
    out = scene.send(ev.WorkerFailed(1.0, 1, 1, "corrupt", "block 3: digest differs at step 7"))
    assert only(cm.Kill, out) == cm.Kill(1, "corrupt: block 3: digest differs at step 7")
    assert scene.ledger.failures == {"corrupt": [1.0]}
    assert [what for _, what in scene.ledger.nodes["node1"].failures] == ["corrupt"]


def test_the_record_of_an_incident() -> None:
    scene = Scene(spares=1, bytes_per_held_element=12.0).run()
    scene.send(ev.Progress(5.0, 1, 6))
    scene.send(ev.WorkerFrozen(10.0, 1, "no step for 3 s", ("it sleeps in its own code",), last_seen_s=7.0))
    scene.send(ev.WorkerTroubled(10.1, 1, 0, "worker 1 hung up"))
    scene.now_s = 10.2
    scene.park(0, 2, applied=7)
    scene.send(ev.WorkerDied(10.5, 1, "SIGKILL"))
    assert scene.plan.joiners == (3,)
    scene.now_s = 11.0
    recovery = announced(scene.seal(), "recovery")
    assert recovery["seconds"] == 1.0
    record = announced(scene.send(ev.Progress(12.5, 2, 8)), "incident")
    assert json.loads(json.dumps(record)) == record
    assert record["seen"] == [
        {"at_s": 10.0, "source": "watch", "what": "worker 1 is frozen: no step for 3 s"},
        {"at_s": 10.1, "source": "worker 0", "what": "lost a peer: worker 1 hung up"},
        {"at_s": 10.5, "source": "node1", "what": "worker 1 is gone: SIGKILL"},
    ]
    assert record["blamed"] == [
        {
            "worker": 1, "node": "node1", "why": "frozen: no step for 3 s",
            "evidence": ["it sleeps in its own code"], "gone_s": 10.5,
        }
    ]  # fmt: skip
    assert record["decided"] == ["spare"]
    assert record["seconds"] == {
        "detect": 3.0, "fence": 0.5, "park": 0.5, "wait": 0.0, "form": 0.5, "first_commit": 1.5, "total": 2.5,
    }  # fmt: skip
    assert (record["steps_redone"], record["lane_batches_redone"]) == (1, 8)
    assert record["blocks_moved"] > 0
    assert record["bytes_moved"] == record["blocks_moved"] * 10 * 12
    assert (record["number"], record["outcome"], record["generations"]) == (1, "recovered", [2])
    assert view(scene.machine)["incidents"] == [record]


def test_an_incident_that_ends_otherwise_is_recorded_too() -> None:
    scene = Scene(spares=1).run()
    scene.die(1)
    scene.park(0, 2, applied=7)
    scene.seal()
    record = announced(scene.die(0), "incident")  # before the first commit
    assert (record["outcome"], record["seconds"]["first_commit"]) == ("overtaken", None)
    out = scene.send(ev.WorkerFailed(1.0, 2, 2, "user", "ValueError: x"))
    record = announced(out, "incident")
    assert (record["number"], record["outcome"]) == (2, "failed")


def test_of_a_thousand_witnesses_only_some_are_listed() -> None:
    scene = Scene(initial_workers=40, max_workers=40, lane_count=40, block_elements=(1,) * 40).run()
    scene.die(0)
    for worker in range(1, 40):
        scene.send(ev.WorkerTroubled(1.0, 1, worker, "peer lost"))
    assert len(scene.ledger.incident.sightings) == 24
    assert scene.ledger.incident.unlisted == 39 + 1 - 24
