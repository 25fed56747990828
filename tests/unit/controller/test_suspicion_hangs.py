"""Detection where workers wait for each other: victims are not blamed, and a hung collective is nobody's at first."""

from __future__ import annotations

from elastictrain.controller.suspicion import Kind, Verdict
from tests.unit.controller.test_suspicion import A, Bench, kinds


def test_a_waiting_worker_is_never_named_while_another_one_works_or_is_not_seen() -> None:
    bench = Bench(3)
    bench.set(1, 2, activity=A.EXCHANGE, state="S")
    assert bench.go(60.0, running=(0,), beating=(0,)) == []
    bench.set(0, activity=A.EVALUATE)
    assert bench.go(50.0, running=(0,)) == []  # has its allowance
    bench = Bench(3)
    bench.set(0, 1, 2, activity=A.EXCHANGE, state="S")
    bench.progress()
    del bench.signs[2]  # its node is silent: that is for others to judge
    assert bench.go(60.0) == []


def test_all_waiting_is_a_hung_collective_named_once() -> None:
    bench = Bench(3)
    bench.set(0, 1, 2, activity=A.GATHER, state="S")
    found = bench.go(10.0)
    assert kinds(found) == [(Kind.HUNG_COLLECTIVE, None)]
    assert 1.6 <= found[0][0] <= 2.0
    assert found[0][1].generation == 1
    assert "0 in gather of step 3, 1 in gather of step 3, 2 in gather of step 3" in found[0][1].reason
    assert len(found[0][1].evidence) == 4


def test_one_that_left_the_generation_does_not_hide_that_the_others_hang() -> None:
    bench = Bench(3)
    bench.set(0, activity=A.IDLE)
    bench.set(1, 2, activity=A.EXCHANGE)
    assert kinds(bench.go(3.0)) == [(Kind.HUNG_COLLECTIVE, None)]
    bench = Bench(3)
    bench.set(0, 1, 2, activity=A.IDLE)
    assert bench.go(100.0) == []  # between generations


def hang(bench: Bench, behind: int | None, generation: int, step: int) -> list[tuple[float, Verdict]]:
    bench.watch.expect(generation, tuple(bench.signs), bench.at_s)
    bench.set(*bench.signs, generation=generation, step=step, activity=A.VOTE)
    if behind is not None:
        bench.set(behind, activity=A.EXCHANGE)
    bench.progress()
    return bench.go(10.0)


def test_the_second_hang_in_a_row_names_who_was_behind() -> None:
    bench = Bench(3)
    assert kinds(hang(bench, 2, 2, 4)) == [(Kind.HUNG_COLLECTIVE, None)]
    found = hang(bench, 2, 3, 4)
    assert kinds(found) == [(Kind.HUNG_COLLECTIVE, 2)]
    assert "for the 2. time in a row, and worker 2 was most often behind" in found[0][1].reason
    assert 3.0 <= found[0][0] <= 4.0  # and it was given twice the time


def test_hangs_are_in_a_row_only_without_a_step_between() -> None:
    bench = Bench(3)
    hang(bench, 2, 2, 4)
    bench.watch.expect(3, (0, 1, 2), bench.at_s)
    bench.set(0, 1, 2, generation=3, step=5, activity=A.COMPUTE)
    bench.progress()
    bench.go(0.5, beating=(0, 1, 2))
    assert kinds(hang(bench, 2, 4, 5)) == [(Kind.HUNG_COLLECTIVE, None)]


def test_nobody_is_named_when_nobody_is_behind_or_it_changes() -> None:
    bench = Bench(3)
    hang(bench, None, 2, 4)
    assert kinds(hang(bench, None, 3, 4)) == [(Kind.HUNG_COLLECTIVE, None)]
    bench = Bench(3)
    hang(bench, 1, 2, 4)
    assert kinds(hang(bench, 2, 3, 4)) == [(Kind.HUNG_COLLECTIVE, None)]


def test_peers_of_a_named_worker_do_not_hang() -> None:
    bench = Bench(3)
    bench.set(0, state="T", activity=A.EXCHANGE)
    bench.set(1, 2, activity=A.EXCHANGE, state="S")
    assert kinds(bench.go(20.0)) == [(Kind.STOPPED, 0)]


def test_the_peers_of_a_dead_worker_wait_in_vain_and_are_not_blamed() -> None:
    bench = Bench(3)
    bench.set(1, 2, activity=A.EXCHANGE, state="S")
    bench.set(0, state="X")
    found = bench.go(20.0)
    assert kinds(found) == [(Kind.GONE, 0)]
    assert found[0][0] <= 0.2
    assert found[0][1].reason == "worker 0: its process 100 is gone, says the agent of its node"
    bench.watch.expect(2, (), bench.at_s)
    assert bench.go(20.0) == []


def test_a_worker_stuck_in_an_old_generation_is_named_when_the_new_one_waits_for_it() -> None:
    bench = Bench(2)
    bench.set(0, 1, activity=A.EXCHANGE, state="S")
    bench.go(1.0)
    bench.watch.expect(1, (), bench.at_s)  # parked; worker 0 does not come out of its exchange
    bench.set(1, activity=A.IDLE)
    assert bench.go(1.0) == []
    bench.watch.expect(2, (0, 1), bench.at_s)
    bench.set(1, generation=2, activity=A.MEET)
    bench.progress(1)
    found = bench.go(5.0)
    assert kinds(found) == [(Kind.DEADLOCKED, 0)]
    assert found[0][0] >= 1.9  # it had the whole time for coming


def test_one_that_has_not_heard_of_the_new_generation_is_not_named() -> None:
    bench = Bench(2)
    bench.set(0, 1, activity=A.IDLE)
    bench.progress()
    bench.watch.expect(2, (0, 1), bench.at_s)
    bench.set(1, generation=2, activity=A.MEET)
    bench.progress(1)
    assert bench.go(30.0) == []
