"""Open segments: one that cannot be read just now keeps nobody from the others, and each is asked for once."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import elastictrain as et
from elastictrain.data import live_segments, source
from elastictrain.data.live import open_live
from elastictrain.data.live_record import OrderRecord
from elastictrain.data.segments import SegmentLog, SegmentWriter
from elastictrain.data.source import Source
from elastictrain.errors import DataError
from tests.unit.data.live_place import FAST, Place, open_rows, reading

WAIT_S = 30.0


@pytest.fixture
def place(tmp_path: Path) -> Place:
    made = Place(tmp_path)
    made.add(8, 8, 8)  # three blocks and one step each
    open_rows(made.source(segments_at_once=1), 3)
    return made


class Stall:
    """Something that does not go on until it is let."""

    def __init__(self) -> None:
        self.begun, self.let = threading.Event(), threading.Event()
        self.times = 0

    def here(self) -> None:
        self.times += 1
        self.begun.set()
        assert self.let.wait(WAIT_S), "nobody lets it go on"


@pytest.fixture
def stall() -> Iterator[Stall]:
    made = Stall()
    yield made
    made.let.set()


def started(*actions: Callable[[], Any]) -> tuple[list[threading.Thread], list[Any]]:
    found: list[Any] = []

    def run(action: Callable[[], Any]) -> None:
        try:
            found.append(action())
        except DataError as error:
            found.append(error)

    threads = [threading.Thread(target=run, args=(action,), daemon=True) for action in actions]
    for thread in threads:
        thread.start()
    return threads, found


def ended(threads: list[threading.Thread]) -> bool:
    for thread in threads:
        thread.join(WAIT_S / 2)
    return not any(thread.is_alive() for thread in threads)


def test_a_segment_that_cannot_be_read_keeps_nobody_from_the_others(
    place: Place, stall: Stall, monkeypatch: pytest.MonkeyPatch
) -> None:
    live = place.source(segments_at_once=1)
    expected = reading(live, 3)
    read_block = Source.read_block

    def stalling(self: Source, block: int) -> Any:
        if str(self.spec.path).endswith("part-001.jsonl"):
            stall.here()
        return read_block(self, block)

    monkeypatch.setattr(Source, "read_block", stalling)
    waiting, late = started(lambda: live.read_block(3))
    assert stall.begun.wait(WAIT_S)
    others, found = started(
        lambda: live.read_block(0)["x"].tolist(),
        lambda: live.where(6, 0),
        lambda: [list(live.spans(step, lane)) for step in range(3) for lane in range(4)],
        lambda: live.location(7, 1).block,
        lambda: live.describe()["samples"],
    )
    assert ended(others), "they wait for a segment that they do not need"
    assert [0, 1, 2] in found
    assert 7 in found
    assert 24 in found
    assert waiting[0].is_alive()
    stall.let.set()
    assert ended(waiting)
    assert late[0]["x"].tolist() == [8, 9, 10]
    monkeypatch.undo()
    assert reading(live, 3) == expected


def test_a_segment_that_is_being_opened_keeps_nobody_either_and_is_opened_once(
    place: Place, stall: Stall, monkeypatch: pytest.MonkeyPatch
) -> None:
    live = place.source(segments_at_once=1)
    open_source = live_segments.open_source

    def stalling(spec: Any, **settings: Any) -> Source:
        if str(spec.path).endswith("part-001.jsonl"):
            stall.here()
        return open_source(spec, **settings)

    monkeypatch.setattr(live_segments, "open_source", stalling)
    waiting, late = started(lambda: list(live.spans(1, 0)), lambda: list(live.spans(1, 1)), lambda: live.read_block(4))
    assert stall.begun.wait(WAIT_S)
    others, found = started(
        lambda: [list(live.spans(step, 2)) for step in (0, 2)], lambda: live.mark_of(1)["era"], lambda: live.samples
    )
    assert ended(others)
    assert len(found) == 3
    stall.let.set()
    assert ended(waiting)
    assert len(late) == 3
    assert not [one for one in late if isinstance(one, Exception)]
    assert stall.times == 1


def test_who_waited_for_an_opening_that_fails_tries_itself(
    place: Place, stall: Stall, monkeypatch: pytest.MonkeyPatch
) -> None:
    live = place.source(segments_at_once=1)
    open_source = live_segments.open_source

    def failing(spec: Any, **settings: Any) -> Source:
        if str(spec.path).endswith("part-001.jsonl") and not stall.begun.is_set():
            stall.here()
            raise DataError("not now")
        return open_source(spec, **settings)

    monkeypatch.setattr(live_segments, "open_source", failing)
    waiting, late = started(lambda: live.read_block(3))
    assert stall.begun.wait(WAIT_S)
    more, later = started(lambda: live.read_block(4)["x"].tolist())
    stall.let.set()
    assert ended(waiting + more)
    assert str(late[0]).endswith("part-001.jsonl): not now")
    assert later == [[11, 12, 13]]


def test_an_era_that_cannot_be_read_keeps_nobody_from_those_that_are_known(
    place: Place, stall: Stall, monkeypatch: pytest.MonkeyPatch
) -> None:
    live = place.source(segments_at_once=1)  # knows the last era
    get = OrderRecord.get

    def stalling(self: OrderRecord, number: int) -> Any:
        if number == 0:
            stall.here()
        return get(self, number)

    monkeypatch.setattr(OrderRecord, "get", stalling)
    waiting, _ = started(lambda: list(live.spans(0, 0)))
    assert stall.begun.wait(WAIT_S)
    others, found = started(lambda: len(list(live.spans(2, 0))), lambda: live.read_block(6)["x"].tolist())
    assert ended(others)
    assert [16, 17, 18] in found
    assert waiting[0].is_alive()
    stall.let.set()
    assert ended(waiting)


def test_of_many_segments_some_are_open_and_none_is_closed_while_it_is_read(
    place: Place, stall: Stall, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live_segments, "_MOST_OPEN", 1)
    closed: list[str] = []
    close, read_block = Source.close, Source.read_block

    def closing(self: Source) -> None:
        closed.append(Path(str(self.spec.path)).stem)
        close(self)

    def stalling(self: Source, block: int) -> Any:
        if str(self.spec.path).endswith("part-000.jsonl"):
            stall.here()
        return read_block(self, block)

    monkeypatch.setattr(Source, "close", closing)
    monkeypatch.setattr(Source, "read_block", stalling)
    live = place.source(segments_at_once=1)
    waiting, late = started(lambda: live.read_block(0)["x"].tolist())
    assert stall.begun.wait(WAIT_S)
    assert live.read_block(3)["x"].tolist() == [8, 9, 10]
    assert closed == []  # the first one is in use
    assert live.read_block(6)["x"].tolist() == [16, 17, 18]
    assert closed == ["part-001"]
    stall.let.set()
    assert ended(waiting)
    assert late == [[0, 1, 2]]
    assert closed == ["part-001", "part-000"]
    live.close()
    assert closed == ["part-001", "part-000", "part-002"]


def test_the_manifest_is_asked_when_a_segment_is_opened(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    get = SegmentLog.get

    def counting(self: SegmentLog, ordinal: int) -> Any:
        asked.append(ordinal)
        return get(self, ordinal)

    monkeypatch.setattr(SegmentLog, "get", counting)
    live = place.source(segments_at_once=1)
    first = reading(live, 3)
    assert sorted(asked) == [0, 1, 2]
    assert reading(live, 3) == first
    assert [live.read_block(block)["x"].tolist() for block in range(9)] == [
        list(range(start + 3 * n, min(start + 3 * n + 3, start + 8))) for start in (0, 8, 16) for n in range(3)
    ]
    assert {live.location(block, 0).parts[0].file for block in range(9)} == {f"part-{n:03d}.jsonl" for n in range(3)}
    assert len(asked) == 3
    monkeypatch.setattr(live_segments, "_MOST_OPEN", 1)
    again = place.source(segments_at_once=1)
    for block in (0, 3, 0, 3):
        again.read_block(block)
    assert asked[3:] == [0, 1, 0, 1]


def test_all_segments_share_a_tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tokenizers")
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {word: number for number, word in enumerate(("<unk>", "lorem", "ipsum", "dolor"))}
    made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.save(str(tmp_path / "tokenizer.json"))
    writer = SegmentWriter(tmp_path / "stream")
    for number in range(4):
        file = tmp_path / "stream" / f"{number}.txt"
        file.write_text("lorem ipsum dolor\n" * 20)
        writer.append(file)
    data = et.data.text(
        str(tmp_path / "stream"), sequence_length=7, tokenizer=str(tmp_path / "tokenizer.json"), rows_per_block=4,
        live={**FAST, "record": str(tmp_path / "order")},
    )  # fmt: skip
    loads = {"live": 0, "source": 0}
    for name, module in (("live", et.data.live), ("source", source)):
        load = module.load_tokenizer

        def counting(*args: Any, name: str = name, load: Any = load) -> Any:
            loads[name] += 1
            return load(*args)

        monkeypatch.setattr(module, "load_tokenizer", counting)
    live = open_live(data, seed=1, lanes=2, lane_batch_size=1)
    assert live.advance(needed=False)
    tokens = {token for block in range(20) for token in live.read_block(block)["tokens"].ravel().tolist()}
    assert tokens == {1, 2, 3, 4}  # words, and the end of a document
    assert loads == {"live": 1, "source": 0}


def test_reading_ahead_opens_nothing_and_comes_to_what_is_prepared(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    reservoir = {"samples": 12, "steps": 1}
    deciding = place.source(reservoir=reservoir)
    assert deciding.advance(needed=True)
    assert deciding.decided == 4
    live = place.source(segments_at_once=1)
    monkeypatch.setattr(live_segments, "_MOST_OPEN", 1)  # what is known of a segment stays when it is closed
    live.prepare(0)
    opened: list[str] = []
    open_source = live_segments.open_source

    def counting(spec: Any, **settings: Any) -> Source:
        opened.append(Path(str(spec.path)).stem)
        return open_source(spec, **settings)

    monkeypatch.setattr(live_segments, "open_source", counting)
    (window, _, _), *_ = live.spans(0, 2)
    for era in (1, 2):
        assert live.after(window) is window
        assert live.rows_per_step(window, 0) == 0
        assert opened == [f"part-{n:03d}" for n in range(1, era)]
        live.prepare(era)
        assert opened == [f"part-{n:03d}" for n in range(1, era + 1)]
        assert live.rows_per_step(window, 0) == 2
        window = live.after(window)
        assert window.epoch == era
    assert live.after(window).epoch == 3  # the reservoir's segments are known
    assert len(opened) == 2
    last = live.after(window)
    assert live.after(last) is last
    late = place.source(segments_at_once=1)
    late.prepare(2)
    (window, _, _), *_ = late.spans(2, 2)
    assert late.after(window) is window  # of its twelve samples eight are at hand
    late.prepare(1)
    assert late.after(window).epoch == 3


def test_what_cannot_be_opened_ahead_is_no_error_yet(place: Place) -> None:
    (place.folder / "stream" / "part-001.jsonl").unlink()
    live = place.source(segments_at_once=1)
    live.prepare(1)
    live.prepare(99)
    (window, _, _), *_ = live.spans(0, 2)
    assert live.after(window) is window
    with pytest.raises(DataError, match=r"segment 1 .* does not exist"):
        list(live.spans(1, 2))
