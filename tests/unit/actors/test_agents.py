"""When agents are started, started again, and asked; with actors that only remember what was asked of them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from elastictrain_actors import agents
from elastictrain_actors.agents import PATIENCE_S, RETRY_S, Agents
from elastictrain_actors.creations import Created
from elastictrain_actors.procfs import KillAnswer


class Calls:
    """Instead of Ray's: the test says what comes back."""

    def __init__(self) -> None:
        self.open: list[tuple[str, Any, Any]] = []

    def add(self, reference: str, key: object, then: Any, failed: Any) -> None:
        del key
        self.open.append((reference, then, failed))

    def forget(self, key: object) -> None:
        del key
        self.open.clear()

    def answer(self, which: str, result: Any) -> Any:
        (then,) = (then for reference, then, _ in self.open if reference == which)
        return then(result)

    def fail(self, which: str) -> None:
        (failed,) = (failed for reference, _, failed in self.open if reference == which)
        self.open = []
        failed(RuntimeError("gone"))


class Creations:
    """Instead of the thread: what is asked for is there at once, unless the head is away."""

    def __init__(self) -> None:
        self.away = False
        self.open: dict[Any, Any] = {}

    def __contains__(self, key: Any) -> bool:
        return key in self.open

    def ask(self, key: Any, create: Any) -> None:
        self.open[key] = create

    def drop(self, key: Any) -> None:
        self.open.pop(key, None)

    def take(self, wait_s: float) -> list[Created]:
        del wait_s
        asked, self.open = (dict[Any, Any](), self.open) if self.away else (self.open, {})
        return [Created(key, create()) for key, create in asked.items()]


class Scene:
    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.now_s = 1000.0
        self.started: list[int] = []
        self.killed: list[Any] = []
        self.watched: list[Any] = []
        self.calls = Calls()
        patch.setattr(agents, "start_agent", self._start)
        patch.setattr(agents, "Creations", Creations)
        patch.setattr(agents, "end_actor", self.killed.append)
        patch.setattr(agents, "time", SimpleNamespace(monotonic=lambda: self.now_s))
        watchman: Any = SimpleNamespace(
            heartbeats=SimpleNamespace(host="h", port=1),
            agent_started=lambda node, number: self.watched.append((node, number)),
            agent_died=lambda node: self.watched.append((node, "died")),
        )
        place: Any = SimpleNamespace(token="t", epoch=2, namespace="n")
        calls: Any = self.calls
        self.agents = Agents(place, watchman, calls, {}, "aws")
        self.creations: Any = self.agents._creations

    def _start(self, node: str, token: str, number: int, *, cloud: str, **_: Any) -> Any:
        del node, token
        assert cloud == "aws", "whose metadata service the agent is to ask"
        self.started.append(number)
        methods = ("follow", "run", "kill")
        return SimpleNamespace(**{m: SimpleNamespace(remote=lambda *_, m=m: f"{m} {number}") for m in methods})

    def wait(self, seconds: float) -> None:
        self.now_s += seconds
        self.agents.start_due()


@pytest.fixture
def scene(monkeypatch: pytest.MonkeyPatch) -> Scene:
    return Scene(monkeypatch)


def test_the_first_agent_waits_until_the_first_step_is_through(scene: Scene) -> None:
    scene.agents.need("node")
    scene.wait(PATIENCE_S / 2)
    assert scene.started == []
    scene.agents.hurry()
    scene.wait(0)
    assert scene.started == [2001]
    scene.agents.need("node")
    scene.agents.need("other")
    scene.wait(0)
    assert scene.started == [2001, 2001], "one on each node, at once from now on"


def test_a_first_step_that_takes_long_is_watched_all_the_same(scene: Scene) -> None:
    scene.agents.need("node")
    scene.wait(PATIENCE_S)
    assert scene.started == [2001]


def test_an_agent_that_dies_is_replaced_at_once_and_one_that_never_came_up_later(scene: Scene) -> None:
    scene.agents.hurry()
    scene.agents.need("node")
    scene.wait(0)
    scene.calls.answer("follow 2001", True)
    assert scene.watched == [("node", 2001)]
    scene.calls.fail("run 2001")
    scene.wait(0)
    assert (scene.started, scene.watched[1:]) == ([2001, 2002], [("node", "died")])
    scene.calls.fail("follow 2002")
    scene.wait(RETRY_S / 2)
    assert scene.started == [2001, 2002]
    scene.wait(RETRY_S / 2)
    assert scene.started == [2001, 2002, 2003]


def test_a_lost_node_gets_no_agent_until_a_worker_shows_up_there(scene: Scene) -> None:
    scene.agents.hurry()
    scene.agents.need("node")
    scene.wait(0)
    scene.agents.lost("node")
    assert len(scene.killed) == 1
    scene.wait(10 * RETRY_S)
    assert scene.started == [2001]
    scene.agents.need("node")
    scene.wait(0)
    assert scene.started == [2001, 2002]


def test_only_an_agent_that_follows_is_asked_to_kill(scene: Scene) -> None:
    answers: list[Any] = []

    def answered(answer: KillAnswer | None) -> list[Any]:
        answers.append(answer)
        return []

    scene.agents.hurry()
    scene.agents.need("node")
    scene.wait(0)
    scene.agents.kill("node", 10, 20, answered)
    assert not [reference for reference, _, _ in scene.calls.open if reference.startswith("kill")]
    scene.calls.answer("follow 2001", True)
    scene.agents.kill("node", 10, 20, answered)
    scene.calls.answer("kill 2001", KillAnswer.GONE)
    assert answers == [KillAnswer.GONE]


def test_while_the_head_is_away_an_agent_is_asked_for_once(scene: Scene) -> None:
    scene.creations.away = True
    scene.agents.hurry()
    for _ in range(3):
        scene.agents.need("node")
        scene.wait(RETRY_S)
    assert scene.started == []
    assert len(scene.creations.open) == 1
    scene.creations.away = False
    scene.wait(0)
    assert scene.started == [2001]


def test_a_node_that_is_lost_while_its_agent_is_being_made(scene: Scene) -> None:
    scene.creations.away = True
    scene.agents.hurry()
    scene.agents.need("node")
    scene.wait(0)
    scene.agents.lost("node")
    scene.creations.away = False
    scene.wait(0)
    assert scene.started == []
    scene.agents.need("node")
    scene.wait(0)
    assert scene.started == [2002], "another worker has shown up there"
