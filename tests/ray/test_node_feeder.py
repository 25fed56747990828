"""One feeder for the workers of a node, out of Ray's object store: the bits of a run whose workers read for themselves,
also when the feeder is killed or stopped in the middle, or sits on one of several nodes.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray

import elastictrain as et
from elastictrain.data.byte_tokens import BYTE_TOKENS
from elastictrain.data.sharing import Ask, Look
from elastictrain.observe import Event, RunDirectory
from elastictrain_actors.node_feeder import FeederLine, NodeFeeder
from tests.ray.test_controller_death import AtRow, kill_controller
from tests.support.process_cluster import RAY_STEPS as STEPS
from tests.support.process_cluster import RECIPES, byte_job, write_text
from tests.support.raylets import ends_within

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]

HURRY = "hurry"


def node_job(folder: Path, workers: int = 2, **more: Any) -> et.Job:
    """With the smallest budget, so that windows are asked for all the time. A feeder takes seconds to be there, a step
    only some milliseconds: the recipe takes its time until `hurry` is called.
    """
    folder.mkdir(exist_ok=True)
    more = {"recipe": f"{RECIPES}:Unhurried", "recipe_args": {"until": str(folder / HURRY)}} | more
    data = {"kind": "parquet", "path": write_text(folder), "text_column": "text", "sequence_length": 32,
            "feeder": "node", "prefetch_bytes": 1}  # fmt: skip
    return byte_job(folder, workers=workers, steps=STEPS, run_dir=str(folder / "run"), data=data, **more)


def hurry(folder: Path) -> None:
    """All has happened that is to happen in the run of `node_job(folder)`."""
    (folder / HURRY).touch()


class Watcher(AtRow):
    """Remembers the feeders; what they say of themselves."""

    def __init__(
        self, acts: dict[int, Callable[[], None]], starts: dict[int, Callable[[], None]] | None = None
    ) -> None:
        """`starts`: what to do when the n-th feeder has started."""
        super().__init__(acts)
        self.starts = starts or {}
        self.feeders: list[dict[str, Any]] = []

    def event(self, event: Event) -> None:
        super().event(event)
        if event.kind == "feeder_started":
            self.feeders.append(dict(event.data))
            self.starts.get(len(self.feeders), lambda: None)()

    def stats(self) -> list[dict[str, int]]:
        named = [a for a in ray.util.list_named_actors(all_namespaces=True) if a["name"].startswith("feeder-")]
        handles = [ray.get_actor(a["name"], a["namespace"]) for a in named]
        found: list[dict[str, int]] = ray.get([handle.stats.remote() for handle in handles], timeout=30)
        return found


def check_whole(run: RunDirectory) -> None:
    assert [row.step for row in run.metrics()] == list(range(1, STEPS + 1)), "every step once"
    kinds = [event.kind for event in run.events()]
    assert "worker_lost" not in kinds
    assert "recovery" not in kinds, "no step was lost"


@pytest.mark.usefixtures("shared_ray")
def test_one_actor_feeds_both_workers_is_killed_and_its_successor_stopped(tmp_path: Path, undisturbed: str) -> None:
    """A feeder that is dead is replaced; one that is stopped answers nobody, until it goes on."""
    before: list[dict[str, int]] = []
    after: list[dict[str, int]] = []

    def send(number: int) -> None:
        os.kill(watcher.feeders[-1]["pid"], number)

    def last() -> None:
        after.extend(watcher.stats())
        hurry(tmp_path)

    def second() -> None:
        now = watcher.rows
        watcher.acts |= {
            now + 10: lambda: send(signal.SIGSTOP),
            now + 30: lambda: send(signal.SIGCONT),
            now + 50: last,
        }

    def first() -> None:
        now = watcher.rows
        watcher.acts |= {now + 40: lambda: before.extend(watcher.stats()), now + 41: lambda: send(signal.SIGKILL)}

    watcher = Watcher({}, {1: first, 2: second})
    done = et.run(node_job(tmp_path), observer=watcher)
    assert done.digest == undisturbed
    run = RunDirectory.open(tmp_path / "run")
    check_whole(run)
    kinds = [event.kind for event in run.events() if event.kind.startswith("feeder_")]
    assert kinds == ["feeder_started", "feeder_lost", "feeder_started"], "one that is only stopped is not replaced"
    assert not watcher.acts, "all of it has happened"
    assert [feeder["workers"] for feeder in watcher.feeders] == [[0, 1]] * 2
    (said,) = before
    assert said["workers"] == 2
    assert said["handed_out"] > said["decoded"] > 0, "what both need is decoded once"
    (said,) = after
    assert said["handed_out"] > 0, "workers have come back to the new one"
    assert ends_within(watcher.feeders[-1]["pid"], 20.0), "it ends with the run"


@pytest.mark.usefixtures("shared_ray")
def test_a_controller_that_comes_back_has_feeders_of_its_own(tmp_path: Path, undisturbed: str) -> None:
    after: list[dict[str, int]] = []

    def first() -> None:
        watcher.acts[watcher.rows + 10] = lambda: kill_controller(tmp_path / "run")

    def last() -> None:
        after.extend(watcher.stats())
        hurry(tmp_path)

    def second() -> None:
        watcher.acts[watcher.rows + 30] = last

    watcher = Watcher({}, {1: first, 2: second})
    done = et.run(node_job(tmp_path), observer=watcher)
    assert done.digest == undisturbed
    run = RunDirectory.open(tmp_path / "run")
    check_whole(run)
    assert [event.kind for event in run.events()].count("controller_back") == 1
    assert [feeder["number"] for feeder in watcher.feeders] == [1001, 2001], "one each"
    assert ends_within(watcher.feeders[0]["pid"], 20.0)
    assert sum(said["handed_out"] for said in after) > 0, "the workers use the new one"


@pytest.fixture
def feeder(shared_ray: None, tmp_path: Path) -> Iterator[Any]:
    del shared_ray
    actor = ray.remote(NodeFeeder).options(max_concurrency=8, num_cpus=0)  # type: ignore[attr-defined]
    handle = actor.remote(node_job(tmp_path).data, 11, 2, limit_bytes=1 << 24)
    yield handle
    ray.kill(handle)


def test_blocks_are_views_of_one_object_and_outlive_their_feeder(feeder: Any, tmp_path: Path) -> None:
    from elastictrain.data import open_source
    from elastictrain.data.warm import cache_key

    pid, error, still_opening = ray.get(feeder.opened.remote(), timeout=60)
    assert error is None
    assert not still_opening
    source = open_source(node_job(tmp_path).data, seed=0, lanes=11, lane_batch_size=2)  # type: ignore[arg-type]
    expected = source.read_block(3)[BYTE_TOKENS].copy()
    line = FeederLine()
    line.use(1, feeder)

    def take(worker: int, serial: int) -> Any:
        ask = Ask(worker, serial, serial, cache_key(source.content), 3, 0.0, frozenset(), 0, 5.0)
        answer, arrays = line.call(1, ask, 30.0)
        assert answer.look is Look.HERE
        assert arrays is not None
        return arrays[BYTE_TOKENS]

    one, other = take(0, 1), take(1, 1)
    assert not one.flags.writeable
    assert not one.flags.owndata, "a view"
    assert one.__array_interface__["data"][0] == other.__array_interface__["data"][0], "of the same memory"
    assert ray.get(feeder.stats.remote(), timeout=30)["decoded"] == 1
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(ray.exceptions.RayActorError):
        ray.get(feeder.run.remote(), timeout=60)
    junk = [ray.put(np.full(1 << 20, number, dtype=np.uint8)) for number in range(40)]  # into whatever is free now
    np.testing.assert_array_equal(one, expected)
    assert len(junk) == 40


def test_each_of_two_nodes_has_a_feeder_of_its_own(tmp_path: Path, undisturbed: str) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.fed_nodes", str(tmp_path)],
        env=environment, capture_output=True, text=True, timeout=200, check=False, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["digest"] == undisturbed
    assert len(set(found["feeders"])) == 2, "one on each node"
    assert found["workers"] == [0, 1, 2, 3]
    assert len(found["handed_out"]) == 2
    assert all(found["handed_out"]), "both have been used"
    assert found["rows"] == list(range(1, STEPS + 1)), "every step once"
    assert found["worlds"] == [4, 3], "one was drained, and its lanes moved"
    assert found["redone"] == []
