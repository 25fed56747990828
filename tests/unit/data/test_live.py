"""Live sources: an order that grows, recorded once; kills, resumptions and other worlds change no sample of it."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from elastictrain.data import LaneReader
from elastictrain.data.audit import Auditor
from elastictrain.data.feeder import Feeder
from elastictrain.data.live import LiveSource, open_live
from elastictrain.data.live_feeder import LiveFeeder
from elastictrain.data.locate import Part
from elastictrain.data.runs import Run
from elastictrain.errors import DataEnded, DataError
from elastictrain.protocol import Stage
from tests.unit.data.live_place import Place, flat, open_rows, reading, taken


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


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
    hand_out = LaneReader._hand_out

    def counting(self: LaneReader, run: Run) -> int:
        read[run.next, run.lane] += 1
        return hand_out(self, run)

    monkeypatch.setattr(LaneReader, "_hand_out", counting)
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
