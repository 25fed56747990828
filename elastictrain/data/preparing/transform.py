"""From the rows of a block to the rows that are written: map, filter, hash, tokenise; batch by batch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from elastictrain.data.columns import as_pairs, is_text, show_schema
from elastictrain.data.preparing.functions import kept, made, mapped
from elastictrain.data.preparing.near import band_keys, bands_for, signatures_of
from elastictrain.data.preparing.rows import Words, keys_in_order, keys_of_places, keys_of_texts, places_of
from elastictrain.data.tokenizers import Tokenizer, load_tokenizer
from elastictrain.errors import DataError
from elastictrain.prepare_settings import Preparation

TOKENS = "tokens"
KEY, TWIN, PLACE = "__key", "__twin", "__place"


@dataclass(frozen=True)
class Batch:
    """Rows with their keys. `table` has the columns that are written, then KEY, PLACE, and TWIN if rows may be equal.
    `read` and `filtered`: rows that came in, and that the filter took out.
    """

    table: pa.Table
    read: int
    filtered: int
    near: tuple[Words, Words] | None = None
    """Keys of bands, shape [documents, bands], and places of the documents that have some; None where nobody asks."""


class Transform:
    """What is done to the rows of any block; the same for every caller."""

    def __init__(self, settings: Preparation, functions: Mapping[str, Any], blocks: int) -> None:
        """`functions`: what `map` and `filter` name. `blocks`: of the whole input. Raises ConfigError, DataError."""
        self._settings, self._blocks = settings, blocks
        self._functions = {name: made(name, function) for name, function in functions.items()}
        self._tokenizer = None if settings.tokenizer is None else _load(settings)

    def batches(self, block: int, rows: pa.Table, where: str) -> Iterator[Batch]:
        """Yield what becomes of a block's rows. Raises DataError that begins with `where`."""
        row = out_row = 0
        while row < rows.num_rows:
            batch = rows.slice(row, self._settings.batch_rows)
            found = batch
            if "map" in self._functions:
                found = mapped(self._functions["map"], batch, where, row)
                self._check(found, where)
            behind = f"{where}, behind map" if "map" in self._functions else where
            places = places_of(block, out_row, found.num_rows)
            filtered = 0
            if "filter" in self._functions and found.num_rows:
                mask = kept(self._functions["filter"], found, behind, out_row)
                filtered = found.num_rows - int(pc.sum(mask).as_py() or 0)
                places, found = places[np.asarray(mask, dtype=bool)], found.filter(mask)
            row, out_row = row + batch.num_rows, out_row + found.num_rows + filtered
            near = self._near(found, places) if self._settings.near_duplicates else None
            yield Batch(self._keyed(block, found, places, behind), batch.num_rows, filtered, near)

    def _near(self, rows: pa.Table, places: Words) -> tuple[Words, Words]:
        how = self._settings.near_duplicates
        assert how is not None, "asked for"
        signatures, has = signatures_of(self._texts(rows), how.ngram, how.permutations)
        return band_keys(signatures[has], *bands_for(how.threshold, how.permutations)), places[has]

    def _texts(self, rows: pa.Table) -> pa.ChunkedArray:
        texts = rows.column(str(self._settings.text_column))
        return texts.cast(texts.type.value_type) if pa.types.is_dictionary(texts.type) else texts

    def _check(self, table: pa.Table, where: str) -> None:
        text = self._settings.text_column
        if text is not None and (text not in table.column_names or not is_text(table.schema.field(text).type)):
            raise DataError(
                f"{where}: map returned {show_schema(as_pairs(table.schema))}; expected a column {text!r} of strings "
                "or bytes in it (text_column)"
            )

    def _keyed(self, block: int, rows: pa.Table, places: Words, where: str) -> pa.Table:
        settings, twins = self._settings, None
        taken = {TOKENS} if self._tokenizer else set()
        clash = sorted((taken | {KEY, TWIN, PLACE}) & set(rows.column_names))
        if clash:
            raise DataError(f"{where}: there is a column {clash[0]!r} already; rename it in map")
        if settings.deduplicate == "exact":
            keys, twins = keys_of_texts(settings.seed, rows.column(str(settings.text_column)))
        elif settings.shuffle == "global":
            keys = keys_of_places(settings.seed, places)
        else:
            keys = keys_in_order(block, self._blocks, len(places))
        out = self._tokenised(rows, where, places) if self._tokenizer else rows
        out = out.append_column(KEY, pa.array(keys)).append_column(PLACE, pa.array(places))
        return out if twins is None else out.append_column(TWIN, pa.array(twins))

    def _tokenised(self, rows: pa.Table, where: str, places: Words) -> pa.Table:
        assert self._tokenizer is not None
        name = str(self._settings.text_column)
        texts = self._texts(rows)
        self._check_lengths(texts, where, places)
        tokens = tokens_of(self._tokenizer, texts, where, places)
        if name not in (self._settings.columns or ()):
            rows = rows.drop_columns([name])
        return rows.append_column(TOKENS, tokens)

    def _check_lengths(self, texts: pa.ChunkedArray, where: str, places: Words) -> None:
        lengths = pc.binary_length(texts.cast(pa.large_binary()))
        longest = pc.max(lengths).as_py() or 0
        if longest > self._settings.max_document_bytes:
            raise DataError(
                f"{where}, {_row(places, pc.index(lengths, longest).as_py())}: the text has {longest} bytes, more than "
                f"max_document_bytes={self._settings.max_document_bytes}. Cut or remove it in map or filter, or raise "
                "the limit if there is memory for it"
            )


def tokens_of(tokenizer: Tokenizer, texts: pa.ChunkedArray, where: str, places: Words) -> pa.Array:
    """Return the tokens of every text, its end of document included, as lists. Raises DataError that names the row."""
    if tokenizer.name != "bytes":
        texts = _as_strings(tokenizer, texts, where, places)
    tokens, starts = tokenizer.encode_with_offsets(texts)
    kind = np.uint16 if tokenizer.vocabulary_size <= 1 << 16 else np.int32
    return pa.LargeListArray.from_arrays(pa.array(starts, pa.int64()), pa.array(tokens.astype(kind, copy=False)))


def _as_strings(tokenizer: Tokenizer, texts: pa.ChunkedArray, where: str, places: Words) -> pa.ChunkedArray:
    raw = texts.cast(pa.large_binary())  # strings of a file need not be what they are declared to be
    try:
        return raw.cast(pa.large_string())
    except pa.ArrowInvalid:
        for row, text in enumerate(raw):
            try:
                bytes(text.as_py() or b"").decode("utf-8")
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{where}, {_row(places, row)}: the text is not valid UTF-8 ({error.reason}, byte "
                    f"0x{error.object[error.start]:02x}), which the tokenizer {tokenizer.name} needs. Mend or remove "
                    "it in map or filter, or set tokenizer: bytes"
                ) from error
        raise


def _row(places: Words, row: int) -> str:
    return f"row {int(places[row]) & 0xFFFFFFFF}"


def _load(settings: Preparation) -> Tokenizer:
    try:
        return load_tokenizer(str(settings.tokenizer), settings.storage_options)
    except DataError as error:
        raise DataError(str(error).replace("data.tokenizer", "tokenizer")) from error
