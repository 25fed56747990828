"""One simulation from beginning to end. Pure: the same scenario gives the same report, on any machine."""

from __future__ import annotations

import gc

from elastictrain.controller import events as ev
from elastictrain.errors import ConfigError, InternalError
from elastictrain.sim.books import Violation, require
from elastictrain.sim.cluster import Cluster
from elastictrain.sim.report import PAUSE, Outages, Report
from elastictrain.sim.scenario import Scenario
from elastictrain.sim.weather import Weather

STOP_PATIENCE_S = 3600.0
"""A run that is stopped has to end within this time, whatever it was busy with."""


def simulate(scenario: Scenario) -> Report:
    """Drive the real controller through `scenario`.

    Raises Violation (an InternalError) when the machine loses or doubles a step, goes on without a block, does not end,
    breaks one of its invariants, or is not what its journal says. The message names seed and time: the same call
    repeats it. Raises ConfigError for a scenario of pipelines, which no controller runs (`simulate_pipelines`).
    """
    if scenario.pipeline is not None:
        raise ConfigError("simulate: a scenario with pipeline is for simulate_pipelines")
    collects = gc.isenabled()
    gc.disable()  # millions of events and no cycles worth a search: a fifth of the time
    try:
        return _simulate(scenario)
    finally:
        if collects:
            gc.enable()


def _simulate(scenario: Scenario) -> Report:
    cluster = Cluster(scenario)
    Weather(cluster, scenario.end_s)
    try:
        cluster.clock.run(scenario.end_s, lambda: cluster.ended is not None)
        if cluster.ended is None:
            cluster.clock.now_s = scenario.end_s
            cluster.send(lambda now_s: [ev.StopRequested(now_s, "the simulated time is over")])
            cluster.clock.run(scenario.end_s + STOP_PATIENCE_S, lambda: cluster.ended is not None)
        return _report(cluster)
    except (InternalError, AssertionError, LookupError, ValueError) as error:
        where = f"seed {scenario.seed}, second {cluster.clock.now_s:.3f}, event {cluster.pilot.events}"
        raise Violation(f"{error or type(error).__name__} ({where})") from error


def _report(cluster: Cluster) -> Report:
    scenario, tally, pilot, ended = cluster.scenario, cluster.tally, cluster.pilot, cluster.ended
    require(ended is not None, f"the run did not end; the controller is {pilot.machine.phase.value}")
    assert ended is not None
    require("InternalError" not in (ended.error or ""), ended.error)
    steps, lost, twice = cluster.books.audit()
    require(lost == twice == 0, f"{lost} steps were lost and {twice} committed twice")
    took_s = cluster.clock.now_s
    tally.interrupt(took_s, PAUSE)
    recoveries = tally.recoveries()
    pauses = tally.outages.pop(PAUSE, [])
    return Report(
        workers=scenario.workers,
        seed=scenario.seed,
        hours=round(took_s / 3600.0, 3),
        events=pilot.events,
        steps=steps,
        goodput=round(steps * scenario.costs.step_s / took_s, 5),
        stepping=round(tally.stepping_s / took_s, 5),
        faults=dict(sorted(tally.faults.items())),
        recoveries=Outages.of(recoveries) if recoveries else None,
        outages={cause: Outages.of(seconds) for cause, seconds in sorted(tally.outages.items())},
        pauses=Outages.of(pauses) if pauses else None,
        generations=pilot.machine.generation,
        steps_redone=tally.steps_redone + cluster.books.undone,
        went_back=tally.went_back,
        steps_lost=lost,
        steps_twice=twice,
        checks=pilot.checks,
        controller_deaths=pilot.deaths,
        replayed=pilot.replayed,
        world_least=tally.world_least,
        lanes_moved=cluster.swings.moves,
        lanes_moved_back=tally.lanes_moved_back,
        lanes_swung=cluster.swings.swings,
        lanes_taken_over=cluster.swings.taken_over,
        stragglers=dict(sorted(tally.stragglers.items())),
        samples=None if cluster.samples is None else cluster.samples.digest(steps),
        phase=pilot.machine.phase.value,
        error=ended.error,
    )
