"""The properties that judge the mutants."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

from tests.property.controller import test_adoption as adoption
from tests.property.controller import test_endless as endless
from tests.property.controller.storm import storm
from tests.unit.controller import test_alarms, test_doubt, test_stop_and_rows

SEEDS = 250


def judges() -> Iterator[tuple[str, Callable[[], object]]]:
    """The properties, cheap ones first. Each raises when it does not hold."""
    for name, scene in vars(test_alarms).items():
        if name.startswith("test_"):
            yield f"scene {name[5:]}", scene
    for name, scene in vars(test_doubt).items():
        if name.startswith("test_"):
            yield f"scene {name[5:]}", scene
    yield "stop", test_stop_and_rows.test_a_run_that_waits_for_workers_stores_what_it_has_when_it_is_stopped
    yield "stop in vain", test_stop_and_rows.test_a_store_that_takes_nothing_is_not_asked_for_ever
    for workers in (1, 2, 3):
        yield (
            f"poison {workers}",
            partial(endless.test_a_lane_that_kills_whoever_computes_it_ends_the_run, workers, 0, 2),
        )
        always = endless.test_an_update_that_always_fails_ends_the_run_with_its_traceback
        yield f"torn {workers}", partial(always, workers, 3)
    for workers in (2, 3, 4):
        yield (
            f"troubled {workers}",
            partial(endless.test_one_that_is_troubled_again_and_again_is_replaced, workers, 1, 0),
        )
        yield f"all troubled {workers}", partial(endless.test_when_all_are_troubled_it_ends, workers, True)
    yield "hour", endless.test_so_many_failures_in_an_hour_are_the_clusters_fault
    yield "good luck", endless.test_deaths_with_commits_in_between_never_end_a_run
    yield "nodes", endless.test_a_node_that_keeps_failing_is_set_aside_within_the_share
    for seed in range(120):
        yield f"storm {seed}", partial(storm, seed)
    for name in adoption.STORIES:
        yield f"adoption {name}", partial(adoption.die_at_every_point, name, 0, 1.0)
    for seed in range(120, SEEDS):
        yield f"storm {seed}", partial(storm, seed)
