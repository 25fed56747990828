"""Live sources: an order that grows, recorded once; kills, resumptions and other worlds change no sample of it."""

from __future__ import annotations

import json
import re
import threading
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import elastictrain as et
from elastictrain.data import LaneReader
from elastictrain.data.audit import Auditor
from elastictrain.data.feeder import Feeder
from elastictrain.data.live import LiveSource, open_live
from elastictrain.data.live_feeder import LiveFeeder
from elastictrain.data.locate import Part
from elastictrain.data.segments import SegmentWriter
from elastictrain.data.streaming import Stream
from elastictrain.errors import ConfigError, DataEnded, DataError
from elastictrain.job import Data
from elastictrain.protocol import Stage

FAST = {"poll_s": 0.01, "deadline_s": 30.0}


class Place:
    """A manifest of JSON lines, whose rows are numbered in the order of arrival, and a record of an order."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.rows = folder, 0
        self.writer = SegmentWriter(folder / "stream")

    def add(self, *counts: int) -> None:
        for count in counts:
            file = self.folder / "stream" / f"part-{self.writer.log.count():03d}.jsonl"
            file.write_text("".join(json.dumps({"x": self.rows + row}) + "\n" for row in range(count)))
            self.rows += count
            self.writer.append(file)

    def data(self, record: str = "order", **live: Any) -> Data:
        settings = {key: live.pop(key) for key in ("shuffle", "on_corrupt", "retry_s") if key in live}
        return et.data.jsonl(
            str(self.folder / "stream"), rows_per_block=3, window_row_groups=2,
            live={**FAST, "record": str(self.folder / record), **live}, **settings,
        )  # fmt: skip

    def stream(self, record: str = "order", *, rank: int = 0, world: int = 1, **live: Any) -> Stream:
        return et.data.stream(self.data(record, **live), batch_size=8, lanes=4, seed=5, rank=rank, world=world)

    def source(self, record: str = "order", seed: int = 5, **live: Any) -> LiveSource:
        return open_live(self.data(record, **live), seed=seed, lanes=4, lane_batch_size=2)


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def taken(stream: Stream, steps: int | None = None) -> list[list[int]]:
    iterator = iter(stream)
    found = [batch["x"].tolist() for batch in islice(iterator, steps)]
    iterator.close()  # type: ignore[attr-defined]
    return found


def flat(steps: list[list[int]]) -> list[int]:
    return [x for step in steps for x in step]


def test_every_sample_comes_once_until_the_manifest_is_closed(place: Place) -> None:
    place.add(10, 20)
    stream = place.stream()
    first = taken(stream, 3)
    assert set(flat(first)) <= set(range(30))
    place.add(1, 0, 2, 40)
    then = taken(stream, 6)  # 73 samples are 9 steps of 8, and one more is left over
    place.add(5, 2)
    place.writer.close()
    rest = taken(stream)
    used = flat(first + then + rest)
    assert len(first) + len(then) + len(rest) == 10
    assert Counter(used) <= Counter(range(80))
    assert len(used) == 80
    assert stream.source.describe()["ended"].startswith("the manifest is closed; 8 segments are there, 0 of 8 samples")
    assert used != sorted(used)


def test_without_a_shuffle_it_is_the_order_of_arrival(place: Place) -> None:
    place.add(11, 3)
    stream = place.stream(shuffle="strict")
    first = taken(stream, 1)
    place.add(9, 9)
    place.writer.close()
    assert flat(first + taken(stream)) == list(range(32))


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_a_resumed_stream_goes_on_as_if_nothing_had_happened(place: Place, world: int) -> None:
    place.add(30)
    ranks = [place.stream(rank=rank, world=world) for rank in range(world)]
    before = [taken(rank, 2) for rank in ranks]
    state = ranks[0].state()
    assert all(rank.state() == state for rank in ranks)
    assert len(state) <= 256
    place.add(17)
    after = [taken(rank, 3) for rank in ranks]
    place.add(40)  # a replay must not see these where the recorded order does not
    resumed = place.stream()
    resumed.resume(state)
    whole = [flat([rank[step] for rank in after]) for step in range(3)]
    assert taken(resumed, 3) == whole
    replay = place.stream()
    assert taken(replay, 5) == [flat([rank[step] for rank in before]) for step in range(2)] + whole


def test_another_record_of_the_same_segments_may_be_another_order(place: Place) -> None:
    place.add(16)
    one = taken(place.stream(), 2)
    place.add(16)
    together = taken(place.stream(record="other"), 4)
    assert together[:2] != one
    assert sorted(flat(together)) == list(range(32))
    assert sorted(flat(one + taken(place.stream(), 4)[2:])) == list(range(32))


def test_an_order_is_of_one_run(place: Place) -> None:
    place.add(16)
    taken(place.stream(), 1)
    order = place.folder / "order" / "order.json"
    looked = place.source(record="only looked at")
    assert not (place.folder / "only looked at").exists()
    looked.advance(needed=True)
    assert (place.folder / "only looked at" / "order.json").read_bytes() == order.read_bytes()
    one, two = (place.source(record="two at once", seed=seed) for seed in (5, 6))
    one.advance(needed=True)
    with pytest.raises(DataError, match="belongs to another run"):
        two.advance(needed=True)
    with pytest.raises(DataError, match=r"belongs to another run: seed was 5 and is now 6\. .*data\.live\.record"):
        place.source(seed=6)
    (place.folder / "elsewhere").mkdir()
    other = Place(place.folder / "elsewhere")
    other.add(16)
    with pytest.raises(DataError, match=r"manifest was .* and is now"):
        open_live(other.data(record="../order"), seed=5, lanes=4, lane_batch_size=2)


def test_several_processes_decide_one_order(place: Place) -> None:
    place.add(24)
    one, two = place.source(), place.source()
    assert one.advance(needed=False)
    place.add(24)
    assert two.advance(needed=False)  # not an era of its own, with all that it sees by now
    assert [s.decided for s in (one, two)] == [3, 3]
    assert two.advance(needed=False)
    assert one.advance(needed=True)
    assert not one.advance(needed=True)
    assert [one.mark_of(step) for step in range(6)] == [two.mark_of(step) for step in range(6)]
    assert one.waiting_for.endswith("2 segments are there, 0 of 8 samples for the next step")
    with pytest.raises(
        DataError, match=r"step 6 of the order that is recorded in .* is not decided: 6 steps are so far"
    ):
        LaneReader(one).batch(6, 0)


def test_segments_come_into_the_order_some_at_a_time(place: Place) -> None:
    place.add(*[4] * 10)
    source = place.source(segments_at_once=3)
    found = []
    while source.advance(needed=False):
        found.append(source.decided)
    assert found == [1, 3, 4, 5]
    assert source.samples == 40
    small = place.source(record="small", segments_at_once=1)
    assert small.advance(needed=False)
    assert (small.decided, small.samples) == (1, 8)  # one segment fills no step


def reading(source: LiveSource, steps: int) -> list[list[list[int]]]:
    reader = LaneReader(source)
    return [[reader.batch(step, lane)["x"].tolist() for lane in range(4)] for step in range(steps)]


def test_a_reservoir_keeps_training_from_the_last_samples(place: Place) -> None:
    place.add(20)
    stream = place.stream(reservoir={"samples": 12, "steps": 2})
    first = taken(stream, 2)
    again = taken(stream, 6)
    assert set(flat(first)) <= set(range(20))
    assert set(flat(again)) == set(range(8, 20))
    assert len({tuple(step) for step in again}) == 6  # another order each time
    place.add(20)
    rest = taken(stream, 6)
    fresh = [step for step in rest if any(x >= 20 for x in step)]
    assert len(fresh) >= 3
    state = stream.state()
    resumed = place.stream(reservoir={"samples": 12, "steps": 2})
    assert taken(resumed, 14) == first + again + rest
    resumed = place.stream()  # the policy is not part of what is recorded
    resumed.resume(state)
    place.add(40)
    assert min(flat(taken(resumed, 1))) >= 16


def test_a_reservoir_smaller_than_a_step(place: Place) -> None:
    place.add(8)
    source = place.source(reservoir={"samples": 3})
    assert [source.advance(needed=True) for _ in range(3)] == [True] * 3
    batches = reading(source, 3)
    assert sorted(flat(batches[0])) == list(range(8))
    assert {x for step in batches[1:] for x in flat(step)} == {5, 6, 7}


@pytest.mark.parametrize("live", [{"reservoir": {"samples": 8}}, {"policy": "stop"}])
def test_only_who_needs_a_step_goes_on_without_new_segments_and_all_follow(place: Place, live: dict[str, Any]) -> None:
    place.add(8)
    one, two = place.source(**live), place.source(**live)
    assert [one.advance(needed=False) for _ in range(3)] == [True, False, False]
    assert one.advance(needed=True)
    assert two.advance(needed=False)
    assert two.advance(needed=False)
    assert (two.decided, two.ended) == (one.decided, one.ended)


def test_a_reservoir_of_nothing_waits(place: Place) -> None:
    source = place.source(reservoir={"samples": 3})
    assert not source.advance(needed=True)
    place.add(3)
    assert not source.advance(needed=True)
    place.add(5)
    assert source.advance(needed=True)


def test_stopping_where_nothing_new_is_there(place: Place) -> None:
    place.add(20)
    stream = place.stream(policy="stop")
    assert len(taken(stream)) == 2
    place.add(20)
    assert taken(place.stream(policy="stop"), 9) == taken(place.stream(policy="wait"), 9)  # an end is an end
    feeder = LiveFeeder(Feeder(LaneReader(place.source())), place.source())
    with (
        feeder,
        pytest.raises(DataEnded, match=r"has no step 3: 2 are all \(data\.live\.policy: stop, and no new segment"),
    ):
        feeder.batch(2, 0)


def test_waiting_has_a_deadline_and_a_reason(place: Place) -> None:
    place.add(9)
    stream = place.stream(deadline_s=0.3)
    with pytest.raises(
        DataError, match=r"step 2: nothing new within .*=0\.3 s \(.*1 segments are there, 1 of 8 samples"
    ):
        taken(stream, 2)


def test_what_waits_can_be_called_off_and_does_not_block_what_is_there(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    place.add(8)
    source = place.source()
    with LiveFeeder(Feeder(LaneReader(source)), source) as feeder:
        feeder.expect([(step, lane) for step in range(3) for lane in range(4)])
        assert feeder.batch(0, 0)["x"].tolist() == place_of(source, 0, 0)

        class Enough(Exception): ...

        def enough() -> None:
            raise Enough

        feeder.while_waiting = enough
        with pytest.raises(Enough):
            feeder.batch(1, 0)
        assert feeder.batch(0, 3)["x"].tolist() == place_of(source, 0, 3)
        feeder.while_waiting = lambda: place.add(8) if source.decided == 1 and place.rows == 8 else None
        monkeypatch.setattr("elastictrain.data.live_feeder.SAY_AFTER_S", 0.0)
        said: list[str | None] = []
        feeder.say = said.append
        late = feeder.batch(1, 2)
        assert said[-1] is None
        assert re.fullmatch(r"step 2: .*/stream: 1 segments are there, 0 of 8 samples for the next step", str(said[0]))
        assert len(said) == 2
        assert late["x"].tolist() == place_of(source, 1, 2)
        assert late.waited["arrival"] > 0
        assert "arrival" not in feeder.batch(1, 1).waited


def test_what_was_handed_out_is_not_read_again_when_the_order_grows(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: Counter[tuple[int, int]] = Counter()
    batch = LaneReader.batch

    def counting(self: LaneReader, step: int, lane: int) -> Any:
        read[step, lane] += 1
        return batch(self, step, lane)

    monkeypatch.setattr(LaneReader, "batch", counting)
    place.add(16)
    source = place.source()
    with LiveFeeder(Feeder(LaneReader(source)), source) as feeder:
        feeder.expect([(step, lane) for step in range(8) for lane in range(4)])
        for step in range(8):
            if place.rows < 64:
                place.add(8)
            for lane in range(4):
                feeder.batch(step, lane)
    assert read == Counter({(step, lane): 1 for step in range(8) for lane in range(4)})


def place_of(source: LiveSource, step: int, lane: int) -> list[int]:
    return LaneReader(source).batch(step, lane)["x"].tolist()


def test_the_audit_knows_a_live_order(place: Place) -> None:
    place.add(20, 13)
    source = place.source(reservoir={"samples": 12, "steps": 2})
    while source.decided < 4:
        source.advance(needed=False)
    source.advance(needed=True)
    place.add(15)
    while source.decided < 8:
        source.advance(needed=False)
    auditor = Auditor([Stage(0, 0, 4, 2)], lambda _: source)
    found = list(auditor.audit((step, None) for step in range(1, 9)))
    assert [step.repeated for step in found] == [0] * 8
    assert [step.epoch for step in found] == [0] * 4 + [1] * 2 + [2] * 2
    batch = LaneReader(source).batch(7, 1)
    assert auditor.ids(8, 1).tolist() == batch.ids.tolist()
    where = auditor.locations(8, 1)
    assert [place_in(sample.parts[0]) for sample in where] == batch["x"].tolist()
    assert where == source.locate(7, 1)
    twice = Auditor([Stage(0, 0, 4, 2, jumps=()), Stage(1, 2, 4, 2, continues=True, begun=0, at=1)], lambda _: source)
    assert [step.repeated for step in twice.audit((step, None) for step in (1, 2, 3))] == [0, 0, 8]


def test_the_audit_sees_a_sample_that_two_eras_use(place: Place) -> None:
    place.add(16)
    open_rows(place.source(shuffle="strict"), 2)
    place.add(16)
    open_rows(place.source(shuffle="strict"), 4)
    era = place.folder / "order" / "eras" / "0000000001.json"
    era.write_text(json.dumps(json.loads(era.read_text()) | {"carry": [[0, 0, 1]]}))
    auditor = Auditor([Stage(0, 0, 4, 2)], lambda _: place.source(shuffle="strict"))
    assert [step.repeated for step in auditor.audit((step, None) for step in range(1, 5))] == [0, 0, 1, 0]
    auditor.close()


def place_in(part: Part) -> int:
    assert part.rows is not None
    first = {"part-000.jsonl": 0, "part-001.jsonl": 20, "part-002.jsonl": 33}[part.file]
    return first + 3 * part.row_group + part.rows[0]


def open_rows(source: LiveSource, steps: int) -> None:
    while source.decided < steps and source.advance(needed=False):
        pass


@pytest.mark.parametrize("how", ["changed", "longer", "gone", "record gone"])
def test_a_segment_of_the_order_must_stay_what_it_was(place: Place, how: str) -> None:
    place.add(16, 16)
    open_rows(place.source(segments_at_once=1), 4)
    file = place.folder / "stream" / "part-001.jsonl"
    if how == "changed":
        file.write_text(file.read_text().replace('"x": 20', '"x": 99'))
        match = r"segment 1 \(.*part-001\.jsonl\) has changed since it became part of the order \(it had 16 samples"
    elif how == "longer":
        file.write_text(file.read_text() + '{"x": 1}\n')
        match = r"segment 1 \(.*part-001\.jsonl\) has \d+ bytes; it had \d+ when it was appended"
    elif how == "gone":
        file.unlink()
        match = r"segment 1 \(.*part-001\.jsonl\): data\.path: .* does not exist"
    else:
        (place.folder / "stream" / "_segments" / "0000000001.json").unlink()
        match = r"segment 1 is part of the order, but the manifest .* has no record of it"
    later = place.source(segments_at_once=1)
    reader = LaneReader(later)
    assert sorted(x for lane in range(4) for step in (0, 1) for x in reader.batch(step, lane)["x"].tolist()) == list(
        range(16)
    )
    with pytest.raises(DataError, match=match):
        reader.batch(2, 0)


def test_a_segment_that_cannot_be_used_is_named(place: Place) -> None:
    place.add(16)
    source = place.source()
    open_rows(source, 2)
    torn = place.folder / "stream" / "torn.jsonl"
    torn.write_text('{"x": 1}\n' * 9)
    place.writer.append(torn)
    torn.write_text('{"x": 2}\n' * 9)
    with pytest.raises(DataError, match=r"segment 1 \(.*torn\.jsonl\): its bytes are not those that were appended"):
        source.advance(needed=True)
    torn.write_text('{"x": 1}\n' * 9)
    assert source.advance(needed=True)
    other = place.folder / "stream" / "other.jsonl"
    other.write_text('{"y": 1}\n' * 9)
    place.writer.append(other)
    with pytest.raises(
        DataError, match=r"segment 2 \(.*other\.jsonl\): its columns are y: int64; those .* are x: int64"
    ):
        source.advance(needed=True)


def test_a_corrupt_segment_stops_or_is_left_out(place: Place) -> None:
    place.add(8)
    broken = place.folder / "stream" / "broken.jsonl"
    broken.write_text("not JSON\n" * 9)
    place.writer.append(broken)
    place.add(8)
    source = place.source()
    with pytest.raises(DataError, match=r"segment 1 \(.*broken\.jsonl\): "):
        source.advance(needed=True)
    skipping = place.source(on_corrupt="skip")
    open_rows(skipping, 2)
    assert sorted(x for lanes in reading(skipping, 2) for lane in lanes for x in lane) == list(range(16))


def test_text_is_packed_segment_by_segment_and_nothing_is_lost(tmp_path: Path) -> None:
    texts = [[f"document {s} {n} " + "y" * (n % 23) for n in range(40)] for s in range(3)]
    writer = SegmentWriter(tmp_path / "stream")
    for number, rows in enumerate(texts):
        pq.write_table(pa.table({"text": rows}), tmp_path / f"{number}.parquet", row_group_size=9)
        writer.append(tmp_path / f"{number}.parquet")
    writer.close()
    for packing in ("concatenate", "best_fit"):
        data = et.data.parquet(
            str(tmp_path / "stream"), text_column="text", sequence_length=31, packing=packing, document_ids=True,
            live={**FAST, "record": str(tmp_path / packing), "segments_at_once": 1},
        )  # fmt: skip
        stream = et.data.stream(data, batch_size=2, seed=1)
        found = Counter(token for batch in stream for row in batch["tokens"].tolist() for token in row)
        expected = Counter(byte for rows in texts for text in rows for byte in text.encode())
        unused = expected - found
        assert sum(unused.values()) <= 32  # one row at most fills no step
        assert not {byte: n for byte, n in (found - expected).items() if byte != 256}


def test_a_mark_of_a_record_that_was_changed(place: Place) -> None:
    place.add(16)
    source = place.source()
    open_rows(source, 2)
    mark = source.mark_of(1)
    source.check(mark)
    with pytest.raises(DataError, match="era 0 of the recorded order is another one"):
        source.check({**mark, "digest": "0" * 32})
    with pytest.raises(DataError, match="era 1 of the recorded order is missing"):
        source.check({**mark, "era": 1})
    era = place.folder / "order" / "eras" / "0000000000.json"
    place.add(8)
    open_rows(source, 3)
    record = json.loads(era.read_text())
    era.write_text(json.dumps({**record, "why": "changed"}))
    later = place.source()
    with pytest.raises(DataError, match="another one"):
        later.check(mark)
    era.write_text("{")
    with pytest.raises(DataError, match="cannot be made again: restore the file"):
        LaneReader(later).batch(0, 0)


def test_a_stream_is_not_taken_up_with_another_record(place: Place) -> None:
    place.add(16)
    stream = place.stream()
    taken(stream, 1)
    (place.folder / "order" / "eras" / "0000000000.json").unlink()
    place.add(3)
    later = place.stream()
    with pytest.raises(DataError, match="era 0 of the recorded order is missing"):
        later.resume(stream.state())
    taken(later, 1)
    with pytest.raises(DataError, match="era 0 of the recorded order is another one"):
        place.stream().resume(stream.state())


def test_an_era_that_follows_another_one_is_refused(place: Place) -> None:
    place.add(8, 8)
    one = place.source(segments_at_once=1)
    assert one.advance(needed=False)
    late = place.source(segments_at_once=1)
    assert one.advance(needed=False)
    era = place.folder / "order" / "eras" / "0000000001.json"
    era.write_text(json.dumps(json.loads(era.read_text()) | {"before": "0" * 32}))
    with pytest.raises(DataError, match="era 1 does not follow era 0"):
        late.advance(needed=False)


def test_far_into_the_order_only_what_is_needed_is_read(place: Place) -> None:
    place.add(*[8] * 60)
    source = place.source(segments_at_once=1)
    open_rows(source, 60)
    expected = reading(source, 60)
    later = place.source(segments_at_once=1)
    assert sorted(later._eras._eras) == [59]
    reader = LaneReader(later)
    assert [reader.batch(59, lane)["x"].tolist() for lane in range(4)] == expected[59]
    assert [reader.batch(17, lane)["x"].tolist() for lane in range(4)] == expected[17]
    assert len(later._eras._eras) <= 2 * 6 + 1  # two searches among 60


def test_what_cannot_be_opened(tmp_path: Path, place: Place) -> None:
    (tmp_path / "empty").mkdir()
    data = place.data()
    with pytest.raises(DataError, match="holds no manifest of segments"):
        open_live(data.model_copy(update={"path": str(tmp_path / "empty")}), seed=1, lanes=1, lane_batch_size=1)
    assert data.live is not None
    bare = data.model_copy(update={"live": data.live.model_copy(update={"record": None})})
    with pytest.raises(DataError, match=r"data\.live\.record is not set"):
        open_live(bare, seed=1, lanes=1, lane_batch_size=1)
    with pytest.raises(ConfigError, match="a live source has none"):
        et.data.stream(data, batch_size=8, epochs=1)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"live": {"policy": "reservoir"}}, "they belong together"),
        ({"live": {"policy": "wait", "reservoir": {"samples": 3}}}, "they belong together"),
        ({"live": {}, "ragged": "repeat"}, "no epochs to fill up"),
        ({"live": {}, "path": ("a", "b")}, "one manifest of segments"),
        ({"live": {"segments_at_once": 0}}, "segments_at_once"),
        ({"live": {"deadline_s": -1}}, "deadline_s"),
    ],
)
def test_settings_that_do_not_fit(settings: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        et.data.jsonl(**{"path": "x", **settings})


def test_no_live_source_in_a_mixture(place: Place) -> None:
    with pytest.raises(ConfigError, match="cannot be one of a mixture"):
        et.data.mixture({"a": place.data()})


def test_a_writer_beside_two_ranks_that_are_taken_up_again_and_again(place: Place) -> None:
    def write() -> None:
        for count in [5, 9, 1, 0, 30, 2, 2, 2, 50, 8, 8, 16, 3] * 3:
            place.add(count)
        place.writer.close()

    writing = threading.Thread(target=write)
    writing.start()

    def rank(number: int) -> Iterator[list[int]]:
        state, done = None, False
        while not done:
            stream = place.stream(rank=number, world=2)
            if state is not None:
                stream.resume(state)
            steps = taken(stream, 4)
            yield from steps
            state, done = stream.state(), len(steps) < 4

    found: list[list[list[int]]] = [[], []]
    ranks = [threading.Thread(target=lambda n=n: found[n].extend(rank(n))) for n in range(2)]
    for thread in ranks:
        thread.start()
    for thread in (writing, *ranks):
        thread.join(120)
    whole = [one + other for one, other in zip(*found, strict=True)]
    assert len(whole) == place.rows // 8
    assert not Counter(flat(whole)) - Counter(range(place.rows))
    assert taken(place.stream()) == whole


def test_a_live_source_on_s3(tmp_path: Path, bucket: str, options: dict[str, Any]) -> None:
    url = f"s3://{bucket}/stream"
    writer = SegmentWriter(url, storage_options=options)
    data = et.data.jsonl(
        url, rows_per_block=3, live={**FAST, "record": f"s3://{bucket}/order"}, storage_options=options, retry_s=5
    )

    def add(first: int, count: int) -> None:
        file = tmp_path / f"{first}.jsonl"
        file.write_text("".join(json.dumps({"x": first + row}) + "\n" for row in range(count)))
        writer.append(file)

    add(0, 20)
    stream = et.data.stream(data, batch_size=8, lanes=4, seed=5)
    first = taken(stream, 2)
    add(20, 20)
    writer.close()
    then = taken(stream)
    assert sorted(flat(first + then)) == list(range(40))
    replay = et.data.stream(data, batch_size=8, lanes=4, seed=5)
    assert taken(replay) == first + then
