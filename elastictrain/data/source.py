"""A source: the files of a job's data, their index, their order, and the decoding of one block."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from elastictrain.data.batch_types import batch_types
from elastictrain.data.best_fit import BEST_FIT_VERSION
from elastictrain.data.columns import Schema, show_schema, stack
from elastictrain.data.files import FileSet, find_files
from elastictrain.data.fingerprint import seal_fingerprint
from elastictrain.data.formats import CUT_BY_ROWS, open_blocks
from elastictrain.data.ids import SampleIds, sample_ids
from elastictrain.data.index import BlockFormat, Progress, TokenIndex, checksum_of, read_texts
from elastictrain.data.locate import Part, SampleLocation
from elastictrain.data.order import ORDER_VERSION, LaneOrder, StrictOrder, Window
from elastictrain.data.packed import Arrays as Arrays
from elastictrain.data.packed import PackedText, finish_rows, pack_all_tails
from elastictrain.data.packing import PACKING_VERSION, Tails, rows_of_tails
from elastictrain.data.tokenizers import Tokenizer, load_tokenizer
from elastictrain.errors import DataError, NoSamples

if TYPE_CHECKING:
    from elastictrain.data_settings import Data


class Source:
    """Blocks of samples in a fixed order. Made by `open_source`; not thread-safe (`LaneReader` is).

    Token mode (`data.text_column` is set): a sample is a row of `sequence_length + 1` tokens, and the blocks of
    packed tails follow the blocks of the files. Table mode: a sample is a row of the table.
    """

    def __init__(
        self,
        spec: Data,
        files: FileSet,
        blocks: BlockFormat,
        order: LaneOrder | StrictOrder,
        *,
        tokenizer: Tokenizer | None,
        token_index: TokenIndex | None,
        tails: Tails | None,
    ) -> None:
        self.spec, self.order = spec, order
        self._files, self._blocks = files, blocks
        self._tokenizer, self._token_index, self._tails = tokenizer, token_index, tails
        self._packed = (
            PackedText(spec, blocks, tokenizer, token_index, tails) if tokenizer and token_index and tails else None
        )
        self._shapes: dict[str, tuple[tuple[int, ...], str]] = {}  # of a row of each column, and where it was seen
        self.fingerprint: dict[str, Any] = self._make_fingerprint()
        self._batch_types = batch_types(spec, self.vocabulary_size)

    @property
    def steps_per_epoch(self) -> int:
        return self.order.steps_per_epoch

    @property
    def samples(self) -> int:
        return self.order.samples

    @property
    def columns(self) -> Schema:
        """Name and type of the columns that are read."""
        return self._blocks.schema

    @property
    def schema(self) -> str:
        """The columns in words."""
        return show_schema(self.columns)

    @property
    def growth(self) -> None:
        """Its order is whole from the beginning."""
        return

    @property
    def tokenizer_fingerprint(self) -> str | None:
        """Says which tokens a text becomes; None in table mode."""
        return self._tokenizer.fingerprint if self._tokenizer else None

    @property
    def lanes(self) -> int:
        return self.order.lanes

    @property
    def vocabulary_size(self) -> int | None:
        """All tokens are below this; None in table mode."""
        return self._tokenizer.vocabulary_size if self._tokenizer else None

    @property
    def end_of_document(self) -> int | None:
        """The token that follows every document; None in table mode."""
        return self._tokenizer.end_of_document if self._tokenizer else None

    def describe(self) -> dict[str, Any]:
        """Return what a user wants to know of the source; JSON."""
        about: dict[str, Any] = {
            "kind": self.spec.kind,
            "files": len(self._files.files),
            "bytes": sum(file.size_bytes for file in self._files.files),
            "blocks": len(self._blocks.blocks),
            "rows": int(self._blocks.blocks.rows.sum()),
            "samples": self.order.samples,
            "steps_per_epoch": self.order.steps_per_epoch,
            "samples_dropped_per_epoch": self.order.dropped_per_epoch,
            "samples_repeated_per_epoch": self.order.repeated_per_epoch,
            "columns": dict(self._blocks.schema),
            "fingerprint": self.fingerprint["hash"],
        }
        if self._blocks.holes:
            about["holes"] = [hole._asdict() for hole in self._blocks.holes]
        if self._token_index is not None and self._tokenizer is not None and self._tails is not None:
            places = self.samples * (int(self.spec.sequence_length or 0) + 1)
            about |= {
                "tokenizer": self._tokenizer.name,
                "vocabulary_size": self._tokenizer.vocabulary_size,
                "tokens": int(self._token_index.tokens.sum()),
                "null_documents": self._token_index.null_documents,
                "tail_samples": len(self._tails.rows),
                "padding_tokens": places - int(self._token_index.tokens.sum()),
            }
        return about

    def read_block(self, block: int) -> Arrays:
        """Decode a block: {"tokens": [rows, sequence_length + 1]} ("byte_tokens" where they are kept in a byte each,
        see `data.byte_tokens`), or every column stacked to [rows, …].

        Raises DataError: the block is corrupt, has changed since the source was opened, or cannot be stacked.
        """
        if self._packed is not None:
            return self._packed.read_block(block)
        table = self._blocks.read(block)
        where = self._blocks.where(block)
        arrays = {name: stack(table.column(name), f"{where}, column {name!r}") for name in table.column_names}
        for name, array in arrays.items():
            self._check_shape(name, array, where)
        return arrays

    def _check_shape(self, name: str, array: npt.NDArray[Any], where: str) -> None:
        """Raise DataError for rows that cannot be stacked with those that were read first; it names both places."""
        shape, first = self._shapes.setdefault(name, (array.shape[1:], where)) if len(array) else ((), "")
        if first and shape != array.shape[1:]:
            raise DataError(
                f"{where}, column {name!r}: rows of different shapes {sorted([shape, array.shape[1:]])}; {shape} is "
                f"that of {first}. Expected lists of equal length in all files. Pad them before, or leave the column "
                "out of data.columns"
            )

    def rows_in(self, block: int) -> int:
        """Return how many samples a block has."""
        return int(self.order.block_rows[block])

    @property
    def content(self) -> dict[str, Any]:
        """What the content of decoded blocks follows from, and more: names a warm cache (see `data.warm`)."""
        return {**self.fingerprint, "document_ids": self.spec.document_ids}

    def order_of(self, window: Window) -> tuple[str, LaneOrder | StrictOrder]:
        """Return the name of the source that a window is of, "" here, and the order of that source."""
        del window
        return "", self.order

    def ids_of(self, window: Window, blocks: npt.ArrayLike, rows: npt.ArrayLike) -> SampleIds:
        """Return the ids of samples of a window (see `data.ids`)."""
        del window
        return sample_ids(blocks, rows)

    def spans(self, step: int, lane: int) -> Iterator[tuple[Window, int, int]]:
        """Yield the windows that batch `step` of `lane` touches, each with its `[start, stop)` in the window."""
        return self.order.spans(step, lane)

    def spans_at(self, start: int, stop: int, lane: int) -> Iterator[tuple[Window, int, int]]:
        """As `spans`, for the positions `[start, stop)` of a lane counted through all epochs."""
        return self.order.spans_at(start, stop, lane)

    def batches_in(self, window: Window, start: int) -> int:
        """Return how many batches in a row, the first of them at place `start` of a window, it surely holds."""
        return self.order.batches_in(window, start)

    def after(self, window: Window) -> Window:
        """Return the window that follows in a window's lane."""
        return self.order.after(window)

    def rows_per_step(self, window: Window, step: int) -> float:
        """Return how many rows of the window's source a lane uses in a step, on average."""
        del window, step
        return self.order.lane_batch_size

    def finish(self, step: int, lane: int, batch: Arrays) -> Arrays:
        """Turn the gathered rows of a batch, arrays of its own, into what a recipe gets."""
        del step, lane
        return finish_rows(batch, types=self._batch_types) if self._tokenizer is not None else batch

    def locate(self, step: int, lane: int) -> list[SampleLocation]:
        """Say where every sample of batch `step` of `lane` lies, in the batch's order.

        Reads no data, unless packing is best_fit: then what a row consists of follows from its row group's documents.
        """
        epoch, _ = self.order.locate_step(step)
        blocks, rows = self.order.samples_of(step, lane)
        return [self.location(int(b), int(r), epoch) for b, r in zip(blocks, rows, strict=True)]

    def location(self, block: int, row: int, epoch: int = 0) -> SampleLocation:
        """Say where sample `row` of `block` lies. Reads no data, but for packing: best_fit."""
        if self._packed is None:
            return SampleLocation("", epoch, block, row, (self._part(block, (row, row + 1), None),))
        parts = tuple(self._part(home, rows, tokens) for home, rows, tokens in self._packed.pieces(block, row))
        filler = self._packed.width - sum(part.tokens[1] - part.tokens[0] for part in parts if part.tokens)
        return SampleLocation("", epoch, block, row, parts, filler)

    def _part(self, block: int, rows: tuple[int, int] | None, tokens: tuple[int, int] | None) -> Part:
        table = self._blocks.blocks
        return Part(self._files.files[int(table.file[block])].name, int(table.number[block]), block, rows, tokens)

    def rows_of(self, part: Part) -> tuple[int, int]:
        """Return the rows `[first, end)` of its row group that a part comes from; a packed one is read for it."""
        if part.rows is not None or part.tokens is None or self._tokenizer is None:
            assert part.rows is not None
            return part.rows
        texts = read_texts(self._blocks, part.block, str(self.spec.text_column))
        _, starts = self._tokenizer.encode_with_offsets(texts)
        first, last = np.searchsorted(starts, (part.tokens[0], part.tokens[1] - 1), side="right") - 1
        return int(first), int(last) + 1

    def where(self, block: int, row: int) -> str:
        """Say where a sample comes from."""
        own = len(self._blocks.blocks)
        if block >= own:
            return f"packed tails, block {block - own}, sample {row}"
        return f"{self._blocks.where(block)}, {'sample' if self._tokenizer else 'row'} {row}"

    def close(self) -> None:
        """Close all files."""
        self._blocks.close()

    @property
    def whole_fingerprint(self) -> dict[str, Any]:
        """The fingerprint with a list of all files, however many there are."""
        return {**self.fingerprint, "files": self._files_of_fingerprint()}

    def _files_of_fingerprint(self) -> list[dict[str, Any]]:
        blocks, tokens = self._blocks.blocks, self._token_index
        files = []
        first = np.searchsorted(blocks.file, np.arange(len(self._files.files) + 1))  # blocks lie in the files' order
        for number, file in enumerate(self._files.files):
            mine = slice(int(first[number]), int(first[number + 1]))
            content = [blocks.rows[mine], blocks.stop[mine] - blocks.start[mine], blocks.checksum[mine]]
            if tokens is not None:  # what is trained on, and not how the file is compressed
                content += [tokens.tokens[mine], tokens.checksum[mine]]
            files.append(
                {
                    "name": file.name,
                    "bytes": file.size_bytes,
                    "rows": int(blocks.rows[mine].sum()),
                    "blocks": mine.stop - mine.start,
                    "hash": f"{checksum_of(b''.join(part.astype('<u8').tobytes() for part in content)):016x}",
                }
            )
        return files

    def _make_fingerprint(self) -> dict[str, Any]:
        spec = self.spec
        content_of_source = {
            "version": 1,
            "kind": spec.kind,
            "text_column": spec.text_column,
            "schema": [list(pair) for pair in self._blocks.schema],
            "rows_per_block": spec.rows_per_block if spec.kind in CUT_BY_ROWS else None,
            "tokenizer": self._tokenizer.fingerprint if self._tokenizer else None,
            "packing": self._packing_of_fingerprint() if self._tokenizer else None,
            "samples": self.order.samples,
            "lanes": self.order.lanes,
            "lane_batch_size": self.order.lane_batch_size,
            "shuffle": spec.shuffle,
            "window_row_groups": spec.window_row_groups,
            "order_version": ORDER_VERSION,
        }
        if spec.ragged != "drop":  # named only where it says something, so that older fingerprints stay as they are
            content_of_source["ragged"] = spec.ragged
        if spec.document != "line":
            content_of_source["document"] = spec.document
        if self._blocks.holes:
            content_of_source["holes"] = len(self._blocks.holes)
        return seal_fingerprint(content_of_source, self._files_of_fingerprint())

    def _packing_of_fingerprint(self) -> dict[str, Any]:
        packing: dict[str, Any] = {"version": PACKING_VERSION, "sequence_length": self.spec.sequence_length}
        if self.spec.packing == "best_fit":
            packing |= {"method": "best_fit", "best_fit_version": BEST_FIT_VERSION}
        return packing


def open_source(
    spec: Data,
    *,
    seed: int,
    lanes: int,
    lane_batch_size: int,
    progress: Progress | None = None,
    tokenizer: Tokenizer | None = None,
) -> Source:
    """Open a job's data: list the files, check them, make or load the index, lay down the order. `tokenizer`: that of
    the settings where it is loaded already; sources may share it.

    Raises DataError: missing, empty, of the wrong schema, corrupt, a tokenizer that cannot be loaded, or fewer
    samples than one step of all lanes needs. Each message names the file and the setting to change.
    """
    files = find_files(spec.path, spec.kind, spec.storage_options, spec.retry_s)
    if spec.text_column and tokenizer is None:
        tokenizer = load_tokenizer(spec.tokenizer, spec.storage_options)
    blocks, token_index = open_blocks(spec, files, tokenizer, progress)
    rows: npt.NDArray[np.int64] = blocks.blocks.rows
    tails = None
    if not rows.sum():
        corrupt = (
            f". {len(blocks.holes)} corrupt block(s) or file(s) were left out: {blocks.holes[0].why}"
            if blocks.holes
            else ""
        )
        raise NoSamples(
            f"data.path: no rows in {len(files.files)} file(s), the first being {files.files[0].path}. "
            f"Expected at least lanes x lane_batch_size samples{corrupt}"
        )
    if token_index is not None and tokenizer is not None:
        tails = pack_all_tails(spec, token_index, tokenizer.end_of_document)
        rows = np.concatenate([token_index.rows, rows_of_tails(tails)])
    order = lay_down(spec, rows, seed=seed, lanes=lanes, lane_batch_size=lane_batch_size)
    if order.steps_per_epoch == 0:
        what = f"sequences of {spec.sequence_length} tokens" if tokenizer else "rows"
        smaller = ", lower data.sequence_length" if tokenizer else ""
        raise (DataError if order.samples else NoSamples)(
            f"data.path holds {order.samples} {what}; one step needs lanes x lane_batch_size = {lanes} x "
            f"{lane_batch_size} = {lanes * lane_batch_size}. Add data, lower lanes or lane_batch_size{smaller}, or "
            "set data.ragged: repeat"
        )
    return Source(spec, files, blocks, order, tokenizer=tokenizer, token_index=token_index, tails=tails)


def lay_down(
    spec: Data, block_rows: npt.NDArray[np.int64], *, seed: int, lanes: int, lane_batch_size: int
) -> LaneOrder | StrictOrder:
    """Return the order of data whose blocks have so many samples."""
    return (StrictOrder if spec.shuffle == "strict" else LaneOrder)(
        block_rows,
        seed=seed,
        lanes=lanes,
        lane_batch_size=lane_batch_size,
        window_blocks=spec.window_row_groups,
        shuffle=spec.shuffle == "window",
        repeat=spec.ragged == "repeat",
    )
