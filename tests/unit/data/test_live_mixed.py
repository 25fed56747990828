"""Live sources in mixtures: exact shares of an order that grows, recorded once, the same for everybody who reads it."""

from __future__ import annotations

import json
from collections import Counter, deque
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

import elastictrain as et
from elastictrain.data import LaneReader, open_mixture
from elastictrain.data.audit import Auditor
from elastictrain.data.feeder import Feeder
from elastictrain.data.live import LiveSource
from elastictrain.data.live_feeder import LiveFeeder, open_feeder
from elastictrain.data.mixed import record_folder
from elastictrain.errors import ConfigError, DataEnded, DataError
from elastictrain.protocol import Stage
from tests.unit.data.live_place import LANES, OLD, SIZE, Mixed, Place, flat, taken


@pytest.fixture
def place(tmp_path: Path) -> Mixed:
    return Mixed(tmp_path)


def new_of(rows: list[int]) -> list[int]:
    return [row for row in rows if row < OLD]


def test_shares_are_exact_and_every_live_sample_comes_once(place: Mixed) -> None:
    place.add(10, 20)
    stream = place.mixed()
    first = taken(stream, 3)
    place.add(1, 0, 2, 40)
    then = taken(stream, 6)
    place.add(5, 2)
    place.writer.close()
    steps = first + then + taken(stream)
    rows = flat(steps)
    live, old = new_of(rows), [row for row in rows if row >= OLD]
    assert set(live) <= set(range(80))
    assert len(set(live)) == len(live)
    assert set(new_of(flat(first))) <= set(range(30))
    assert len(set(old)) == len(old) <= 60
    for lane in range(LANES):
        mine = [row for step in steps for row in step[lane * SIZE : (lane + 1) * SIZE]]
        assert abs(len(new_of(mine)) - 0.75 * len(mine)) < 4
    assert abs(len(live) - 0.75 * len(rows)) <= 1
    assert 80 - len(live) < 8 + LANES  # what fills no step more
    assert live != sorted(live)


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_a_resumed_stream_goes_on_as_if_nothing_had_happened(place: Mixed, world: int) -> None:
    place.add(30)
    ranks = [place.mixed(rank=rank, world=world) for rank in range(world)]
    before = [taken(rank, 2) for rank in ranks]
    state = ranks[0].state()
    assert all(rank.state() == state for rank in ranks)
    assert json.loads(state)["live"].keys() == {"new"}
    place.add(17)
    after = [taken(rank, 3) for rank in ranks]
    place.add(40)  # a replay must not see these where the recorded order does not
    resumed = place.mixed()
    resumed.resume(state)
    whole = [flat([rank[step] for rank in after]) for step in range(3)]
    assert taken(resumed, 3) == whole
    assert taken(place.mixed(), 5) == [flat([rank[step] for rank in before]) for step in range(2)] + whole


def test_the_order_of_a_live_source_is_its_own(place: Mixed) -> None:
    """What else is mixed with it says when its samples come, and not which."""
    place.add(50)
    place.writer.close()
    of_lanes = []
    for number, weights in enumerate(({"new": 3.0, "old": 1.0}, {"new": 1.0, "old": 1.0}, {"new": 1.0})):
        steps = taken(place.mixed(f"order-{number}", weights=weights))
        lanes = [[row for step in steps for row in step[lane * SIZE : (lane + 1) * SIZE]] for lane in range(LANES)]
        of_lanes.append([new_of(lane) for lane in lanes])
    for one, other in pairwise(of_lanes):
        for mine, others in zip(one, other, strict=True):
            shared = min(len(mine), len(others))
            assert shared > 8
            assert mine[:shared] == others[:shared]


def test_other_weights_from_a_state_on_lose_and_repeat_nothing(place: Mixed) -> None:
    place.add(60)
    stream = place.mixed()
    first = taken(stream, 4)
    changed = place.mixed(weights={"new": 1, "old": 3})
    changed.resume(stream.state())
    then = taken(changed, 4)
    live = new_of(flat(first + then))
    assert len(set(live)) == len(live) == 24 + 8
    again = place.mixed(weights={"new": 1, "old": 3})
    again.resume(changed.state())
    place.add(60)
    rest = taken(again, 8)
    live += new_of(flat(rest))
    assert len(set(live)) == len(live) == 24 + 8 + 16
    replay = place.mixed(weights={"new": 1, "old": 3})
    replay.resume(stream.state())
    assert taken(replay, 12) == then + rest


def test_a_reservoir_goes_on_in_whole_batches(place: Mixed) -> None:
    place.add(20)
    stream = place.mixed(reservoir={"samples": 12, "steps": 2})
    rows = flat(taken(stream, 8))
    live = new_of(rows)
    assert len(rows) == 64
    assert len(live) == 48
    assert set(live[:12]) <= set(range(20))
    assert max(Counter(live).values()) > 1
    assert taken(place.mixed(reservoir={"samples": 12, "steps": 2}), 8) == [rows[i : i + 8] for i in range(0, 64, 8)]
    eras = [json.loads(path.read_text()) for path in sorted((place.folder / "order" / "eras").glob("*.json"))]
    again = [era["steps"] for era in eras if era["kind"] == "reservoir"]
    assert set(again) == {3}, "two batches of two are four steps of one, and twelve samples fill three"


def audited(place: Mixed, steps: int) -> list[Any]:
    """What the audit finds, once it has located the rows that a feeder gives."""
    auditor = Auditor([Stage(0, 0, LANES, SIZE)], lambda _: place.opened())
    found = list(auditor.audit((step, None) for step in range(1, steps + 1)))
    feeder = open_feeder(place.opened(), "cpu")
    with feeder:
        for step in range(steps):
            rows = [feeder.batch(step, lane)["x"].tolist() for lane in range(LANES)]
            located = [auditor.locations(step + 1, lane) for lane in range(LANES)]
            assert [[row_of(place, at) for at in lane] for lane in located] == rows
    feeder.close()
    auditor.close()
    return found


def row_of(place: Mixed, location: Any) -> int:
    (part,) = location.parts
    assert part.source == location.source
    folder = "stream" if part.source == "new" else "old"
    lines = (place.folder / folder / part.file).read_text().splitlines()
    per_block = 3 if part.source == "new" else 7
    return int(json.loads(lines[part.row_group * per_block + part.rows[0]])["x"])


def test_the_audit_says_which_file_and_row_every_sample_was(place: Mixed) -> None:
    place.add(30)
    taken(place.mixed(), 3)
    place.add(30)
    taken(place.mixed(), 8)
    found = audited(place, 8)
    assert all(step.agrees for step in found)
    assert sum(step.samples for step in found) == 64


def test_read_ahead_or_not_and_in_any_order_it_is_the_same(place: Mixed) -> None:
    for _ in range(6):
        place.add(13)
        stream = place.mixed(segments_at_once=1)
    steps = taken(stream, 11)
    for ahead_bytes in (0, 1 << 20):
        reader = LaneReader(place.opened(), ahead_bytes=ahead_bytes)
        reader.expect((step, lane) for step in range(11) for lane in range(LANES))
        for step in (0, 1, 2, 10, 3, 9, 4, 5):
            assert flat([reader.batch(step, lane)["x"].tolist() for lane in range(LANES)]) == steps[step]
        reader.close()


def test_the_end_names_the_source(place: Mixed) -> None:
    place.add(10)
    place.writer.close()
    with open_feeder(place.opened(), "cpu") as feeder:
        assert isinstance(feeder, LiveFeeder)
        with pytest.raises(DataEnded, match=r"\(source 'new'\) has no step 4: 1 are all \(source 'new': the manifest"):
            feeder.batch(3, 0)


def test_the_deadline_names_the_setting_of_the_source(place: Mixed) -> None:
    with (
        open_feeder(place.opened(deadline_s=0.05), "cpu") as feeder,
        pytest.raises(
            DataError, match=r"within data\.sources\.new\.live\.deadline_s=0\.05 s \(source 'new': .*0 segments are"
        ),
    ):
        feeder.batch(0, 0)


def test_a_checkpoint_of_another_order_is_refused_by_name(place: Mixed) -> None:
    place.add(30)
    stream = place.mixed()
    taken(stream, 3)
    state = stream.state()
    era = place.folder / "order" / "eras" / "0000000000.json"
    era.write_text(era.read_text().replace('"why":""', '"why":"x"'))
    with pytest.raises(DataError, match=r"^data\.sources\.new: .*era 0 of the recorded order is another one"):
        place.mixed().resume(state)
    spec = et.data.mixture({"old": place.spec().sources["old"]}, weights={"old": 1})
    without = et.data.stream(spec, batch_size=LANES * SIZE, lanes=LANES, seed=5)
    without.resume(state)  # a source that is not read any more is not asked for


def test_columns_must_be_alike(place: Mixed, tmp_path: Path) -> None:
    file = tmp_path / "stream" / "other.jsonl"
    file.write_text("".join(json.dumps({"y": row}) + "\n" for row in range(20)))
    place.writer.append(file)
    source = place.opened()
    assert source.growth is not None
    said = r"^data\.sources\.new: segment 0 \(other.jsonl\): its columns are y.*those of the other sources are x"
    with pytest.raises(DataError, match=said):
        source.growth.advance(needed=True)
    assert not (tmp_path / "order").exists()
    alone = place.source("order of another mixture")
    assert alone.advance(needed=True)
    assert alone.schema == "y: int64"
    with pytest.raises(DataError, match=r"data\.sources\.new: .*belongs to another run"):
        place.opened("order of another mixture")


def test_columns_that_two_workers_have_decided_apart_are_refused_at_once(tmp_path: Path) -> None:
    places = {name: Place(tmp_path / name) for name in ("a", "b")}
    spec = et.data.mixture({name: place.data() for name, place in places.items()}, weights={"a": 1, "b": 1})
    workers = [open_mixture(spec, seed=5, lanes=LANES, lane_batch_size=SIZE) for _ in range(3)]
    for place, column in zip(places.values(), "xy", strict=True):
        file = place.folder / "stream" / "rows.jsonl"
        file.write_text("".join(json.dumps({column: row}) + "\n" for row in range(40)))
        place.writer.append(file)
    for worker, name in zip(workers, places, strict=False):  # each has seen one of them first
        source = worker.sources[name]
        assert isinstance(source, LiveSource)
        assert source.advance(needed=True)
    said = r"data\.sources\.{}: .*{}.*order.* have the columns {}: int64; those of the other sources are {}: int64"
    for worker, words in zip(workers, (("b", "b", "y", "x"), ("a", "a", "x", "y"), ("b", "b", "y", "x")), strict=True):
        assert worker.growth is not None
        with pytest.raises(DataError, match=said.format(*words)):
            deque(worker.growth.advance(needed=True) for _ in range(4))
        worker.close()


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"weights": None}, r"data says shares by the sizes .*set data\.weights"),
        ({"weights": None, "epochs": {"new": 1, "old": 2}}, r"set data\.weights"),
        ({"weights": None, "temperature": 2.0}, r"set data\.weights"),
        ({"stages": [{"from_step": 2, "temperature": 2.0}]}, r"set data\.stages\.0\.weights"),
        ({"stages": [{"from_step": 2, "epochs": {"old": 1.0}}]}, r"set data\.stages\.0\.weights"),
        ({"again": True}, r"each live source needs a folder of its own"),
    ],
)
def test_what_cannot_be_is_refused(place: Mixed, settings: dict[str, Any], what: str) -> None:
    sources = dict(place.spec().sources)
    if settings.pop("again", False):
        sources["once more"] = sources["new"]
    with pytest.raises(ConfigError, match=what):
        et.data.mixture(sources, **{"weights": {"new": 1, "old": 1}, **settings})


def test_each_order_has_a_folder_of_its_own(place: Mixed, tmp_path: Path) -> None:
    spec = place.spec()
    new = spec.sources["new"]
    live = new.live.model_copy(update={"record": None})  # type: ignore[union-attr]
    sources = {name: new.model_copy(update={"live": live}) for name in ("../a", "a/b")} | {"old": spec.sources["old"]}
    mixture = et.data.mixture(sources, weights={"../a": 1, "a/b": 1, "old": 1})
    assert mixture.lacks_record == "data.sources.../a"
    with pytest.raises(DataError, match=r"^data\.sources\.\.\./a: data\.live\.record is not set"):
        open_mixture(mixture, seed=5, lanes=LANES, lane_batch_size=SIZE)
    source = open_mixture(mixture, seed=5, lanes=LANES, lane_batch_size=SIZE, record=str(tmp_path / "orders"))
    place.add(40)
    assert source.growth is not None
    assert source.growth.advance(needed=True)
    assert {path.name for path in (tmp_path / "orders").iterdir()} == {record_folder("../a"), record_folder("a/b")}
    assert record_folder("../a") == "source-..%2Fa"


def test_a_feeder_reads_only_what_is_decided(place: Mixed) -> None:
    place.add(12)
    source = place.opened()
    assert source.growth is not None
    with LiveFeeder(Feeder(LaneReader(source)), source.growth) as feeder:
        feeder.expect((step, lane) for step in range(6) for lane in range(LANES))
        first = [feeder.batch(0, lane)["x"].tolist() for lane in range(LANES)]
        place.add(40)
        rest = [feeder.batch(step, lane)["x"].tolist() for step in range(1, 6) for lane in range(LANES)]
    steps = [flat((first + rest)[at : at + LANES]) for at in range(0, 24, LANES)]
    assert steps == taken(place.mixed(), 6)


def test_samples_of_a_reservoir_count_by_themselves(place: Mixed) -> None:
    place.add(20)
    steps = taken(place.mixed(reservoir={"samples": 12, "steps": 2}), 8)
    source = place.opened(reservoir={"samples": 12, "steps": 2})
    assert len(steps) == 8
    names = {source.order_of(w)[0] for step in range(8) for w, _, _ in source.spans(step, 0)}
    assert names == {"new", "new/reservoir", "old"}
    assert all(step.agrees for step in audited(place, 8))
