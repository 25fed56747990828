"""When feeders are started, told of, and started again; with actors that only remember what was asked of them."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray.exceptions import GetTimeoutError

from elastictrain.controller.commands import Announce
from elastictrain.data.sharing import Answer, Ask, Look
from elastictrain.errors import ClusterError
from elastictrain.job import Job
from elastictrain_actors import feeders, node_feeder
from elastictrain_actors.cluster import OBJECT_STORE_BYTES, object_store_bytes
from elastictrain_actors.creations import Created
from elastictrain_actors.feeders import LONGEST_PAUSE_S, SETTLED_S, Feeders, pause_before
from elastictrain_actors.node_feeder import FeederLine
from tests.support.process_cluster import byte_job
from tests.unit.actors.test_agents import Creations


class Calls:
    """Instead of Ray's: the test says what comes back, from the calls of one key."""

    def __init__(self) -> None:
        self.open: list[tuple[str, Any, Any, Any]] = []

    def add(self, reference: str, key: object, then: Any, failed: Any) -> None:
        self.open.append((reference, key, then, failed))

    def forget(self, key: object) -> None:
        self.open = [one for one in self.open if one[1] != key]

    def answer(self, which: str, result: Any) -> Any:
        (found,) = (one for one in self.open if one[0] == which)
        self.open.remove(found)
        return found[2](result)

    def fail(self, which: str) -> Any:
        (found,) = (one for one in self.open if one[0] == which)
        self.open.remove(found)
        return found[3](RuntimeError("The actor died.\nand more"))


class NoWait(Creations):
    """Nothing comes while the head is `away`; what was dropped then never does, and is counted."""

    dropped = 0

    def drop(self, key: Any) -> None:
        self.dropped += key in self.open
        super().drop(key)

    def take(self, wait_s: float = 0.0) -> list[Any]:
        del wait_s
        if self.away:
            return []
        asked, self.open = self.open, {}
        return [self._create(key, create) for key, create in asked.items()]

    def _create(self, key: Any, create: Any) -> Created:
        try:
            return Created(key, create())
        except ValueError as error:
            return Created(key, error=error)

    def close(self) -> None:
        self.open.clear()


class Scene:
    def __init__(self, patch: pytest.MonkeyPatch, folder: Path, feeder: str = "node") -> None:
        self.now_s = 1000.0
        self.started: list[tuple[str, int]] = []
        self.killed: list[Any] = []
        self.refused = False
        self.told: list[tuple[int, int]] = []
        self.forgotten: list[int] = []
        self.calls = Calls()
        patch.setattr(feeders, "start_feeder", self._start)
        patch.setattr(feeders, "Creations", NoWait)
        patch.setattr(feeders, "end_actor", lambda handle: self.killed.append(handle.number))
        patch.setattr(feeders, "time", SimpleNamespace(monotonic=lambda: self.now_s))
        place: Any = SimpleNamespace(token="t", epoch=2, namespace="n")
        calls: Any = self.calls
        self.feeders = Feeders(place, calls, {}, with_feeder(byte_job(folder), feeder), ())

    def _start(self, node: str, data: Any, lanes: int, size: int, *, name: str, **_: Any) -> Any:
        if self.refused:
            raise ValueError("odd\nand more")
        assert (data.feeder, lanes, size) == ("node", 11, 2)
        number = int(name.rpartition("-")[2])
        self.started.append((node, number))

        def method(what: str) -> Any:
            def remote(*arguments: Any) -> str:
                self.forgotten += arguments if what == "forget" else ()
                return f"{what} {number}"

            return SimpleNamespace(remote=remote)

        return SimpleNamespace(number=number, **{what: method(what) for what in ("opened", "run", "forget")})

    def worker(self, number: int) -> Any:
        def use(epoch: int, feeder: int, handle: Any) -> str:
            assert (epoch, handle.number) == (2, feeder)
            self.told.append((number, feeder))
            return f"told {number} {feeder}"

        return SimpleNamespace(use_feeder=SimpleNamespace(remote=use))

    def need(self, node: str, worker: int) -> None:
        self.feeders.need(node, worker, self.worker(worker))

    def wait(self, seconds: float = 0.0) -> list[Any]:
        self.now_s += seconds
        return self.feeders.start_due()


def with_feeder(job: Job, feeder: str) -> Job:
    return job.model_copy(update={"data": job.data.model_copy(update={"feeder": feeder})})


@pytest.fixture
def scene(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Scene:
    return Scene(monkeypatch, tmp_path)


def test_one_feeder_for_each_node_of_which_all_workers_there_hear(scene: Scene) -> None:
    scene.need("a", 0)
    scene.need("a", 1)
    scene.need("b", 2)
    scene.wait()
    scene.wait()
    assert scene.started == [("a", 2001), ("b", 2001)]
    assert scene.told == [], "not before it has opened its data"
    (said,) = scene.calls.open[0][2]((17, None))
    assert said == Announce("feeder_started", {"node": "a", "number": 2001, "pid": 17, "workers": [0, 1]})
    assert scene.told == [(0, 2001), (1, 2001)]
    scene.need("a", 3)
    assert scene.told[2:] == [(3, 2001)], "a newcomer too"
    scene.wait()
    assert len(scene.started) == 2


def test_one_that_dies_is_replaced_and_its_workers_hear_of_the_other(scene: Scene) -> None:
    scene.need("a", 0)
    scene.wait()
    scene.calls.answer("opened 2001", (17, None))
    (said,) = scene.calls.fail("run 2001")
    assert said == Announce("feeder_lost", {"node": "a", "number": 2001, "reason": "The actor died."})
    scene.wait()
    assert scene.started == [("a", 2001), ("a", 2002)], "at once"
    assert scene.killed == [2001], "it may only have been out of reach, and would hold its blocks for ever"
    scene.calls.answer("opened 2002", (18, None))
    assert scene.told == [(0, 2001), (0, 2002)]
    scene.calls.fail("run 2002")
    scene.wait()
    assert len(scene.started) == 2, "that was the second in a row"
    scene.wait(1.0)
    assert len(scene.started) == 3
    scene.wait(SETTLED_S)
    scene.calls.fail("run 2003")
    scene.wait()
    assert len(scene.started) == 4, "that one had lived"


def test_one_that_is_still_being_created_is_the_only_one_and_is_dropped_with_its_node(scene: Scene) -> None:
    creations: Any = scene.feeders._creations
    creations.away = True
    scene.need("a", 0)
    scene.wait()
    scene.need("a", 1)
    scene.wait()
    assert [number for _, number in creations.open] == [2001], "the second worker waits for the same one"
    scene.feeders.lost("a")
    assert creations.dropped == 1, "whenever it is there, it is ended"
    scene.need("a", 2)
    scene.wait()
    creations.away = False
    scene.wait()
    assert scene.started == [("a", 2002)]


def test_a_feeder_that_dies_while_it_opens_is_one_death(scene: Scene) -> None:
    scene.need("a", 0)
    scene.wait()
    assert len(scene.calls.fail("opened 2001")) == 1
    assert scene.calls.fail("run 2001") == []
    scene.wait()
    assert [number for _, number in scene.started] == [2001, 2002]


def test_data_that_cannot_be_opened_are_said_and_nobody_is_sent_there(scene: Scene) -> None:
    scene.need("a", 0)
    scene.wait()
    (said,) = scene.calls.answer("opened 2001", (17, "DataError: no"))
    assert said == Announce("feeder_failed", {"node": "a", "number": 2001, "pid": 17, "error": "DataError: no"})
    assert scene.killed == [2001]
    scene.need("a", 1)
    assert scene.told == []
    scene.wait()
    assert [number for _, number in scene.started] == [2001, 2002], "the store may be back"
    for number, pause_s in ((2002, 1.0), (2003, 2.0), (2004, 4.0)):
        scene.wait(SETTLED_S)  # opening lasts that long
        scene.calls.answer(f"opened {number}", (17, "DataError: no"))
        assert scene.wait(pause_s / 2) == []
        assert len(scene.started) == number - 2000, "pauses grow"
        scene.wait(pause_s / 2)
        assert len(scene.started) == number - 1999
    scene.calls.answer("opened 2005", (18, None))
    assert scene.told == [(0, 2005), (1, 2005)]
    assert scene.calls.fail("run 2004") == [], "that one is long gone"


def test_a_feeder_that_opens_late_is_asked_again_until_it_is_open(scene: Scene) -> None:
    scene.need("a", 0)
    scene.wait()
    for _ in range(3):
        assert scene.calls.answer("opened 2001", (17, "not within 600 s", True)) == []
        scene.wait(600)
    assert scene.killed == []
    assert scene.calls.answer("opened 2001", (17, None, False))[0].kind == "feeder_started"
    assert scene.told == [(0, 2001)]
    assert len(scene.started) == 1


def test_a_feeder_whose_actor_cannot_be_made_is_said_and_tried_again(scene: Scene) -> None:
    scene.need("a", 0)
    scene.refused = True
    for number in (2001, 2002):
        assert scene.wait() == [Announce("feeder_failed", {"node": "a", "number": number, "error": "odd"})]
    assert scene.wait(0.5) == [], "the second in a row"
    scene.refused = False
    assert scene.wait(0.5) == []
    scene.calls.answer("opened 2003", (17, None))
    assert scene.told == [(0, 2003)]


@pytest.mark.parametrize(
    ("answers", "is_opening", "expected"),
    [
        ([None, None], False, (None, False)),
        (["DataError: no", "DataError: no"], False, ("DataError: no", False)),
        (["late"], True, ("late", True)),
        (["late", None], False, (None, False)),  # open just after the first question
    ],
)
def test_a_feeder_says_whether_it_is_still_opening(
    answers: list[str | None], expected: tuple[str | None, bool], *, is_opening: bool
) -> None:
    feeder: Any = object.__new__(node_feeder.NodeFeeder)
    feeder._server = SimpleNamespace(opened=lambda _: answers.pop(0), is_opening=is_opening)
    assert feeder.opened()[1:] == expected


def test_workers_that_go_are_forgotten_and_a_node_without_any_needs_no_feeder(scene: Scene) -> None:
    scene.need("a", 0)
    scene.need("a", 1)
    scene.wait()
    scene.calls.answer("opened 2001", (17, None))
    scene.feeders.worker_gone(1)
    scene.feeders.worker_gone(9)
    assert scene.forgotten == [1]
    scene.feeders.worker_gone(0)
    assert scene.killed == [2001]
    assert not [one for one in scene.calls.open if one[0] == "run 2001"], "its end is no loss"
    scene.need("a", 2)
    scene.wait()
    assert scene.started[-1] == ("a", 2002)


def test_a_lost_node_and_the_end_of_the_run(scene: Scene) -> None:
    for worker, node in enumerate("ab"):
        scene.need(node, worker)
    scene.wait()
    scene.feeders.lost("a")
    assert scene.killed == [2001]
    scene.feeders.lost("a")
    scene.feeders.close()
    assert scene.killed == [2001, 2001]


def test_nothing_happens_where_workers_feed_themselves(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    scene = Scene(monkeypatch, tmp_path, "worker")
    scene.need("a", 0)
    scene.wait()
    scene.feeders.worker_gone(0)
    scene.feeders.lost("a")
    scene.feeders.close()
    assert scene.started == []


def test_pauses_between_feeders_that_die_one_after_the_other() -> None:
    assert [pause_before(deaths) for deaths in range(1, 10)] == [
        0,
        1,
        2,
        4,
        8,
        16,
        32,
        LONGEST_PAUSE_S,
        LONGEST_PAUSE_S,
    ]


def test_the_embedded_object_store_has_room_for_row_groups_only_where_they_are_shared(tmp_path: Path) -> None:
    job = byte_job(tmp_path)
    budget = job.data.prefetch_bytes
    assert object_store_bytes(job, 1 << 50) == OBJECT_STORE_BYTES
    node = with_feeder(job, "node")
    assert object_store_bytes(node, 1 << 50) == OBJECT_STORE_BYTES + 4 * budget
    assert object_store_bytes(node, 2 * OBJECT_STORE_BYTES + 2 * budget) == OBJECT_STORE_BYTES + budget
    assert object_store_bytes(node, 0) == OBJECT_STORE_BYTES


ASK = Ask(0, 1, 1, "key", 4, 0.0, frozenset(), 0, 0.25)


def feeder_that_answers(answer: Any) -> Any:
    return SimpleNamespace(ask=SimpleNamespace(remote=lambda ask: ("asked", ask, answer)))


def test_a_line_follows_the_newest_feeder_and_maps_what_it_gets(monkeypatch: pytest.MonkeyPatch) -> None:
    gets, now_s = [], [50.0]

    def get(reference: Any, timeout: float) -> Any:
        gets.append(timeout)
        now_s[0] += 1.0
        if reference == "block":
            return {"x": 1}
        if reference[2] is None:
            raise GetTimeoutError("late")
        return reference[2]

    monkeypatch.setattr(node_feeder, "ray", SimpleNamespace(get=get))
    monkeypatch.setattr(node_feeder, "time", SimpleNamespace(monotonic=lambda: now_s[0]))
    line = FeederLine()
    assert line.number == 0
    line.use(7, feeder_that_answers(Answer(Look.HERE, 2, 0.5, ["block"])))
    line.use(6, feeder_that_answers(None))
    assert line.number == 7, "old news"
    assert line.call(7, ASK, 1.25) == (Answer(Look.HERE, 2, 0.5), {"x": 1})
    assert gets == [1.25, 0.25], "one deadline for the question and the block"
    assert line.call(7, ASK, 0.5) == (Answer(Look.HERE, 2, 0.5), {"x": 1})
    assert gets[2:] == [0.5, 0.0], "a wait without end is never asked for"
    with pytest.raises(ClusterError, match="feeder 6 has been replaced by feeder 7"):
        line.call(6, ASK, 1.25)
    line.use(8, feeder_that_answers(Answer(Look.FULL, 2, 0.5)))
    assert line.call(8, ASK, 1.25) == (Answer(Look.FULL, 2, 0.5), None)
    line.use(9, feeder_that_answers(None))
    with pytest.raises(GetTimeoutError):
        line.call(9, ASK, 1.25)
    assert ray is not node_feeder.ray


def test_what_a_worker_holds_is_sent_to_the_feeder_it_is_meant_for_alone() -> None:
    sent: list[tuple[int, Ask]] = []
    line = FeederLine()
    line.tell(0, ASK)  # there is none: nothing is sent, nothing fails
    for number in (1, 2):
        tell = SimpleNamespace(remote=partial(lambda number, ask: sent.append((number, ask)), number))
        line.use(number, SimpleNamespace(tell=tell))
    line.tell(1, ASK)  # has been replaced
    line.tell(2, ASK)
    assert sent == [(2, ASK)]
