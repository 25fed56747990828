"""What Ray says of its cluster becomes news once, and only when somebody needs it."""

from __future__ import annotations

import queue
from collections.abc import Iterator

import pytest

from elastictrain.controller import events as ev
from elastictrain_actors import surroundings
from elastictrain_actors.surroundings import CAPACITY_EVERY_S, Cluster, News, Surroundings

TWO = Cluster(("a", "b"), {"CPU": 8.0, "GPU": 2.0}, {"CPU": 3.0, "memory": 1e9})


class Ray:
    """Answers with what the test puts in; `read` returns when there is something."""

    def __init__(self) -> None:
        self.answers: queue.Queue[Cluster | Exception] = queue.Queue()
        self.now_s = 100.0
        self.watched = Surroundings(lambda: self.now_s, self.read)

    def read(self) -> Cluster:
        answer = self.answers.get(timeout=30.0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def says(self, *answers: Cluster | Exception) -> list[News]:
        """All of it has been heard when an answer that changes nothing else has: then what was taken is complete."""
        found: list[News] = []
        for answer in answers:
            self.answers.put(answer)
        last = answers[-1]
        while self.watched.now is not last:
            found += self.watched.take()
        return found


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> Iterator[Ray]:
    monkeypatch.setattr(surroundings, "EVERY_S", 0.0)
    monkeypatch.setattr(surroundings, "SHARE", 1e9)
    asked = Ray()
    yield asked
    asked.watched.close()
    asked.answers.put(TWO)


def test_nodes_are_news_once(ray: Ray) -> None:
    assert ray.says(TWO) == [ev.ClusterChanged(0.0, ("a", "b"))]
    assert ray.says(Cluster(("a", "b"), free={"CPU": 1.0})) == []
    assert ray.says(Cluster(("a", "c"))) == [ev.ClusterChanged(0.0, ("a", "c"))]


def test_what_is_free_is_news_while_workers_wait_for_room_and_not_all_the_time(ray: Ray) -> None:
    ray.says(TWO)
    ray.watched.is_short = True
    ray.now_s += CAPACITY_EVERY_S
    words = "Ray has 2 nodes with CPU 3 of 8 free, GPU 0 of 2 free"
    assert ray.says(Cluster(TWO.nodes, TWO.total, TWO.free)) == [ev.ClusterChanged(0.0, ("a", "b"), words)]
    assert ray.says(Cluster(TWO.nodes, TWO.total, {"CPU": 4.0})) == []
    ray.now_s += CAPACITY_EVERY_S
    (late,) = ray.watched.take()  # what was kept back is said when it is due
    assert isinstance(late, ev.ClusterChanged)
    assert "CPU 4 of 8 free" in late.capacity


def test_a_node_that_is_drained_is_announced_once_with_its_deadline(ray: Ray) -> None:
    drained = Cluster(("a", "b"), going={"b": 30.0})
    assert ray.says(drained) == [
        ev.PreemptionNotice(0.0, 130.0, None, "b", "Ray drains its node"),
        ev.ClusterChanged(0.0, ("a", "b")),
    ]
    ray.now_s += 5.0
    assert ray.says(Cluster(("a", "b"), going={"b": 25.0})) == []


def test_while_the_head_is_away_nothing_changes(ray: Ray) -> None:
    ray.says(TWO)
    assert ray.says(RuntimeError("no GCS"), Cluster(TWO.nodes)) == []


def test_in_words() -> None:
    assert Cluster(("a",)).in_words() == "Ray has 1 node"
    assert Cluster((), {"CPU": 2.0}).in_words() == "Ray has 0 nodes with CPU 0 of 2 free"
