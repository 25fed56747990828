"""The controller's ear on the loopback, with datagrams made by hand; and what the watchman makes of it."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from elastictrain.controller import commands as cmd
from elastictrain.controller import events as ev
from elastictrain.controller.suspicion import Suspicion
from elastictrain.errors import ClusterError
from elastictrain.signs import Activity, NodeReport, WorkerSign
from elastictrain_actors import watchman as watchman_module
from elastictrain_actors.beats import Codec
from elastictrain_actors.heartbeats import Heartbeats
from elastictrain_actors.watchman import Watchman


class Node:
    """Sends reports by hand and reads the answers."""

    def __init__(self, ear: Heartbeats, name: str, agent: int = 1, token: str = "t") -> None:
        self.name, self.agent, self.codec = name, agent, Codec(token)
        self.socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.socket.connect(("127.0.0.1", ear.port))
        self.socket.settimeout(10)
        self.number, self.echo = 0, 0

    def send(self, *workers: WorkerSign, going_s: float | None = None) -> None:
        self.number += 1
        left = (going_s, "" if going_s is None else "EC2 spot: terminate")
        report = NodeReport(self.name, self.agent, self.number, self.echo, self.number / 10, 0.0, workers, *left)
        self.socket.send(self.codec.encode_report(report))

    def hear(self) -> tuple[int, str, int, int]:
        answer = self.codec.decode_answer(self.socket.recv(2048))
        assert answer is not None
        self.echo = answer[3]
        return answer

    def trip(self, *workers: WorkerSign) -> None:
        self.send(*workers)
        self.hear()


@pytest.fixture
def ear() -> Iterator[Heartbeats]:
    one = Heartbeats("127.0.0.1", "t", 7, limit_s=0.5)
    yield one
    one.close()


def until(condition: Callable[[], bool], limit_s: float = 10.0) -> float:
    """Seconds until it holds."""
    pause, began_s = threading.Event(), time.monotonic()
    while not condition():
        assert time.monotonic() - began_s < limit_s, "it did not happen"
        pause.wait(0.005)
    return time.monotonic() - began_s


def test_every_beat_is_answered_and_the_newest_is_handed_out_once(ear: Heartbeats) -> None:
    ear.expect("a", 1)
    ear.expect("b", 1)
    a, b = Node(ear, "a"), Node(ear, "b")
    for _ in range(3):
        a.send()
        assert a.hear() == (7, "a", 1, a.number)
    b.trip()
    assert [(report.node, report.number) for report in ear.poll()] == [("a", 3), ("b", 1)]
    assert ear.poll() == []
    a.socket.close()
    b.socket.close()


def test_a_node_that_falls_silent_is_told_and_comes_back(ear: Heartbeats) -> None:
    ear.expect("a", 1)
    node = Node(ear, "a")
    node.trip()
    assert list(ear.unheard()) == ["a"]
    node.trip()
    assert (ear.unheard(), ear.silent()) == ({}, {})
    took_s = until(lambda: "a" in ear.silent())
    assert 0.3 < took_s < 1.5
    node.trip()
    node.trip()
    until(lambda: ear.silent() == {})
    ear.forget("a")
    node.send()
    node.socket.settimeout(0.2)
    with pytest.raises(TimeoutError):
        node.hear()  # a node that is watched no more gets no answer
    node.socket.close()


def test_beats_without_our_echo_do_not_keep_a_node(ear: Heartbeats) -> None:
    ear.expect("a", 1)
    node = Node(ear, "a")
    node.trip()
    node.trip()
    pause = threading.Event()

    def sends_but_hears_nothing() -> bool:
        node.send()
        pause.wait(0.02)
        return "a" in ear.silent()

    assert until(sends_but_hears_nothing) < 1.5
    assert ear.poll() != []
    node.socket.close()


def test_noise_foreign_runs_and_unknown_nodes_get_no_answer(ear: Heartbeats) -> None:
    ear.expect("a", 2)
    strangers = [Node(ear, "a", 2, token="other"), Node(ear, "nobody"), Node(ear, "a", 1)]
    for stranger in strangers:
        stranger.socket.send(b"")
        stranger.socket.send(b"\0" * 1000)
        stranger.send()
    good = Node(ear, "a", 2)
    good.trip()  # answered after all of those
    for stranger in strangers:
        stranger.socket.settimeout(0.05)
        with pytest.raises(TimeoutError):
            stranger.hear()
        stranger.socket.close()
    assert [report.agent for report in ear.poll()] == [2]
    good.socket.close()


def test_an_agent_whose_port_has_closed_does_not_stop_the_ear(ear: Heartbeats) -> None:
    ear.expect("a", 1)
    ear.expect("b", 1)
    for _ in range(20):
        short = Node(ear, "a")
        short.send()
        short.socket.close()
    node = Node(ear, "b")
    node.trip()
    node.socket.close()


def test_a_call_that_was_answered_vouches_for_a_node(ear: Heartbeats) -> None:
    ear.expect("a", 1)
    node = Node(ear, "a")
    node.trip()
    node.trip()
    began_s, pause = time.monotonic(), threading.Event()
    while time.monotonic() < began_s + 1.0:
        ear.vouch("a", ear.now_s())
        pause.wait(0.02)
        assert ear.silent() == {}
    until(lambda: "a" in ear.silent())
    node.socket.close()


def test_an_address_that_is_not_ours_is_an_error_that_names_it() -> None:
    with pytest.raises(ClusterError, match=r"no UDP port can be opened on this node's address 203\.0\.113\.7"):
        Heartbeats("203.0.113.7", "t", 1)


# --- the watchman ---


def sign(worker: int, **fields: object) -> WorkerSign:
    base: dict[str, object] = {"count": 5, "generation": 1, "step": 3, "activity": Activity.COMPUTE, "steps_done": 2}
    base |= {"step_s": 0.1} | fields
    state = str(base.pop("state", "R"))
    return WorkerSign(worker, 100 + worker, 9, state, 0.0, 0.0, **base)  # type: ignore[arg-type]


def events(watchman: Watchman, node: Node, *workers: WorkerSign, want: int = 1) -> list[object]:
    found: list[object] = []

    def one_turn() -> bool:
        node.trip(*workers)
        found.extend(watchman.look())
        return len(found) >= want

    until(one_turn)
    return found


def test_verdicts_become_the_machines_events(ear: Heartbeats) -> None:
    watchman = Watchman(ear, Suspicion())
    watchman.agent_started("a", 1)
    watchman.formed(1, (0, 1, 2))
    node = Node(ear, "a")
    (frozen,) = events(watchman, node, sign(0, state="T"), sign(1), sign(2))
    assert isinstance(frozen, ev.WorkerFrozen)
    assert (frozen.worker, "stopped by a signal" in frozen.reason, len(frozen.evidence)) == (0, True, 2)
    assert frozen.last_seen_s is not None
    assert frozen.last_seen_s < time.monotonic()
    watchman.worker_gone(0)
    died = events(watchman, node, sign(0, state="X"), sign(1, state="X"), sign(2))
    assert died == [ev.WorkerDied(0.0, 1, "its process is gone, says the agent of its node")]
    watchman.formed(2, (2, 3))
    waiting = [sign(n, state="S", activity=Activity.VOTE, generation=2) for n in (2, 3)]
    (hung,) = events(watchman, node, *waiting)
    assert isinstance(hung, ev.GenerationHung)
    assert (hung.generation, hung.suspect) == (2, None)
    watchman.parking(2)
    watchman.formed(3, (2, 3))
    reading = [sign(n, state="S", activity=Activity.DATA, generation=3, count=9) for n in (2, 3)]
    (stalled,) = events(watchman, node, *reading)
    assert isinstance(stalled, cmd.Announce)
    assert stalled.kind == "storage_stalled"
    node.socket.close()


def test_a_lost_node_is_one_event_with_its_workers(ear: Heartbeats) -> None:
    watchman = Watchman(ear, Suspicion())
    watchman.agent_started("a", 1)
    watchman.formed(1, (0, 1))
    node = Node(ear, "a")
    node.trip(sign(0), sign(1))
    node.trip(sign(0), sign(1))
    found: list[object] = []

    def look() -> bool:
        found.extend(watchman.look())
        return bool(found)

    until(look)
    (lost,) = found
    assert isinstance(lost, ev.NodeLost)
    assert (lost.node, lost.workers) == ("a", (0, 1))
    assert lost.last_seen_s is not None
    assert 0.4 < time.monotonic() - lost.last_seen_s < 2.0
    assert lost.reason.startswith("no round trip of heartbeats for 0.")
    pause = threading.Event()
    for _ in range(10):  # it comes back: nobody listens
        node.send(sign(0, state="T"), sign(1))
        pause.wait(0.05)
        assert watchman.look() == []
    node.socket.close()


def test_a_machine_that_goes_is_told_once(ear: Heartbeats) -> None:
    watchman = Watchman(ear, Suspicion(), lambda: 1000.0)
    watchman.agent_started("a", 1)
    node = Node(ear, "a")
    told: list[object] = []
    for going_s in (None, 110.0, 109.9):
        node.send(going_s=going_s)
        node.hear()
        told += watchman.look()
    assert told == [ev.PreemptionNotice(0.0, 1110.0, None, "a", "EC2 spot: terminate")]
    node.socket.close()


def test_the_death_of_an_agent_is_not_the_loss_of_its_node(ear: Heartbeats) -> None:
    watchman = Watchman(ear, Suspicion())
    watchman.agent_started("a", 1)
    node = Node(ear, "a")
    node.trip()
    node.trip()
    watchman.agent_died("a")
    began_s, pause = time.monotonic(), threading.Event()
    while time.monotonic() < began_s + 0.8:
        assert watchman.look() == []
        pause.wait(0.05)
    watchman.agent_started("a", 2)
    again = Node(ear, "a", 2)
    again.trip()
    again.trip()
    assert [report.agent for report in ear.poll()] == [2]
    node.socket.close()
    again.socket.close()


def test_a_node_that_no_datagram_comes_from_is_said_once(ear: Heartbeats, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watchman_module, "UNHEARD_S", 0.1)
    watchman = Watchman(ear, Suspicion())
    watchman.agent_started("a", 1)
    found: list[object] = []
    began_s, pause = time.monotonic(), threading.Event()
    while time.monotonic() < began_s + 0.5:
        found.extend(watchman.look())
        pause.wait(0.02)
    (said,) = found
    assert isinstance(said, cmd.Announce)
    assert (said.kind, said.data["node"]) == ("agent_unheard", "a")
