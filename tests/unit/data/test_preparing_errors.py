"""`elastictrain data prepare` without Ray: bad input and wrong use."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from elastictrain.data.preparing.driver import NewPartMaker, in_this_process, prepare_data
from elastictrain.data.preparing.part import TRIES
from elastictrain.errors import ClusterError, ConfigError, DataError
from elastictrain.prepare_settings import parse_preparation
from tests.support.preparing import (
    DOCUMENTS,
    Interrupted,
    StopsAfter,
    rows_in,
    settings_for,
    write_input,
)

HERE = "tests.support.preparing"


def refused(settings: Any, kind: type[Exception], words: str, **more: Any) -> None:
    with pytest.raises(kind, match=words):
        prepare_data(settings, **more)


def test_a_folder_that_is_in_use_is_refused(tmp_path: Path) -> None:
    source, out = write_input(tmp_path / "in"), tmp_path / "out"
    settings = settings_for(source, out)
    with pytest.raises(Interrupted):
        prepare_data(settings, StopsAfter(1))
    refused(settings, ConfigError, r"there is an unfinished preparation in it; finish it with --resume, or choose")
    changed = settings_for(source, out, seed=6, deduplicate="exact")
    refused(changed, ConfigError, r"\n  deduplicate was 'no' and is now 'exact'\n  seed was 5 and is now 6\n",
            resume=True)  # fmt: skip
    prepare_data(settings, resume=True)
    refused(settings, ConfigError, r"there is a finished preparation in it; choose another folder$")
    refused(changed, ConfigError, r"seed was 5 and is now 6", resume=True)
    other = tmp_path / "other"
    other.mkdir()
    (other / "letters.parquet").write_bytes(b"mine")
    mine = settings_for(source, other)
    refused(mine, ConfigError, r"the folder holds something else \(letters\.parquet\)")
    refused(mine, ConfigError, r"the folder holds something else", resume=True)
    assert (other / "letters.parquet").read_bytes() == b"mine"


def test_an_input_or_function_that_changes_in_between_is_refused(tmp_path: Path) -> None:
    source, out = write_input(tmp_path / "in"), tmp_path / "out"
    function = tmp_path / "mine.py"
    function.write_text("def keep(rows):\n    return [True] * rows.num_rows\n")
    settings = settings_for(source, out, filter=f"{function}:keep")
    with pytest.raises(Interrupted):
        prepare_data(settings, StopsAfter(1))
    function.write_text("def keep(rows):\n    return [False] * rows.num_rows\n")
    refused(settings, ConfigError, r"\n  the file of filter \(.*mine\.py:keep\) has changed\n", resume=True)
    function.write_text("def keep(rows):\n    return [True] * rows.num_rows\n")
    write_input(source, row_group_size=10)
    (source / "1.parquet").unlink()
    refused(settings, ConfigError, r"\n  1\.parquet is missing\n  0\.parquet has changed\n", resume=True)


def test_another_pyarrow_does_not_go_on_with_what_is_unfinished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = settings_for(write_input(tmp_path / "in"), tmp_path / "out")
    with pytest.raises(Interrupted):
        prepare_data(settings, StopsAfter(1))
    begun_with = pa.__version__
    with monkeypatch.context() as other:
        other.setattr(pa, "__version__", "0.0.1")
        refused(settings, ConfigError, rf"begun with pyarrow {begun_with}, and this is pyarrow 0\.0\.1, .* install "
                rf"pyarrow=={begun_with} to go on", resume=True)  # fmt: skip
    index = prepare_data(settings, resume=True)
    assert index["plan"]["pyarrow"] == begun_with
    monkeypatch.setattr(pa, "__version__", "0.0.1")
    assert prepare_data(settings, resume=True) == index, "what is finished is not written again"


@pytest.mark.parametrize("pass_", ["parts", "files"])
def test_a_node_with_another_pyarrow_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pass_: str) -> None:
    settings = settings_for(write_input(tmp_path / "in"), tmp_path / "out")

    def elsewhere(new_maker: Any, numbers: Sequence[int]) -> Iterator[dict[str, Any]]:
        if isinstance(new_maker, NewPartMaker) == (pass_ == "parts"):
            monkeypatch.setattr(pa, "__version__", "0.0.1")
        yield from in_this_process(new_maker, numbers)

    with pytest.raises(ClusterError, match=r"has pyarrow 0\.0\.1, and the preparation was begun with .* on all nodes"):
        prepare_data(settings, elsewhere)
    assert len(list((tmp_path / "out" / "_work").glob("part-*.json"))) == (0 if pass_ == "parts" else 12)
    assert not list((tmp_path / "out").glob("*.parquet"))
    monkeypatch.undo()
    prepare_data(settings, resume=True)


def test_errors_of_functions_name_file_row_group_and_row(tmp_path: Path) -> None:
    source = write_input(tmp_path / "in")
    # 80 documents a file, 20 a row group: number 77 is row 17 of row group 3 of the first file.
    settings = settings_for(source, tmp_path / "a", map=f"{HERE}:fails_at_77")
    refused(settings, DataError, r"0\.parquet, row group 3, row 17: map failed: ValueError: seventy-seven\. Let the")
    settings = settings_for(source, tmp_path / "b", filter=f"{HERE}:lower")
    refused(settings, DataError, r"0\.parquet, row group 0: filter returned Table, which is no array")
    settings = settings_for(source, tmp_path / "c", map=f"{HERE}:even")
    refused(settings, DataError, r"row group 0: map returned a ChunkedArray; expected a pyarrow\.Table")
    file = tmp_path / "mine.py"
    file.write_text(
        "import pyarrow as pa\n"
        "def short(rows):\n    return [True]\n"
        "def other(rows):\n    return rows.drop_columns(['text'])\n"
        "def changing(rows):\n"
        "    kind = pa.string() if 100 in rows.column('n').to_pylist() else pa.int64()\n"
        "    return rows.set_column(1, 'n', rows.column('n').cast(kind))\n"
        "class Broken:\n    def __init__(self):\n        raise OSError('no model')\n"
        "number = 7\n"
    )
    refused(settings_for(source, tmp_path / "d", filter=f"{file}:short"), DataError,
            r"row group 0: filter returned 1 values of type bool for 8 rows; expected a boolean for")  # fmt: skip
    refused(settings_for(source, tmp_path / "e", map=f"{file}:other"), DataError,
            r"row group 0: map returned n: int64; expected a column 'text' of strings or bytes")  # fmt: skip
    refused(settings_for(source, tmp_path / "f", map=f"{file}:changing", part_bytes=1 << 20), DataError,
            r"1\.parquet, row group 1: the columns are not those .* got text: string, n: string; expected text: "
            r"string, n: int64\. map must return the same")  # fmt: skip
    refused(settings_for(source, tmp_path / "g", map=f"{file}:Broken"), ConfigError,
            r"map: Broken\(\) failed: OSError: no model")  # fmt: skip
    refused(settings_for(source, tmp_path / "h", map=f"{file}:nothing"), ConfigError, r"mine\.py has no 'nothing'")
    refused(settings_for(source, tmp_path / "i", map=f"{file}:number"), ConfigError, r"got a int; expected a function")
    refused(
        settings_for(source, tmp_path / "j", map="no.such.module:f"), ConfigError, r"'no\.such\.module' does not import"
    )
    refused(
        settings_for(source, tmp_path / "k", map=f"{tmp_path}/no.py:f"), ConfigError, r"map: no such file \S+no\.py"
    )


def test_parts_whose_columns_differ_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "def changing(rows):\n"
        "    return rows if 100 not in rows.column('n').to_pylist() else rows.rename_columns(['text', 'm'])\n"
    )
    settings = settings_for(write_input(tmp_path / "in"), tmp_path / "out", map=f"{file}:changing", part_bytes=100,
                            batch_rows=1000)  # fmt: skip
    refused(
        settings, DataError, r"^part 5 of the input: the columns are not those of the rows before: got text: string, m"
    )


def test_corrupt_row_groups_are_named_or_left_out(tmp_path: Path) -> None:
    source = write_input(tmp_path / "in")
    path = source / "1.parquet"
    place = pq.ParquetFile(path).metadata.row_group(2).column(0)
    content = bytearray(path.read_bytes())
    at = place.dictionary_page_offset
    content[at : at + place.total_compressed_size] = b"\xff" * place.total_compressed_size
    path.write_bytes(content)
    refused(settings_for(source, tmp_path / "a"), DataError, r"1\.parquet: corrupt Parquet file: row group 2 cannot be")
    index = prepare_data(settings_for(source, tmp_path / "b", on_corrupt="skip"))
    assert [hole[:2] for hole in index["holes"]] == [["1.parquet", 2]]
    assert sorted(row["n"] for row in rows_in(tmp_path / "b")) == [*range(120), *range(140, DOCUMENTS)]
    (source / "2.parquet").write_bytes(b"no Parquet at all")
    index = prepare_data(settings_for(source, tmp_path / "c", on_corrupt="skip"))
    assert [hole[:2] for hole in index["holes"]] == [["2.parquet", -1], ["1.parquet", 2]]


def test_texts_that_are_too_long_or_no_utf8_are_named(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    source = tmp_path / "in"
    source.mkdir()
    raw = pa.array([b"fine", b"fine too", b"not \xff fine", b"a longer one"], pa.binary())
    table = pa.table({"text": pa.StringArray.from_buffers(4, *raw.buffers()[1:]), "n": range(4)})
    pq.write_table(table, source / "a.parquet", row_group_size=4)
    vocabulary = tokenizers.Tokenizer(tokenizers.models.WordLevel({"fine": 0, "?": 1}, unk_token="?"))
    vocabulary.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    vocabulary.save(str(tmp_path / "t.json"))
    settings = settings_for(source, tmp_path / "a", tokenizer=str(tmp_path / "t.json"))
    refused(
        settings,
        DataError,
        r"a\.parquet, row group 0, row 2: the text is not valid UTF-8 \(invalid start byte, byte 0xff",
    )
    settings = settings_for(source, tmp_path / "b", tokenizer="bytes", max_document_bytes=11)
    refused(
        settings, DataError, r"a\.parquet, row group 0, row 3: the text has 12 bytes, more than max_document_bytes=11"
    )
    prepare_data(settings_for(source, tmp_path / "c", tokenizer="bytes"))
    assert len(rows_in(tmp_path / "c")) == 4


def test_nothing_left_is_an_error(tmp_path: Path) -> None:
    function = tmp_path / "mine.py"
    function.write_text("def none(rows):\n    return [False] * rows.num_rows\n")
    settings = settings_for(write_input(tmp_path / "in"), tmp_path / "out", filter=f"{function}:none")
    refused(settings, DataError, r"^no row is left of the 240 that were read; look at map and filter, or at path$")


def test_a_unit_that_never_ends_is_given_up(tmp_path: Path) -> None:
    settings = settings_for(write_input(tmp_path / "in"), tmp_path / "out")
    with pytest.raises(Interrupted):
        prepare_data(settings, StopsAfter(0))

    def died_before(new_maker: Any, numbers: Any) -> Any:
        for attempt in range(TRIES):
            (tmp_path / "out" / "_work" / f"try-part-{numbers[0]:06d}-{attempt}").write_bytes(b"")
        return in_this_process(new_maker, numbers)

    refused(settings, ClusterError, r"^part 0 was begun 4 times, and each time its process died\.", execute=died_before,
            resume=True)  # fmt: skip
    prepare_data(settings, resume=True)
    assert len(rows_in(tmp_path / "out")) == DOCUMENTS


def test_columns_that_are_not_there_and_columns_that_clash(tmp_path: Path) -> None:
    source = write_input(tmp_path / "in")
    refused(settings_for(source, tmp_path / "a", columns=["m"]), DataError,
            r"0\.parquet: text_column or columns name 'm'.*The columns are: text: string, n: int64")  # fmt: skip
    refused(settings_for(source, tmp_path / "b", text_column="n", columns=None), DataError,
            r"0\.parquet: text_column 'n' has type int64; expected strings or bytes")  # fmt: skip
    refused(
        settings_for(source, tmp_path / "c", columns={"n": "whole"}),
        ConfigError,
        r"columns\.n: 'whole' is no Arrow type",
    )
    rename = tmp_path / "mine.py"
    rename.write_text("def tokens(rows):\n    return rows.rename_columns(['text', 'tokens'])\n")
    refused(settings_for(source, tmp_path / "d", map=f"{rename}:tokens", tokenizer="bytes"), DataError,
            r"behind map: there is a column 'tokens' already; rename it in map")  # fmt: skip
    prepare_data(settings_for(source, tmp_path / "e", columns={"n": "double"}))
    assert pq.read_schema(tmp_path / "e" / "part-000000.parquet").field("n").type == pa.float64()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"deduplicate": "exact", "shuffle": "none"}, "deduplicate brings equal documents together by the shuffle"),
        ({"text_column": None, "tokenizer": "bytes"}, "tokenizer is about documents; set text_column"),
        ({"text_column": None, "deduplicate": "exact"}, "deduplicate is about documents; set text_column"),
        ({"map": "nothing"}, 'map=\'nothing\': expected "module:function" or "file.py:function"'),
        ({"kind": "text", "text_column": "t"}, "kind: text has one column, called text"),
        ({"sed": 1}, "unknown setting 'sed'; did you mean 'seed'?"),
        ({"file_bytes": 0}, "file_bytes: Input should be greater than or equal to 1"),
    ],
)
def test_settings_that_do_not_fit(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(words)):
        parse_preparation({"kind": "parquet", "path": "a", "out": "b", "text_column": "text", **settings})
