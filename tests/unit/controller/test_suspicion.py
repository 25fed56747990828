"""Each rule of detection, one worker and one clock at a time."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from elastictrain.controller.suspicion import Kind, Limits, Suspicion, Verdict
from elastictrain.signs import Activity, NodeReport, WorkerSign

A = Activity
BEAT_S = 0.1


class Bench:
    """Workers whose signs a test sets; `go` lets time pass with a beat every 0.1 s and collects the verdicts."""

    def __init__(self, workers: int = 2, *, measured: bool = True, generation: int = 1, **options: Any) -> None:
        self.watch = Suspicion(**options)
        self.watch.expect(generation, range(workers), 0.0)
        self.signs = {
            n: WorkerSign(n, 100 + n, 5, "R", 0.0, 0.0, count=1, generation=generation, step=3, activity=A.COMPUTE)
            for n in range(workers)
        }
        self.at_s, self.late_s, self.agent, self.node = 50.0, 0.0, 1, "n"
        self.number = 0
        self.observe()
        if measured:
            for done in (1, 2, 3):
                self.set(*self.signs, steps_done=done, step_s=0.1)
                self.progress()

    def set(self, *workers: int, **fields: Any) -> None:
        for worker in workers:
            self.signs[worker] = replace(self.signs[worker], **fields)

    def observe(self) -> None:
        self.number += 1
        signs = tuple(self.signs.values())
        self.watch.observe(NodeReport(self.node, self.agent, self.number, 0, self.at_s, self.late_s, signs), self.at_s)

    def progress(self, *workers: int) -> None:
        """Everybody (or the named ones) beats, a tenth of a second later."""
        self.at_s += BEAT_S
        for worker in workers or tuple(self.signs):
            self.set(worker, count=self.signs[worker].count + 1, age_s=0.0, in_activity_s=0.0)
        self.observe()

    def go(
        self,
        seconds: float,
        *,
        running: tuple[int, ...] = (),
        held: tuple[int, ...] = (),
        beating: tuple[int, ...] = (),
    ) -> list[tuple[float, Verdict]]:
        """Let time pass. `running` use the processor, `held` wait for it, `beating` get on."""
        found, began_s = [], self.at_s
        while self.at_s < began_s + seconds - 1e-9:
            self.at_s += BEAT_S
            for n, sign in self.signs.items():
                self.set(n, age_s=sign.age_s + BEAT_S, in_activity_s=sign.in_activity_s + BEAT_S)
            for n in running:
                self.set(n, cpu_s=self.signs[n].cpu_s + BEAT_S)
            for n in held:
                self.set(n, held_up_s=(self.signs[n].held_up_s or 0.0) + BEAT_S)
            for n in beating:
                self.set(n, count=self.signs[n].count + 1, age_s=0.0)
            self.observe()
            found += [(self.at_s - began_s, verdict) for verdict in self.watch.verdicts(self.at_s)]
        return found


def kinds(found: list[tuple[float, Verdict]]) -> list[tuple[Kind, int | None]]:
    return [(verdict.kind, verdict.worker) for _, verdict in found]


def test_a_stopped_process_is_named_after_half_a_second_whatever_it_was_doing() -> None:
    for activity in (A.COMPUTE, A.EXCHANGE, A.IDLE, A.STARTING, A.STORE):
        bench = Bench()
        bench.set(0, state="T", activity=activity)
        found = bench.go(3.0, beating=(1,))
        assert kinds(found) == [(Kind.STOPPED, 0)]
        assert 0.4 <= found[0][0] <= 0.6
        assert "stopped by a signal" in found[0][1].reason
    bench.set(1, state="t")
    assert "held by a debugger" in bench.go(1.0)[0][1].reason


def test_a_process_that_is_stopped_for_a_moment_is_not_named() -> None:
    bench = Bench()
    for _ in range(20):
        bench.set(0, state="T")
        assert bench.go(0.4, beating=(1,)) == []
        bench.set(0, state="R")
        assert bench.go(0.1, beating=(0, 1)) == []


def test_one_that_sleeps_in_its_own_work_is_deadlocked_one_that_runs_is_livelocked() -> None:
    bench = Bench()
    bench.set(0, state="S", activity=A.APPLY)
    bench.set(1, activity=A.GATHER, state="S")
    found = bench.go(3.0)
    assert kinds(found) == [(Kind.DEADLOCKED, 0)]
    assert 1.7 <= found[0][0] <= 2.0
    assert found[0][1].reason == (
        "worker 0 in apply of step 3: has slept for 1.7 s without progress, using 0.0 s of processor time; "
        "allowed: 2.0 s"
    )
    assert "median step 0.100 s, deadline 2.0 s" in found[0][1].evidence
    assert found[0][1].last_seen_s == pytest.approx(bench.at_s - 3.0)
    bench = Bench()
    assert kinds(bench.go(3.0, running=(0,), beating=(1,))) == [(Kind.LIVELOCKED, 0)]


def test_the_deadline_is_three_median_steps() -> None:
    bench = Bench(measured=False)
    for done in range(1, 6):
        bench.set(0, 1, steps_done=done, step_s=2.0 if done != 4 else 30.0)
        bench.progress()
    assert bench.watch.deadline_s() == 6.0
    found = bench.go(9.0, beating=(1,))
    assert kinds(found) == [(Kind.DEADLOCKED, 0)]
    assert 5.7 <= found[0][0] <= 6.0


def test_fewer_workers_have_longer_steps_before_any_of_them_is_measured() -> None:
    bench = Bench(4, measured=False)
    for done in range(1, 4):
        bench.set(0, 1, 2, 3, steps_done=done, step_s=1.0)
        bench.progress()
    bench.watch.expect(2, (0,), bench.at_s)
    assert (bench.watch.step_s(), bench.watch.deadline_s()) == (4.0, 12.0)
    bench.watch.expect(2, (), bench.at_s)  # parking: the world that was measured is not another one
    assert bench.watch.step_s() == 4.0
    bench.watch.expect(3, range(8), bench.at_s)
    assert bench.watch.step_s() == 1.0  # shorter steps are believed when they are seen


def test_before_the_first_step_of_a_process_there_is_an_allowance() -> None:
    bench = Bench()
    bench.set(0, steps_done=0)
    bench.progress()
    assert bench.go(590.0, beating=(1,)) == []
    assert kinds(bench.go(12.0, beating=(1,))) == [(Kind.DEADLOCKED, 0)]
    bench = Bench(measured=False)
    assert bench.go(590.0) == []


@pytest.mark.parametrize("activity", [A.STARTING, A.COMPILE])
def test_a_compiler_may_take_its_time(activity: Activity) -> None:
    bench = Bench()
    bench.set(0, activity=activity)
    bench.progress()
    assert bench.go(590.0, running=(0,), beating=(1,)) == []
    assert kinds(bench.go(12.0, running=(0,), beating=(1,))) == [(Kind.LIVELOCKED, 0)]


@pytest.mark.parametrize("activity", [A.EVALUATE, A.STORE, A.FORM])
def test_long_activities_have_ten_times_their_longest(activity: Activity) -> None:
    bench = Bench()
    bench.set(0, activity=activity)
    bench.progress()
    found = bench.go(70.0, beating=(1,))
    assert kinds(found) == [(Kind.DEADLOCKED, 0)]
    assert 59.0 <= found[0][0] <= 60.0
    bench = Bench()
    bench.set(0, activity=activity)
    bench.progress()
    assert bench.go(20.0, beating=(1,)) == []
    bench.set(0, activity=A.COMPUTE)
    bench.progress()
    bench.set(1, activity=activity)  # measured on one worker, it holds for all
    bench.progress()
    found = bench.go(220.0, beating=(0,))
    assert kinds(found) == [(Kind.DEADLOCKED, 1)]
    assert 199.0 <= found[0][0] <= 202.0


def test_remote_data_has_an_allowance_and_local_data_has_not() -> None:
    for remote, expected in ((True, []), (False, [(Kind.DEADLOCKED, 0)])):
        bench = Bench(remote_data=remote)
        bench.set(0, activity=A.DATA, state="S")
        assert kinds(bench.go(50.0, beating=(1,))) == expected


def test_time_without_a_processor_does_not_count() -> None:
    bench = Bench()
    assert bench.go(100.0, held=(0,), beating=(1,)) == []
    found = bench.go(5.0, running=(0,), beating=(1,))
    assert kinds(found) == [(Kind.LIVELOCKED, 0)]
    assert 2.5 <= found[0][0] <= 3.0  # one that was kept waiting gets half as much again


def test_where_the_kernel_counts_no_waits_a_ready_process_is_judged_by_what_it_used() -> None:
    bench = Bench()
    bench.set(0, held_up_s=None)
    bench.progress()
    assert bench.go(100.0, beating=(1,)) == []
    assert kinds(bench.go(5.0, running=(0,), beating=(1,))) == [(Kind.LIVELOCKED, 0)]
    bench = Bench()
    bench.set(0, held_up_s=None, state="S")
    bench.progress()
    assert kinds(bench.go(2.5, beating=(1,))) == [(Kind.DEADLOCKED, 0)]


def test_a_late_agent_takes_its_lateness_off() -> None:
    bench = Bench()
    bench.go(1.0, beating=(1,))
    bench.at_s, bench.late_s = bench.at_s + 30.0, bench.late_s + 29.9
    bench.set(0, state="S", age_s=31.0)
    bench.observe()
    assert bench.watch.verdicts(bench.at_s) == []
    assert bench.go(0.4, beating=(1,)) == []
    bench.at_s += 30.0  # an agent that was in time, but whose beats were lost, has seen the whole of it
    bench.progress(1)
    assert [v.kind for v in bench.watch.verdicts(bench.at_s)] == [Kind.DEADLOCKED]


def test_a_new_agent_knows_nothing_of_the_time_before() -> None:
    bench = Bench()
    bench.go(1.0, beating=(1,))
    bench.agent, bench.at_s, bench.late_s = 2, 9_000.0, 0.0
    bench.set(0, held_up_s=0.0)
    bench.observe()
    assert bench.watch.verdicts(bench.at_s) == []
    found = bench.go(2.0, beating=(1,))
    assert kinds(found) == [(Kind.DEADLOCKED, 0)]
    assert found[0][0] <= 1.0


def test_storage_that_answers_nobody_is_nobodys_fault() -> None:
    bench = Bench(3)
    bench.set(0, 1, activity=A.DATA, state="S")
    bench.set(2, activity=A.EXCHANGE, state="S")
    found = bench.go(20.0)
    assert kinds(found) == [(Kind.STORAGE, None)]
    assert "2 workers at once stand still in data" in found[0][1].reason
    assert bench.go(20.0) == []  # said once
    bench = Bench(3)
    bench.set(0, activity=A.DATA, state="S")
    bench.set(1, 2, activity=A.EXCHANGE, state="S")
    assert kinds(bench.go(20.0)) == [(Kind.DEADLOCKED, 0)]  # one alone is


def test_data_that_spins_is_no_storage() -> None:
    bench = Bench(2)
    bench.set(0, 1, activity=A.DATA)
    assert kinds(bench.go(5.0, running=(0, 1))) == [(Kind.LIVELOCKED, 0), (Kind.LIVELOCKED, 1)]


def test_debug_names_only_the_dead() -> None:
    bench = Bench(3, debug=True)
    bench.set(0, state="T")
    bench.set(1, state="t")
    assert bench.go(100.0) == []
    bench.set(0, 1, 2, activity=A.VOTE, state="S")
    assert bench.go(100.0) == []
    bench.set(2, state="X")
    assert kinds(bench.go(1.0)) == [(Kind.GONE, 2)]


def test_a_worker_that_was_named_and_gets_on_can_be_named_again() -> None:
    bench = Bench()
    assert kinds(bench.go(30.0, beating=(1,))) == [(Kind.DEADLOCKED, 0)]
    bench.progress(0)
    assert kinds(bench.go(30.0, beating=(1,))) == [(Kind.DEADLOCKED, 0)]


def test_a_forgotten_worker_says_nothing_any_more() -> None:
    bench = Bench()
    bench.watch.forget(0)
    bench.set(0, state="T")
    assert bench.go(20.0, beating=(1,)) == []
    bench.set(0, state="X")
    assert bench.go(20.0, beating=(1,)) == []
    assert bench.watch.identity(0) is None


def test_a_worker_without_a_pulse_is_watched_by_its_process_alone() -> None:
    bench = Bench()
    bench.set(0, 1, count=-1)
    bench.progress()
    bench.set(0, 1, count=-1)
    bench.observe()
    assert bench.go(100.0) == []
    bench.set(0, state="T")
    assert kinds(bench.go(1.0)) == [(Kind.STOPPED, 0)]
    bench.set(1, state="X")
    assert kinds(bench.go(1.0)) == [(Kind.GONE, 1)]


def test_where_a_worker_is() -> None:
    bench = Bench()
    assert bench.watch.identity(1) == ("n", 101, 5)
    assert (bench.watch.workers_on("n"), bench.watch.workers_on("m")) == ((0, 1), ())


def test_a_new_controller_measures_at_once_workers_that_have_long_been_stepping() -> None:
    bench = Bench(measured=False)
    bench.set(0, 1, steps_done=70, step_s=2.0)
    bench.watch = Suspicion()
    bench.watch.expect(1, (0, 1), 0.0)
    bench.observe()
    assert bench.watch.deadline_s() == 6.0


def test_limits_can_be_tightened() -> None:
    bench = Bench(limits=Limits(floor_s=0.8, margin_s=0.0))
    found = bench.go(3.0, beating=(1,))
    assert 0.8 <= found[0][0] <= 1.0
