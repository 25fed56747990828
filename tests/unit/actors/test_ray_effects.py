"""What the effects on Ray keep of a worker, without Ray."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from elastictrain.controller import commands as cmd
from elastictrain.controller import events as ev
from elastictrain_actors.creations import Creations
from elastictrain_actors.ray_effects import RayEffects
from elastictrain_actors.starts import Starts

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
