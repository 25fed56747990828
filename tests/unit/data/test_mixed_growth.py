"""How far a mixture with live sources is decided, what it waits for, and what names its order."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from elastictrain.data import LaneReader, live_segments
from elastictrain.data.growing import MixedGrowth
from elastictrain.errors import DataError, StoreFailed
from tests.unit.data.live_place import LANES, OLD, Mixed, Place, taken


@pytest.fixture
def place(tmp_path: Path) -> Mixed:
    return Mixed(tmp_path)


def test_several_live_sources_wait_for_each_other(place: Mixed, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    other = Place(tmp_path / "elsewhere")
    other.rows = OLD // 2
    second = other.data("its order")
    source = place.opened(second=second, weights={"new": 1, "second": 1, "old": 2})
    growth = source.growth
    assert growth is not None
    place.add(40)
    assert growth.advance(needed=False)
    assert growth.decided == 0
    assert not growth.advance(needed=False)
    assert growth.waiting_for.startswith(f"source 'second': {tmp_path}/elsewhere/stream: 0 segments are there")
    other.add(40)
    assert growth.advance(needed=False)
    assert growth.decided == 20
    assert growth.mark_of(0).keys() == {"new", "second"}
    reader = LaneReader(source)
    rows = Counter(
        row // (OLD // 2) for step in range(20) for lane in range(LANES) for row in reader.batch(step, lane)["x"]
    )
    assert rows == {0: 40, 1: 40, 2: 80}
    reader.close()


def test_the_mark_names_what_was_used_and_asks_only_for_what_is_there(place: Mixed, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    other = Place(tmp_path / "elsewhere")
    place.add(30)
    other.add(90)
    both = {"second": other.data("its order"), "weights": {"new": 3, "second": 1}, "segments_at_once": 1}
    stream = place.mixed(**both)
    taken(stream, 3)
    place.add(30)
    taken(stream, 4)
    state = stream.state()
    marks = json.loads(state)["live"]
    assert (marks["new"]["era"], marks["second"]["era"]) == (1, 0)
    for era in (tmp_path / "elsewhere" / "its order" / "eras").iterdir():
        era.unlink()
    with pytest.raises(DataError, match=r"^data\.sources\.second: .*era 0 of the recorded order is missing"):
        place.mixed(**both).resume(state)
    without = place.mixed(segments_at_once=1)
    without.resume(state)  # the second source is not read any more
    assert len(taken(without, 1)) == 1


def test_the_most_patient_of_those_that_are_missing_says_how_long(place: Mixed, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    other = Place(tmp_path / "elsewhere")
    both = {"second": other.data("its order", deadline_s=7.0, poll_s=0.5), "weights": {"new": 3, "second": 1}}
    growth = place.opened(deadline_s=3.0, **both).growth
    assert growth is not None
    assert growth.deadline == ("data.sources.second.live.deadline_s", 7.0)
    assert growth.poll_s == 0.01
    other.add(40)
    assert growth.advance(needed=False)
    assert growth.deadline == ("data.sources.new.live.deadline_s", 3.0)


def test_nothing_ends_before_somebody_waits_for_it(place: Mixed) -> None:
    growth = place.opened(policy="stop").growth
    assert growth is not None
    assert not growth.advance(needed=False)
    assert growth.ended is None
    growth.advance(needed=True)
    assert str(growth.ended).startswith("source 'new': data.live.policy: stop")


def test_a_store_that_fails_is_told_from_bad_data(place: Mixed, monkeypatch: pytest.MonkeyPatch) -> None:
    source = place.opened()
    assert source.growth is not None

    def fail(*_: Any, **__: Any) -> bool:
        raise StoreFailed("no route")

    monkeypatch.setattr(source.sources["new"], "advance", fail)
    with pytest.raises(StoreFailed, match=r"^data\.sources\.new: no route$"):
        source.growth.advance(needed=True)


def test_of_the_last_window_that_is_decided_nothing_follows(place: Mixed) -> None:
    place.add(30)
    source = place.opened(segments_at_once=1)
    growth = source.growth
    assert growth is not None
    assert growth.advance(needed=False)
    windows = [w for w, _, _ in source.spans(growth.decided - 1, 1) if source.order_of(w)[0] == "new"]
    while (following := source.after(windows[-1])) != windows[-1]:
        assert following.pieces[0].block >= 1 << 40
        assert source.rows_per_step(windows[-1], 0) == 1.5
        windows.append(following)
    assert source.rows_per_step(windows[-1], 0) == 0
    place.add(20)
    source.sources["new"].advance(needed=True)  # type: ignore[union-attr]
    assert source.rows_per_step(windows[-1], 0) == 1.5
    assert source.after(windows[-1]).epoch == windows[-1].epoch + 1


def test_a_source_without_a_share_holds_nothing_up(place: Mixed) -> None:
    stream = place.mixed(weights={"old": 1, "new": 0})
    assert stream.source.growth is None
    assert len(taken(stream, 20)) == 20
    later = place.opened(stages=[{"from_step": 3, "weights": {"new": 1, "old": 1}}], weights={"old": 1})
    assert isinstance(later.growth, MixedGrowth)
    assert later.growth.decided == 3
    place.add(40)
    assert later.growth.advance(needed=False)
    assert later.growth.decided == 3 + 10  # 40 samples, one of them in every lane and step


def test_what_a_step_needs_of_its_live_sources_is_opened_ahead(place: Mixed, monkeypatch: pytest.MonkeyPatch) -> None:
    place.add(20, 20)
    deciding = place.opened(segments_at_once=1)
    assert deciding.growth is not None
    while deciding.growth.advance(needed=False):
        pass
    opened: list[str] = []
    open_source = live_segments.open_source

    def counting(spec: Any, **settings: Any) -> Any:
        opened.append(Path(str(spec.path)).stem)
        return open_source(spec, **settings)

    monkeypatch.setattr(live_segments, "open_source", counting)
    for step in range(deciding.growth.decided):
        del opened[:]
        source = place.opened(segments_at_once=1)
        assert source.growth is not None
        source.growth.prepare(step)
        ahead = sorted(opened)
        for lane in range(LANES):
            list(source.spans(step, lane))
        assert sorted(opened) == ahead, f"step {step} needs more"
        assert ahead
    assert ahead == ["part-000", "part-001"] or ahead == ["part-001"]
    source.growth.prepare(deciding.growth.decided + 5)  # beyond what is decided there is nothing
