"""The parts of the simulator by example: clock, machines, books, settings."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from elastictrain.errors import ConfigError
from elastictrain.layout import balanced, moves_between, promoted
from elastictrain.protocol import FormPlan, Restore
from elastictrain.sim import FaultRates, Outages, Scenario, Violation, make_scenario, read_settings
from elastictrain.sim.books import Books
from elastictrain.sim.clock import Clock
from elastictrain.sim.nodes import Nodes
from elastictrain.sim.process import Process, Stage, vote_bytes

BLOCKS = [1] * 6
FIRST = balanced(1, [0, 1, 2], 6, BLOCKS)
SECOND = promoted(FIRST, 2, [0, 1], BLOCKS)
START = FormPlan(1, 0, FIRST, None, (), None, Restore(0, None), FIRST.workers, "")
NEXT = FormPlan(2, 7, SECOND, FIRST, moves_between(FIRST, SECOND, [0, 1]), None, None, SECOND.workers, "")


def test_time_passes_in_order_and_ties_keep_theirs() -> None:
    clock, seen = Clock(), list[tuple[float, str]]()
    clock.at(2.0, lambda: seen.append((clock.now_s, "c")))
    clock.at(1.0, lambda: seen.append((clock.now_s, "a")))
    clock.at(
        1.0, lambda: (seen.append((clock.now_s, "b")), clock.at(0.5, lambda: seen.append((clock.now_s, "late"))))[0]
    )
    clock.at(9.0, lambda: seen.append((clock.now_s, "never")))
    clock.run(5.0, lambda: False)
    assert seen == [(1.0, "a"), (1.0, "b"), (1.0, "late"), (2.0, "c")]


def test_a_place_is_found_where_there_is_room_and_not_to_be_avoided() -> None:
    nodes = Nodes(2, slots=2)
    assert [node.number for node in (nodes.place(w, ()) for w in range(3)) if node] == [0, 0, 1]
    assert nodes.place(3, {"node1"}) is None
    nodes.leave(0, 0)
    found = nodes.place(3, {"node1"})
    assert found is not None
    assert found.number == 0
    nodes.announce(nodes.live[1])
    assert nodes.place(4, ()) is None


def parked() -> dict[int, Process]:
    return {w: Process(w, 0, Stage.PARKED, applied=7, sealed=1, gathered=True) for w in range(2)}


def books() -> Books:
    kept = Books()
    kept.form(START, {w: Process(w, 0, Stage.IDLE) for w in range(3)})
    kept.heard_seals.add(1)
    return kept


def test_the_books_accept_what_is_right() -> None:
    kept, processes = books(), parked()
    kept.form(NEXT, processes)
    kept.enter(NEXT, processes)
    assert kept.audit() == (7, 0, 0)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"step": 6}, "steps are lost"),
        ({"step": 8}, "steps are made up"),
        ({"previous": SECOND}, "another layout"),
        ({"restore": Restore(0, None)}, "every block may have a live holder"),
    ],
)
def test_the_books_refuse_a_wrong_plan(change: dict[str, object], words: str) -> None:
    with pytest.raises(Violation, match=words):
        books().form(replace(NEXT, **change), parked())  # type: ignore[arg-type]


def test_the_books_refuse_to_form_past_a_worker_that_steps() -> None:
    processes = parked()
    processes[1].stage = Stage.STEPPING
    with pytest.raises(Violation, match="not parked"):
        books().form(NEXT, processes)


def test_the_books_refuse_to_go_on_without_a_block() -> None:
    with pytest.raises(Violation, match="without some blocks"):
        books().form(NEXT, {0: parked()[0]})


def test_the_books_miss_a_copy_that_was_not_sent() -> None:
    kept, processes = books(), parked()
    kept.form(NEXT, processes)
    with pytest.raises(Violation, match="without its blocks"):
        kept.enter(replace(NEXT, moves=NEXT.moves[1:]), processes)


def test_the_books_miss_a_vote_to_roll_forward_with() -> None:
    kept, processes = books(), parked()
    processes[1].applied, processes[0].vote = 6, vote_bytes(7)
    kept.form(NEXT, processes)
    with pytest.raises(Violation, match="lacks the vote of 7"):
        kept.enter(NEXT, processes)
    kept.enter(replace(NEXT, roll_forward=vote_bytes(7)), processes)


def test_the_books_find_gaps_and_overlaps() -> None:
    assert Books(commits={1: (0, 5), 2: (5, 9)}).audit() == (9, 0, 0)
    assert Books(commits={1: (0, 5), 2: (7, 9)}).audit() == (9, 2, 0)
    assert Books(commits={1: (0, 5), 2: (4, 9)}).audit() == (9, 0, 1)


def test_the_books_refuse_to_go_back_for_nothing() -> None:
    with pytest.raises(Violation, match="every block has a live holder"):
        books().went_back(0, parked())


def test_percentiles_by_nearest_rank() -> None:
    outages = Outages.of([float(n) for n in range(1, 21)])
    assert (outages.count, outages.p50_s, outages.p95_s, outages.longest_s, outages.total_s) == (20, 10, 19, 20, 210)


def test_defaults_scale_with_the_world() -> None:
    scenario = Scenario(workers=10_000)
    assert (scenario.spare_workers, scenario.nodes) == (100, 1263 + 26)
    assert scenario.machine_spec().min_workers == 7500
    assert FaultRates.none().worse(1000) == FaultRates.none()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"workers": 0}, "workers"),
        ({"workers": True}, "workers"),
        ({"hours": -1}, "hours"),
        ({"hours": float("inf")}, "hours"),
        ({"workers": 4, "min_workers": 5}, "min_workers=5"),
        ({"check": "some"}, "check"),
        ({"wrokers": 4}, "did you mean 'workers'"),
        ({"rates": {"start_failure": 1.5}}, "rates.start_failure"),
        ({"costs": {"step_s": 0}}, "costs.step_s"),
    ],
)
def test_what_is_wrong_is_named(settings: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        make_scenario(settings)


def test_a_factor_must_be_positive() -> None:
    with pytest.raises(ConfigError, match="worse"):
        make_scenario({}, worse=0.0)
    assert make_scenario({}, worse=2.0).rates.worker_death_h == 2500.0


def test_settings_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_text("workers: 5\nrates: {worker_death_h: null}\n", encoding="utf-8")
    scenario = make_scenario(read_settings(file))
    assert (scenario.workers, scenario.rates.worker_death_h) == (5, None)
    file.write_text("- 1\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="got list"):
        read_settings(file)
    with pytest.raises(ConfigError, match="--scenario"):
        read_settings(tmp_path / "none.yaml")
