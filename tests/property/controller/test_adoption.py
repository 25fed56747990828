"""A controller may die between any event and any of its effects: the run ends as if it had not."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from elastictrain.controller import MachineSpec
from elastictrain.controller import commands as cm
from elastictrain.controller import events as ev
from tests.property.controller.faults import FaultyCluster

SPEC = MachineSpec(
    lane_count=4, steps=16, block_elements=(10,) * 4, max_workers=3, initial_workers=3, spares=1, checkpoint=True
)


Story = dict[int, Callable[[FaultyCluster, int], object]]
"""What happens at which turn, to one of the members."""

STORIES: dict[str, Story] = {
    "nothing": {},
    "death": {8: lambda c, n: c.kill(n, lose_messages=False)},
    "frozen": {8: lambda c, n: c.freeze(n) and c.name_frozen(n)},
    "drain": {8: lambda c, n: c.send(ev.DrainRequested(c.now_s, n))},
    "node": {8: lambda c, n: c.cut(n) and c.lose_node(n)},
    "preemption": {8: lambda c, n: c.preempt(n, 0.0)},
    "all": {
        8: lambda c, n: c.kill(n, lose_messages=False),
        16: lambda c, n: c.freeze(n) and c.name_frozen(n),
        24: lambda c, n: c.send(ev.DrainRequested(c.now_s, n)),
        32: lambda c, n: c.cut(n) and c.lose_node(n),
        42: lambda c, n: c.preempt(n, 0.0),
    },
}


def run(name: str, stop_after: int | None = None, performing: int = 0, gone_s: float = 1.0) -> FaultyCluster:
    """One of the stories. `stop_after`: the controller dies after that many events, when it has performed `performing`
    more commands.
    """
    cluster = FaultyCluster(SPEC)
    story = STORIES[name]
    for turn in range(400):
        if cluster.ended is not None:
            break
        if stop_after is not None and len(cluster.log) >= stop_after and cluster.performs is None and not cluster.down:
            cluster.lose_controller(performing)
            stop_after = None
        if cluster.down and turn % 5 == 4:
            cluster.bring_back(gone_s)
        members = cluster.machine.core.ledger.members()
        if turn in story and members and not cluster.down:
            story[turn](cluster, members[0 if turn == 32 else -1])
        for number in list(cluster.workers):
            cluster.act(number)
        for _ in range(3):
            cluster.deliver(turn)
    if cluster.down:
        cluster.bring_back(gone_s)
    cluster.calm()
    cluster.check_end()
    return cluster


UNDISTURBED = {name: run(name) for name in STORIES}


def test_the_story_has_what_it_is_told_for() -> None:
    whole = UNDISTURBED["all"]
    kinds = {type(event) for event in whole.log}
    assert {ev.WorkerDied, ev.WorkerFrozen, ev.NodeLost, ev.DrainRequested, ev.PreemptionNotice} <= kinds
    assert len(whole.plans) >= 4
    assert len(whole.log) > 60


def die_at_every_point(name: str, performing: int, gone_s: float) -> None:
    """At every event, after none or some of its effects; messages that were not acknowledged come again, some twice."""
    undisturbed = UNDISTURBED[name]
    assert undisturbed.ended is not None
    for stop_after in range(1, len(undisturbed.log) + 1):
        cluster = run(name, stop_after, performing, gone_s)
        dead = f"dead at event {stop_after}"
        assert cluster.ended == undisturbed.ended, dead
        assert cluster.now_s - gone_s <= undisturbed.now_s + 1.0, f"{dead}: a deadline had to pass"
        ledger = cluster.machine.core.ledger
        assert set(ledger.workers) <= cluster.started, f"{dead}: some are waited for in vain"
        if name != "all":  # in that one the run may be over before
            assert not ledger.draining, f"{dead}: {ledger.draining} were to leave and did not"


@pytest.mark.parametrize("performing", range(4))
@pytest.mark.parametrize("name", STORIES)
def test_dead_at_every_point_the_run_ends_as_if_it_had_lived(name: str, performing: int) -> None:
    die_at_every_point(name, performing, 1.0)


@pytest.mark.parametrize("name", STORIES)
def test_a_long_absence_changes_nothing(name: str) -> None:
    die_at_every_point(name, 1, 1000.0)


def test_every_kind_of_command_gets_lost_somewhere() -> None:
    lost: set[type[object]] = set()
    for stop_after in range(1, len(UNDISTURBED["all"].log) + 1):
        for performing in (0, 1):
            lost |= {type(command) for command in run("all", stop_after, performing).not_performed}
    assert {cm.StartWorker, cm.Form, cm.Park, cm.AskPause, cm.Kill, cm.EndRun} <= lost
