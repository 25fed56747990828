"""Detection against a noisy world: never a false alarm while there is progress, never the victim, always in time."""

from __future__ import annotations

from functools import partial

from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from elastictrain.controller.suspicion import Kind, Suspicion
from elastictrain.signs import Activity
from tests.property.controller.noise import NAMES, Noise, World

NOISE = st.builds(
    Noise,
    starved=st.sampled_from([0.0, 0.2, 0.6]),
    pauses=st.sampled_from([0.0, 0.02, 0.1]),
    pause_s=st.sampled_from([1.0, 8.0]),
    lost=st.sampled_from([0.0, 0.1, 0.5]),
    counts_waits=st.booleans(),
    outliers=st.sampled_from([0.0, 0.02]),
)
SHAPE = st.fixed_dictionaries(
    {
        "workers": st.integers(1, 4),
        "step_s": st.sampled_from([0.04, 0.3, 1.0, 3.0]),
        "pieces": st.sampled_from([1, 3, 8]),
    }
)
FAULT = st.sampled_from(["stopped", "deadlocked", "livelocked", "gone"])


# A world is one number: there is nothing to shrink.
worlds = partial(settings, deadline=None, phases=(Phase.explicit, Phase.reuse, Phase.generate))


@worlds(max_examples=60)
@given(st.integers(0, 2**32), SHAPE, NOISE, st.sampled_from([0.0, 5.0, 24.0]))
def test_nobody_is_named_while_there_is_progress(seed: int, shape: dict, noise: Noise, evaluate_s: float) -> None:
    world = World(seed, noise=noise, evaluate_every=20, evaluate_s=evaluate_s, **shape)
    assert world.until(100.0) == []
    assert noise.starved or noise.pauses or min(worker.steps_done for worker in world.workers) > 10


def test_twenty_thousand_noisy_steps_without_a_false_alarm() -> None:
    noise = Noise(starved=0.4, pauses=0.05, lost=0.1, outliers=0.01)
    world = World(7, workers=3, step_s=0.06, noise=noise)
    world.steps(20_000)
    assert world.verdicts == []
    assert all(worker.steps_done >= 20_000 and worker.held_up_s > 60 for worker in world.workers)


@worlds(max_examples=100)
@given(st.integers(0, 2**32), SHAPE, FAULT, st.booleans(), st.data())
def test_who_stands_still_is_named_in_time_and_nobody_else(
    seed: int, shape: dict, fault: str, counts_waits: bool, data: st.DataObject
) -> None:
    world = World(seed, noise=Noise(counts_waits=counts_waits, lost=0.02), **shape)
    world.steps(8)
    victim = data.draw(st.integers(0, shape["workers"] - 1))
    broken_s = world.break_worker(victim, fault)
    step_s = world.suspicion.step_s()
    assert step_s is not None
    assert 0.7 * shape["step_s"] < step_s < 1.6 * shape["step_s"] + 0.3
    found = world.until(max(2.0, 3 * step_s) + 2 * shape["step_s"] + 5)
    # The last steps before the fault may be heard of after it.
    step_s = max(step_s, world.suspicion.step_s() or 0.0)
    promised_s = {"gone": 0.3, "stopped": 0.8}.get(fault, max(2.0, 3 * step_s))
    assert [(verdict.worker, verdict.kind) for _, verdict in found] == [(victim, NAMES[fault])]
    assert found[0][0] - broken_s <= promised_s + 0.2


@worlds(max_examples=60)
@given(st.integers(0, 2**32), SHAPE, NOISE, FAULT, st.data())
def test_under_noise_too_only_the_culprit_is_named(
    seed: int, shape: dict, noise: Noise, fault: str, data: st.DataObject
) -> None:
    world = World(seed, noise=noise, **shape)
    world.steps(8)
    victim = data.draw(st.integers(0, shape["workers"] - 1))
    world.break_worker(victim, fault)
    while not world.verdicts and world.now_s < 900:
        world.tick()
    found = world.until(20.0)
    assert [verdict.worker for _, verdict in found] == [victim]
    # Whether it slept or spun while the watcher itself slept, the watcher cannot know.
    stuck = {Kind.DEADLOCKED, Kind.LIVELOCKED}
    assert found[0][1].kind in (stuck if NAMES[fault] in stuck else {NAMES[fault]})


@worlds(max_examples=40)
@given(st.integers(0, 2**32), st.integers(2, 4), st.sampled_from([0.04, 0.3, 1.0]))
def test_a_stopped_worker_is_named_in_a_collective_too_and_its_peers_never(
    seed: int, workers: int, step_s: float
) -> None:
    world = World(seed, workers=workers, step_s=step_s)
    world.steps(8)
    broken_s = world.break_worker(0, "stopped", waiting=None)
    found = world.until(6 + 4 * step_s)
    assert [(verdict.worker, verdict.kind) for _, verdict in found] == [(0, Kind.STOPPED)]
    assert found[0][0] - broken_s <= 0.8


@worlds(max_examples=60)
@given(
    st.integers(0, 2**32),
    st.integers(2, 4),
    st.sampled_from([0.04, 0.3, 1.0]),
    st.sampled_from([Activity.EXCHANGE, Activity.MIRROR, Activity.VOTE, Activity.GATHER]),
)
def test_a_hung_collective_is_named_in_time_and_no_worker_for_it(
    seed: int, workers: int, step_s: float, where: Activity
) -> None:
    world = World(seed, workers=workers, step_s=step_s)
    world.steps(8)
    world.hung_barrier = (world.workers[0].step + 1, where)
    while not all((w.step, w.activity) == world.hung_barrier for w in world.workers):
        world.tick()
    hung_s = world.now_s
    found = world.until(world.suspicion.deadline_s() + 5)
    promised_s = world.suspicion.deadline_s()
    assert [(verdict.worker, verdict.kind) for _, verdict in found] == [(None, Kind.HUNG_COLLECTIVE)]
    assert found[0][0] - hung_s <= promised_s + 0.2


@worlds(max_examples=30)
@given(st.integers(0, 2**32), SHAPE, NOISE, st.sampled_from(["stopped", "deadlocked", "livelocked"]))
def test_a_breakpoint_stands_in_debug_mode(seed: int, shape: dict, noise: Noise, fault: str) -> None:
    world = World(seed, noise=noise, suspicion=Suspicion(debug=True), **shape)
    world.steps(3)
    world.break_worker(0, fault)
    assert world.until(30 + 12 * shape["step_s"]) == []
    world.workers[0].fault = "gone"
    awake_s = 20 + (
        10 * noise.pause_s if noise.pauses else 0
    )  # agent, node and controller may sleep one after the other
    assert [verdict.kind for _, verdict in world.until(awake_s)] == [Kind.GONE]
