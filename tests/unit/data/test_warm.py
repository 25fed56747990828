"""The warm cache: the same bits, made in passing, found again by whoever has the same data, and always checked."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from elastictrain.data import LaneReader, open_data, open_source
from elastictrain.data.warm import WarmCache, cache_key, cache_root
from elastictrain.job import Data, Mixture

ARRAYS = {"tokens": np.arange(60, dtype=np.uint16).reshape(4, 15), "weight": np.linspace(0, 1, 4)}


def cache(folder: Path, limit: int = 1 << 30, **fingerprint: Any) -> WarmCache:
    return WarmCache(folder / "warm", {"files_hash": "a", **fingerprint}, limit)


def same(found: dict[str, Any] | None, expected: dict[str, Any]) -> None:
    assert found is not None
    assert list(found) == list(expected)
    for name, array in expected.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)


KINDS = st.sampled_from(["u1", "u2", "i4", "i8", "f4", "f8", "?"])
SHAPES = st.lists(st.integers(0, 5), min_size=1, max_size=3)


@given(st.lists(st.tuples(KINDS, SHAPES), min_size=1, max_size=4))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_is_stored_comes_back(tmp_path: Path, columns: list[tuple[str, list[int]]]) -> None:
    arrays = {f"c{n}": np.arange(np.prod(shape)).astype(kind).reshape(shape) for n, (kind, shape) in enumerate(columns)}
    warm = cache(tmp_path)
    assert warm.store(7, arrays)
    same(cache(tmp_path).load(7), arrays)
    assert cache(tmp_path).load(8) is None


def test_mapped_arrays_cannot_be_written_to(tmp_path: Path) -> None:
    warm = cache(tmp_path)
    warm.store(0, ARRAYS)
    found = warm.load(0)
    assert found is not None
    with pytest.raises(ValueError, match="read-only"):
        found["tokens"][0, 0] = 1


def test_any_damaged_byte_is_seen_and_the_file_goes(tmp_path: Path) -> None:
    warm = cache(tmp_path)
    warm.store(3, ARRAYS)
    (path,) = warm.folder.iterdir()
    whole = path.read_bytes()
    content = [*range(0, len(whole), 7), len(whole) - 40]
    zeros = {at for at in range(len(whole)) if whole[at] == 0}
    for at in content:
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x40]) + whole[at + 1 :])
        if (found := cache(tmp_path).load(3)) is not None:
            assert at in zeros, "only padding may differ"
            same(found, ARRAYS)
        else:
            assert not path.exists()
    for cut in (0, 5, 31, 100, len(whole) - 1):
        path.write_bytes(whole[:cut])
        assert cache(tmp_path).load(3) is None
        assert not path.exists()
    path.write_bytes(whole + b"x")
    assert cache(tmp_path).load(3) is None
    (warm.folder / "block-00000004").write_bytes(whole)  # a block under another one's name
    assert cache(tmp_path).load(4) is None


def test_a_block_that_was_opened_stays_mapped_and_a_new_process_checks_it_again(tmp_path: Path) -> None:
    cache(tmp_path).store(3, ARRAYS)
    warm = cache(tmp_path)
    first = warm.load(3)
    (path,) = warm.folder.iterdir()
    whole = path.read_bytes()
    path.unlink()
    same(warm.load(3), ARRAYS)
    assert warm.load(3) is first
    assert warm.hits == 3
    path.write_bytes(whole[:-3])
    assert cache(tmp_path).load(3) is None


def test_no_more_blocks_stay_mapped_than_a_process_may_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("elastictrain.data.warm._MAPPED_BLOCKS", 2)
    warm = cache(tmp_path)
    for block in range(4):
        warm.store(block, ARRAYS)
    for block in (0, 1, 0, 2, 3):
        same(warm.load(block), ARRAYS)
    assert list(warm._mapped) == [2, 3]
    same(warm.load(0), ARRAYS)


def test_a_process_without_descriptors_removes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    warm = cache(tmp_path)
    warm.store(0, ARRAYS)

    def none_left(*_: Any) -> Any:
        raise OSError(errno.EMFILE, "Too many open files")

    with monkeypatch.context() as short:
        short.setattr("elastictrain.data.warm._open", none_left)
        assert warm.load(0) is None
    assert warm.damaged == 0
    same(warm.load(0), ARRAYS)


def test_what_is_no_number_is_not_stored(tmp_path: Path) -> None:
    assert not cache(tmp_path).store(0, {"s": np.asarray(["a"], dtype=object)})


def test_the_limit_holds_and_the_least_recently_used_data_go_first(tmp_path: Path) -> None:
    old, older = cache(tmp_path, files_hash="old"), cache(tmp_path, files_hash="older")
    for at, one in ((1, older), (2, old)):
        one.store(0, ARRAYS)
        os.utime(one.folder, (at, at))
    size = next(old.folder.iterdir()).stat().st_size
    warm = cache(tmp_path, limit=3 * size)
    assert warm.store(0, ARRAYS)
    assert warm.store(1, ARRAYS)
    assert (older.folder.exists(), old.folder.exists()) == (False, True)
    assert warm.store(2, ARRAYS)
    assert not old.folder.exists()
    assert not warm.store(3, ARRAYS)
    assert not warm.store(4, ARRAYS), "it stays full"
    assert sum(path.stat().st_size for path in warm.root.rglob("block-*")) <= 3 * size
    assert warm.load(2) is not None


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "warm").write_text("a file")
    warm = cache(tmp_path)
    assert not warm.store(0, ARRAYS)
    assert warm.load(0) is None


def test_the_key_is_of_the_content_and_not_of_the_order() -> None:
    plain = {"files_hash": "a", "tokenizer": "bytes-1", "packing": {"version": 1, "sequence_length": 8}}
    order = {"lanes": 3, "lane_batch_size": 1, "shuffle": "none", "window_row_groups": 4, "hash": "x", "samples": 9}
    assert cache_key(plain | order) == cache_key(plain | dict.fromkeys(order))
    changes = ({"files_hash": "b"}, {"tokenizer": "b"}, {"packing": {"version": 1, "sequence_length": 9}})
    assert len({cache_key(plain | change) for change in changes} | {cache_key(plain)}) == 4


TABLE = {"text_column": None, "sequence_length": None, "columns": ("n",)}


def spec(folder: Path, **changes: Any) -> Data:
    (folder / "data").mkdir(exist_ok=True)
    if not (folder / "data" / "a.parquet").exists():
        texts = [f"document {n} " * (n % 5) for n in range(300)]
        pq.write_table(pa.table({"text": texts, "n": range(300)}), folder / "data" / "a.parquet", row_group_size=30)
    base = {"kind": "parquet", "path": str(folder / "data"), "text_column": "text", "sequence_length": 16}
    return Data(**(base | {"warm_cache_bytes": 1 << 30} | changes))


def read_all(data: Data, seed: int = 1, lanes: int = 4, epochs: int = 2) -> tuple[list[bytes], LaneReader]:
    reader = LaneReader(open_source(data, seed=seed, lanes=lanes, lane_batch_size=2))
    steps = epochs * reader.source.steps_per_epoch
    found = [reader.batch(step, lane) for step in range(steps) for lane in range(lanes)]
    reader.close()
    return [b"".join(batch[name].tobytes() for name in sorted(batch)) for batch in found], reader


@pytest.mark.parametrize(
    "changes", [{}, {"text_column": None, "sequence_length": None, "columns": ("n",)}], ids=["text", "table"]
)
def test_batches_are_the_same_bits_and_a_second_reader_decodes_nothing(tmp_path: Path, changes: dict[str, Any]) -> None:
    cold, _ = read_all(spec(tmp_path, warm_cache_bytes=0, **changes))
    first, writer = read_all(spec(tmp_path, **changes))
    second, reader = read_all(spec(tmp_path, **changes))
    other, _ = read_all(spec(tmp_path, warm_cache_bytes=0, **changes), seed=2, lanes=3)
    warm_other, again = read_all(spec(tmp_path, **changes), seed=2, lanes=3)
    assert first == second == cold
    assert warm_other == other != cold
    filled = np.count_nonzero(writer.source.order.block_rows)
    assert writer.blocks_decoded == filled, "each block once, however many epochs"
    assert reader.blocks_decoded == again.blocks_decoded == 0
    assert reader.facts.warm > 0


def test_a_damaged_block_is_decoded_again_and_stored_anew(tmp_path: Path) -> None:
    cold, _ = read_all(spec(tmp_path))
    (folder,) = cache_root().iterdir()
    victim = sorted(folder.iterdir())[2]
    raw = bytearray(victim.read_bytes())
    raw[-70] ^= 1
    victim.write_bytes(raw)
    again, reader = read_all(spec(tmp_path))
    assert again == cold
    assert reader.blocks_decoded == 1
    assert read_all(spec(tmp_path))[1].blocks_decoded == 0


def test_other_data_under_the_same_path_find_nothing_of_the_old(tmp_path: Path) -> None:
    read_all(spec(tmp_path))
    table = pa.table({"text": [f"other {n} " * (n % 5) for n in range(300)], "n": range(300)})
    pq.write_table(table, tmp_path / "data" / "a.parquet", row_group_size=30)
    cold, _ = read_all(spec(tmp_path, warm_cache_bytes=0))
    warm, reader = read_all(spec(tmp_path))
    assert warm == cold
    assert reader.facts.decoded > 0
    assert len(list(cache_root().iterdir())) == 2


def test_headers_are_json_that_can_be_read_elsewhere(tmp_path: Path) -> None:
    warm = cache(tmp_path)
    warm.store(5, ARRAYS)
    raw = warm._path(5).read_bytes()
    length = int.from_bytes(raw[8:16], "little")
    header = json.loads(raw[32 : 32 + length])
    assert header["block"] == 5
    assert [(a["name"], a["dtype"], a["shape"]) for a in header["arrays"]] == [
        ("tokens", "<u2", [4, 15]), ("weight", "<f8", [4])
    ]  # fmt: skip


def test_a_mixture_and_document_ids_have_blocks_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in "ab":
        (tmp_path / name).mkdir()
        texts = [f"{name} {number} " + "y" * (number % 9) for number in range(60)]
        pq.write_table(pa.table({"text": texts}), tmp_path / name / "t.parquet", row_group_size=10)

    def batches(names: str, **settings: Any) -> tuple[LaneReader, list[dict[str, list[Any]]]]:
        one = {"kind": "parquet", "text_column": "text", "sequence_length": 15, **settings}
        sources = {name: Data.model_validate({**one, "path": str(tmp_path / name)}) for name in names}
        spec = Mixture(sources=sources, sequence_length=15) if len(names) > 1 else sources[names]
        reader = LaneReader(
            open_data(spec.model_copy(update={"warm_cache_bytes": limit}), seed=3, lanes=2, lane_batch_size=2)
        )
        found = [reader.batch(step, lane) for step in range(6) for lane in range(2)]
        return reader, [{key: array.tolist() for key, array in batch.items()} for batch in found]

    kinds: list[tuple[str, dict[str, Any]]] = [("a", {}), ("a", {"document_ids": True}), ("ab", {}), ("ba", {})]
    kinds.append(("ab", {"document_ids": True}))
    limit = 0
    cold = [batches(names, **settings)[1] for names, settings in kinds]
    limit = 1 << 30
    for _ in range(2):
        assert [batches(names, **settings)[1] for names, settings in kinds] == cold
    again = batches("ab")[0]
    assert again.warm is not None
    assert (again.blocks_decoded, again.warm.hits > 0) == (0, True)
    other = open_data(again.source.spec, seed=9, lanes=5, lane_batch_size=1)
    assert cache_key(other.content) == cache_key(again.source.content), "another order of the same mixture"


def test_blocks_of_bytes_have_keys_that_earlier_versions_did_not_have() -> None:
    """Those kept a token in two bytes."""

    def plain(content: dict[str, Any]) -> str:
        text = json.dumps(content, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    stored, of_bytes = {"kind": "parquet", "tokenizer": "stored-1-bytes-1"}, {"kind": "parquet", "tokenizer": "bytes-1"}
    assert cache_key(stored) == plain(stored)
    assert cache_key(of_bytes) not in (plain(of_bytes), cache_key(stored))
    assert cache_key({"sources": {"a": of_bytes}}) == plain({"sources": {"a": cache_key(of_bytes)}})
