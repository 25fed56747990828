"""Records that are decided once are not written to a store where two could decide."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pytest
from fsspec import AbstractFileSystem
from fsspec.implementations.memory import MemoryFileSystem

from elastictrain.data import stream
from elastictrain.data.live_order import NOTHING, Held, fresh_era
from elastictrain.data.live_record import OrderRecord
from elastictrain.data.retry import Retry
from elastictrain.data.segments import SegmentWriter
from elastictrain.errors import DataError
from elastictrain_checkpoint import Store
from tests.unit.data.live_place import Place


class Looking(MemoryFileSystem):
    """Looks whether a file is there, and then writes."""

    protocol = "looking"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    pipe_file = AbstractFileSystem.pipe_file
    cachable = False

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return "/" + path.removeprefix("looking://").strip("/")


@pytest.fixture(autouse=True)
def looking() -> Iterator[None]:
    fsspec.register_implementation("looking", Looking, clobber=True)
    Looking.store = {}
    yield
    Looking.store = {}


ERA = fresh_era(NOTHING, (), [Held(8, 2, "x")], per_step=8, most=1)


def test_a_manifest_is_not_written_there(tmp_path: Path) -> None:
    with pytest.raises(
        DataError,
        match=r"^looking://stream: Looking offers no conditional create.* set the writer's url \(data\.path\) to",
    ):
        SegmentWriter("looking://stream")
    assert Looking.store == {}


def test_an_order_is_not_recorded_there(tmp_path: Path) -> None:
    record = OrderRecord("looking://order", {"seed": 1}, storage_options=None, retry=Retry())
    assert ERA is not None
    with pytest.raises(
        DataError,
        match=r"^looking://order: Looking offers .* set data\.live\.record \(or checkpoint\.path\) to a folder",
    ):
        record.decide(ERA)
    assert Looking.store == {}
    assert record.last() is None  # but to read it is no matter


def test_a_run_hears_of_it_before_its_first_step(tmp_path: Path) -> None:
    place = Place(tmp_path)
    place.add(20)
    data = place.data()
    assert data.live is not None
    live = data.live.model_copy(update={"record": "looking://order"})
    batches = iter(stream(data.model_copy(update={"live": live}), batch_size=8, lanes=4))
    with pytest.raises(DataError, match=r"^looking://order: Looking offers no conditional create"):
        next(batches)


def test_every_writer_asks_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    probe = Store.probe_exclusive

    def counting(self: Store, path: str) -> str:
        asked.append(path)
        return probe(self, path)

    monkeypatch.setattr(Store, "probe_exclusive", counting)
    place = Place(tmp_path)
    place.add(8, 8, 8)
    assert len(asked) == 1
    assert asked[0].startswith("_segments/.probe-")
    source = place.source()
    assert source.advance(needed=False)
    place.add(8)
    assert source.advance(needed=False)
    assert len(asked) == 2
    assert asked[1].startswith("eras/.probe-")
    other = place.source()  # begins with what is recorded, and asks before it decides something itself
    assert len(asked) == 2
    place.add(8)
    assert other.advance(needed=False)
    assert len(set(asked)) == 3
    assert sorted(path.name for path in (tmp_path / "order" / "eras").iterdir()) == [f"{n:010d}.json" for n in range(3)]


def test_a_probe_that_fails_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failures = [ConnectionError("reset"), ConnectionError("reset")]
    probe = Store.probe_exclusive

    def failing(self: Store, path: str) -> str:
        if failures:
            raise failures.pop()
        return probe(self, path)

    monkeypatch.setattr(Store, "probe_exclusive", failing)
    monkeypatch.setattr("elastictrain.data.retry._pause", lambda _: None)
    record = OrderRecord(str(tmp_path), {"seed": 1}, storage_options=None, retry=Retry(10))
    assert ERA is not None
    assert record.decide(ERA) == ERA
    failures[:] = [ConnectionError("reset")]
    tired = OrderRecord(str(tmp_path), {"seed": 1}, storage_options=None, retry=Retry(0))
    with pytest.raises(DataError, match=r"eras: cannot be written \(reset.*Set data\.live\.record"):
        tired.decide(ERA)
