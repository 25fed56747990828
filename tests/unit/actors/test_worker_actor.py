"""The worker's actor without Ray: whom it obeys, and what it keeps for the next controller."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from elastictrain.controller import events as ev
from elastictrain.errors import ClusterError
from elastictrain.protocol import ParkReport
from elastictrain_actors import worker_actor
from elastictrain_actors.worker_actor import LEFT_OVER, WorkerActor, worker_name, worker_number, yielding

REPORT = ParkReport(3, 5, 10, 5, True)


class Host:
    def __init__(self) -> None:
        self.asked: list[Any] = []

    def form(self, plan: Any) -> None:
        self.asked.append(plan)

    def park(self, generation: int) -> ParkReport:
        self.asked.append(generation)
        return REPORT

    def ask_pause(self, generation: int, store: bool) -> None:
        self.asked.append((generation, store))


@pytest.fixture
def sigterm(monkeypatch: pytest.MonkeyPatch) -> list[Callable[[], object]]:
    """Who wants to know of SIGTERM."""
    listeners: list[Callable[[], object]] = []
    monkeypatch.setattr(worker_actor, "on_sigterm", listeners.append)
    return listeners


@pytest.fixture
def actor(sigterm: list[Callable[[], object]]) -> Iterator[WorkerActor]:
    made = WorkerActor(3, "token")
    made._host = Host()  # type: ignore[assignment]
    yield made
    made._unwanted.cancel()  # it would end these tests


def test_orders_of_a_controller_that_was_replaced_are_refused(actor: WorkerActor) -> None:
    plan: Any = "plan of controller 2"
    actor.form(2, plan)
    old: Any = "plan of controller 1"
    for order in (
        lambda: actor.form(1, old),
        lambda: actor.park(1, 5),
        lambda: actor.ask_pause(1, 5, False),
        lambda: actor.next_messages(1, 0, 0.0),
        lambda: actor.retire(1),
        lambda: actor.prepare(1, old, (), ()),
    ):
        with pytest.raises(ClusterError, match="controller 1 has been replaced by controller 2"):
            order()
    assert actor.host.asked == [plan]  # type: ignore[attr-defined]
    actor.ask_pause(3, 5, True)
    assert actor.host.asked[1:] == [(5, True)]  # type: ignore[attr-defined]


def test_a_park_report_waits_for_whoever_asks_next(actor: WorkerActor) -> None:
    """The controller that has asked may be dead when the answer is there."""
    actor.park(1, 5)
    assert actor.next_messages(2, 0, 0.0) == (1, [ev.WorkerParked(0.0, 5, REPORT)])
    assert actor.next_messages(2, 1, 0.0) == (1, [])


def test_sigterm_is_a_notice(actor: WorkerActor, sigterm: list[Callable[[], object]]) -> None:
    (told,) = sigterm
    told()
    assert actor.next_messages(1, 0, 0.0) == (1, [ev.PreemptionNotice(0.0, 0.0, 3, reason="SIGTERM")])


def test_a_second_order_to_prepare_changes_nothing(actor: WorkerActor) -> None:
    host = actor.host
    job: Any = "another job"
    actor.prepare(1, job, (), ())
    assert actor.host is host


def test_names_of_workers_and_of_others() -> None:
    assert worker_number(worker_name(12)) == 12
    assert [worker_number(name) for name in ("agent-ab-1", "controller", "worker-x", "worker-")] == [None] * 4


def test_what_yields_does_so_in_a_thread_of_its_own() -> None:
    found: list[int] = []
    yielding(lambda: found.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id())))
    assert found == [LEFT_OVER]
    assert os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) < LEFT_OVER


def test_an_error_of_what_yields_is_raised() -> None:
    def fails() -> None:
        raise ImportError("no such module")

    with pytest.raises(ImportError, match="no such module"):
        yielding(fails)


@pytest.mark.parametrize("gently", [False, True])
def test_only_who_is_not_waited_for_imports_gently(
    gently: bool, sigterm: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[Any] = []
    monkeypatch.setattr(worker_actor, "yielding", done.append)
    monkeypatch.setattr(worker_actor.ray.util, "get_node_ip_address", lambda: 1 / 0)
    WorkerActor(3, "token").prepare(1, {}, (), (), gently)  # type: ignore[arg-type]
    assert done == ([worker_actor.import_engine] if gently else [])


def test_a_worker_that_nobody_gives_an_order_ends_itself(
    sigterm: list[Callable[[], object]], monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = threading.Event()
    monkeypatch.setattr(worker_actor.os, "_exit", lambda code: ended.set())
    forgotten = WorkerActor(3, "token", unwanted_s=0.001)
    assert ended.wait(20.0)
    assert forgotten._host is None


def test_an_order_is_enough_to_stay(actor: WorkerActor) -> None:
    assert not actor._unwanted.finished.is_set()
    actor.next_messages(1, 0, 0.0)
    assert actor._unwanted.finished.is_set(), "cancelled"
