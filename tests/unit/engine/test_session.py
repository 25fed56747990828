"""A session in this process, world 1: what leaves it when apply is torn (R7), and what its control thread promises."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from elastictrain.controller import events as ev
from elastictrain.engine import restoring, session
from elastictrain.engine.collective import Rendezvous, connect
from elastictrain.engine.inquest import convict
from elastictrain.engine.probes import InjectedFault, Probes
from elastictrain.engine.session import Session
from elastictrain.engine.worker_model import build
from elastictrain.errors import CorruptWorker, InternalError
from elastictrain.faults import LoseNode, fail, lose_node
from elastictrain.job import Checkpoint, Copy
from elastictrain.layout import Layout, Shard
from elastictrain.offers import first_split
from elastictrain.protocol import FormPlan, ParkReport, Restore
from tests.unit.engine.worlds import CPU, NetRecipe, Numbers, make_job

TORN = r"^worker 0 has torn its state within apply and can promise nothing \(R7\)$"


class Running:
    """A session whose training thread runs; `said` holds what it emits."""

    def __init__(self, probes: Probes, **settings: Any) -> None:
        job = make_job(NetRecipe(), lanes=2, steps=4, **settings)
        model = build(job, CPU)
        self.said: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.session = Session(
            job, 0, model, Numbers(), device=CPU, host="127.0.0.1", emit=self.said.put, probes=probes
        )
        blocks = len(model.space.blocks)
        layout = Layout(1, (0,), ((0, 1),), (Shard(0, blocks, 0, None),), 2)
        self.plan = FormPlan(1, 0, layout, None, (), None, Restore(0, None), (0,), "")
        self.thread = threading.Thread(target=self.session.run, daemon=True)
        self.thread.start()

    def wait_for(self, kind: type[Any]) -> Any:
        while not isinstance(found := self.said.get(timeout=30), kind):
            assert not isinstance(found, ev.WorkerFailed), found
        return found

    def close(self) -> None:
        self.session.stop()
        self.thread.join(30)


@pytest.fixture
def running(request: pytest.FixtureRequest) -> Iterator[Running]:
    made = Running(request.param)
    yield made
    made.close()


@pytest.mark.parametrize("running", [Probes(0, [])], indirect=True)
def test_offers_reach_the_generation_that_they_are_for(running: Running) -> None:
    session, lanes = running.session, ((0, 1),)
    session.offer_lanes(0, 1, lanes)  # before there is one
    running.session.form(running.plan)
    running.wait_for(ev.Sealed)
    session.offer_lanes(2, 1, lanes)
    assert session.newest_split == first_split(running.plan.layout), "nothing was taken"
    session.offer_lanes(1, 3, lanes, 4)
    assert (session.newest_split.epoch, session.newest_split.number) == (4, 3)
    session.park(1)
    again = replace(running.plan, generation=2, layout=replace(running.plan.layout, generation=2))
    running.session.form(again)
    assert running.wait_for(ev.Sealed).generation == 2
    assert session.newest_split == first_split(again.layout), "another generation begins with its own"


def test_who_leaves_a_generation_copies_no_more(tmp_path: Path) -> None:
    """One that was fenced hears of no later seal."""
    checkpoint = Checkpoint(path=str(tmp_path / "near"), copy_to=[Copy(path=str(tmp_path / "far"))])
    running = Running(Probes(0, []), checkpoint=checkpoint)
    saver = running.session.saver
    assert saver is not None
    [follower] = saver.copies._followers.values()
    saver.copies.serve()
    assert follower._over is not None
    running.session._leave(0)
    assert follower._over is None
    running.close()


class TornWhileParking(Probes):
    """The order to park comes while apply runs, so before what is torn can be told."""

    session: Session

    def at(self, step: int, phase: str) -> None:
        if phase == "apply":
            self.session._latched = 1  # what `park` does as soon as apply lets go of the lock
            raise InjectedFault("torn while it is told to park")


@pytest.mark.parametrize("running", [Probes(0, [fail(0, 2, "apply")])], indirect=True)
def test_a_torn_apply_leaves_as_torn_and_parking_promises_nothing(running: Running) -> None:
    running.session.form(running.plan)
    failed = running.wait_for(ev.WorkerFailed)
    assert (failed.generation, failed.worker, failed.kind) == (1, 0, "torn")
    assert "injected: fail worker 0 at step 2 in apply" in failed.error
    assert running.session.committed.step == 1, "the step has not happened"
    with pytest.raises(InternalError, match=TORN):
        running.session.park(1)
    with pytest.raises(InternalError, match=TORN):
        running.session.park(2)


@pytest.mark.parametrize("running", [TornWhileParking(0, ())], indirect=True)
def test_a_torn_apply_is_told_although_the_generation_is_over(running: Running) -> None:
    """Else the controller would wait for a report that never comes."""
    running.session.probes.session = running.session  # type: ignore[attr-defined]
    running.session.form(running.plan)
    failed = running.wait_for(ev.WorkerFailed)
    assert failed.kind == "torn"
    with pytest.raises(InternalError, match=TORN):
        running.session.park(1)


def test_a_node_is_lost_by_whoever_knows_what_a_node_is() -> None:
    script = [lose_node(0, 3, "vote", how="kill"), lose_node(1, 3, "vote")]
    lost: list[LoseNode] = []
    probes = Probes(0, script, lost.append)
    for step, phase in ((2, "vote"), (3, "exchange"), (3, "vote"), (3, "vote")):
        probes.at(step, phase)
    assert lost == script[:1], "at its address, once, its own"
    with pytest.raises(InjectedFault, match=r"only workers on Ray have a node that can be lost; use kill or freeze"):
        Probes(0, script).at(3, "vote")


@pytest.mark.parametrize("running", [Probes(0, [fail(0, 2, "vote")])], indirect=True)
def test_an_exception_before_apply_is_the_users_and_parking_promises_what_is_there(running: Running) -> None:
    running.session.form(running.plan)
    assert running.wait_for(ev.WorkerFailed).kind == "user"
    report = running.session.park(1)
    assert (report.applied_step, report.sealed_generation, report.holds_next) == (1, 1, True)


def test_parking_waits_for_no_restore(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Reading and waiting for peers happen without the lock: a survivor of a forming reports at once."""
    reading, go_on = threading.Event(), threading.Event()

    def stuck(*_: Any) -> None:
        reading.set()
        assert go_on.wait(60)
        raise OSError("the storage is gone")

    monkeypatch.setattr(restoring, "open_together", stuck)
    made = Running(Probes(0, ()), checkpoint={"path": str(tmp_path)})
    made.session.form(replace(made.plan, step=3, restore=Restore(3, "step-00000003")))
    assert reading.wait(60)
    reports: queue.SimpleQueue[ParkReport] = queue.SimpleQueue()
    threading.Thread(target=lambda: reports.put(made.session.park(1)), daemon=True).start()
    try:
        report = reports.get(timeout=10)
    finally:
        go_on.set()
    assert (report.sealed_generation, report.applied_step) == (0, 0)
    made.close()
    assert made.said.empty(), "what broke, broke because the generation was being taken down"


def test_a_question_to_a_store_that_does_not_answer_ends_with_the_generation() -> None:
    """Where lanes are shared, a step asks the first member's store, which may be frozen, or on a node that is gone."""
    running, rendezvous = Running(Probes(0, [])), Rendezvous()
    session = running.session
    store = connect(rendezvous.address)
    try:
        session._store, session._store_address, session._asked = store, rendezvous.address, rendezvous.address
        assert store.compare_set("a", "", "b") == b"b"
        session.park(0)
        with pytest.raises(RuntimeError):
            store.compare_set("a", "b", "c")
        assert session._store_address == "", "the next generation connects anew"
        session.park(0)
    finally:
        running.close()


@pytest.mark.parametrize("running", [Probes(0, [])], indirect=True)
def test_a_connection_that_park_has_cut_is_not_cut_again(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """A watch that finds its question late just then would cut the next generation's connection."""
    cut: list[str] = []
    here = running.session
    monkeypatch.setattr(session, "hang_up", cut.append)
    with here.apply_lock:
        here._asked = "host:1"
        late = threading.Thread(target=here._hang_up)
        late.start()
        late.join(0.2)
        assert cut == []
        assert here._stop_asking() == "host:1"  # as `park` does
    late.join(30)
    assert cut == []


def test_who_is_corrupt_has_said_so_when_it_can_promise_nothing() -> None:
    """Asked to park in between, it would be ended for that, and nobody would hear who was wrong."""
    found: list[tuple[int, str, bool]] = []

    def emit(said: ev.WorkerFailed) -> None:
        found.append((said.worker, one.corrupt, one.apply_lock.locked()))

    one = SimpleNamespace(
        worker=2, generation=3, corrupt="", doubt=None, apply_lock=threading.Lock(), check=lambda: None, emit=emit
    )
    with pytest.raises(CorruptWorker, match="its sums differ"):
        convict(one, {1: "another", 2: "its sums differ"}, None)  # type: ignore[arg-type]
    assert found == [(1, "", True), (2, "", True)]
    assert one.corrupt == "its sums differ"
