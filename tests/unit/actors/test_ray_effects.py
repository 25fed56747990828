"""What the effects on Ray keep of a worker, without Ray."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

from elastictrain.controller import commands as cmd
from elastictrain.controller import events as ev
from elastictrain.signs import Activity
from elastictrain_actors.creations import Creations
from elastictrain_actors.ray_effects import RayEffects, suspicion_for
from elastictrain_actors.starts import Starts
from tests.support.process_cluster import byte_job

WAIT_S = 20.0


@pytest.mark.parametrize("command", [cmd.Retire(3), cmd.Kill(3, "too many")])
def test_who_is_not_wanted_any_more_is_ended_although_ray_is_still_making_it(command: cmd.Command) -> None:
    made, ended = threading.Event(), list[Any]()
    effects: Any = object.__new__(RayEffects)
    effects._workers, effects._out, effects._starts = {}, [], Starts()
    effects._creations = Creations(ended.append)
    effects._creations.ask(3, lambda: made.wait(WAIT_S) and "worker 3")
    effects.perform(command)
    assert 3 not in effects._creations
    made.set()
    assert effects._creations.take(WAIT_S) == []
    assert ended == ["worker 3"]
    died = [event for event in effects._out if isinstance(event, ev.WorkerDied)]
    assert bool(died) == isinstance(command, cmd.Kill)


def test_who_is_not_started_yet_is_not_started_any_more() -> None:
    effects: Any = object.__new__(RayEffects)
    effects._workers, effects._out, effects._starts = {}, [], Starts()
    effects._creations = Creations(lambda _: None)
    effects._starts.parking()
    effects._starts.want(3, ())
    effects.perform(cmd.Retire(3))
    effects._starts.sealed()
    assert effects._starts.due() == {}


@pytest.mark.parametrize(("more", "allowed"), [({}, False), ({"feeder": "node"}, True), ({"path": "s3://b/d"}, True)])
def test_who_waits_for_the_feeder_of_its_node_is_not_taken_for_stuck(
    tmp_path: Path, more: dict[str, str], *, allowed: bool
) -> None:
    job = byte_job(tmp_path)
    job = job.model_copy(update={"data": job.data.model_copy(update=more)})
    assert (Activity.DATA in suspicion_for(job)._long) == allowed
