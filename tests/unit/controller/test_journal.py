"""Events to lines and back, exactly; replay; broken lines."""

from __future__ import annotations

import json
from time import process_time
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastictrain.controller import Machine, dump_event, load_event, read_events, replay, view
from elastictrain.controller import events as ev
from elastictrain.controller.journal import VERSION
from elastictrain.errors import ClusterError
from elastictrain.protocol import ParkReport
from tests.unit.controller.scene import Scene, spec


@given(st.one_of(*(st.from_type(kind) for kind in get_args(ev.Event))))
def test_every_event_comes_back_equal(event: ev.Event) -> None:
    line = dump_event(event)
    assert "\n" not in line
    if repr(event).count("nan"):
        assert repr(load_event(line)) == repr(event)
    else:
        assert load_event(line) == event


def test_text_that_is_not_unicode_and_bytes_survive() -> None:
    events: list[ev.Event] = [
        ev.WorkerDied(0.1 + 0.2, 3, "bad name \udcff"),
        ev.WorkerParked(1e-300, 1, ParkReport(0, 1, 2, 1, False, bytes(range(256)), True)),
    ]
    assert [load_event(dump_event(event)) for event in events] == events


def scene() -> Scene:
    scene = Scene(spares=1).run()
    scene.die(1)
    scene.park(0, 2, applied=7)
    scene.seal()
    scene.send(ev.DrainRequested(3.0, 2))
    return scene


def test_replay_gives_an_equal_machine() -> None:
    live = scene()
    again = replay(live.machine.spec, [dump_event(event) + "\n" for event in live.log])
    assert again == live.machine
    assert view(again) == view(live.machine)
    assert again != Machine(spec(spares=1))


@pytest.mark.parametrize("kept", [0, 1, 10, -1])
def test_a_torn_last_line_is_ignored(kept: int) -> None:
    live = scene()
    lines = [dump_event(event) for event in live.log]
    assert read_events([*lines[:-1], lines[-1][:kept]]) == live.log[:-1]


@pytest.mark.parametrize(
    "broken", ["", "{}", "null", '{"event":7,"data":{}}', f'{{"v":{VERSION},"event":"Tick","data":{{}}}}', '{"v":2,"ev']
)
def test_a_broken_line_in_the_middle_is_an_error(broken: str) -> None:
    lines = [dump_event(event) for event in scene().log]
    lines[3] = broken
    with pytest.raises(ClusterError, match=f"^journal line 4 of {len(lines)} is broken: not an event: "):
        read_events(lines)


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ('{"event":"Tick","data":{"now_s":1.0}}', f"it is of version 1, this is version {VERSION}"),
        ('{"v":99,"event":"Tick","data":{"now_s":1.0}}', f"it is of version 99, this is version {VERSION}"),
        (f'{{"v":{VERSION},"event":"Nothing","data":{{}}}}', "it has Nothing, which is not known here"),
        (f'{{"v":{VERSION},"event":"Tick","data":{{"now_s":1.0,"mood":2}}}}', "it has mood, which is not known here"),
    ],
)
@pytest.mark.parametrize("place", [3, -1])
def test_a_line_of_another_version_is_an_error_also_at_the_end(line: str, why: str, place: int) -> None:
    lines = [dump_event(event) for event in scene().log]
    lines[place] = line
    number = place % len(lines) + 1
    with pytest.raises(ClusterError) as caught:
        read_events(lines)
    assert str(caught.value) == (
        f"journal line {number} of {len(lines)} was written by another version of elastictrain: {why}. The controller "
        "can be brought back only by the version that started the run; use that one, or start the run again from its "
        "newest checkpoint with --resume"
    )


def test_a_long_journal_is_replayed_in_seconds() -> None:
    """A hundred thousand events; by the processor's clock, so that a busy machine does not matter."""
    live = Scene(steps=10**6, checkpoint=True).run()
    lines = [dump_event(event) for event in live.log]
    lines += [dump_event(ev.Progress(float(step), 1, step)) for step in range(1, 100_001)]
    started_s = process_time()
    machine = replay(live.machine.spec, lines)
    assert machine.core.ledger.published_step == 100_000
    assert process_time() - started_s < 10.0


def test_the_view_is_plain_data() -> None:
    assert json.loads(json.dumps(view(scene().machine))) == view(scene().machine)
    assert json.loads(json.dumps(view(Scene().machine)))["phase"] == "gathering"


def test_a_resumed_run_goes_on_above_the_generations_it_had():
    """Events, metrics and checkpoints are told apart by generation, over resumes too."""
    from dataclasses import replace

    from elastictrain.controller import commands as cmd
    from elastictrain.controller import events as ev
    from elastictrain.controller.facts import MachineSpec
    from elastictrain.controller.machine import Machine
    from elastictrain.protocol import Restore

    spec = replace(MachineSpec(lane_count=4, steps=8, block_elements=(4096,) * 4), base_generation=7)
    machine = Machine(spec)
    machine.handle(ev.Begun(0.0, Restore(4, "somewhere"), ((4, "somewhere"),)))
    plans = [c.plan for c in machine.handle(ev.WorkerReady(1.0, 0, "here")) if isinstance(c, cmd.Form)]
    assert [(plan.generation, plan.step) for plan in plans] == [(8, 4)]
