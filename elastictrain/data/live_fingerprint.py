"""The fingerprint of a live source: what is the same for all segments. What each one holds is recorded with its era."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from elastictrain.data.fingerprint import seal_fingerprint
from elastictrain.data.formats import CUT_BY_ROWS
from elastictrain.data.live_order import LIVE_VERSION
from elastictrain.data.order import ORDER_VERSION
from elastictrain.data.packing import PACKING_VERSION
from elastictrain.data.tokenizers import Tokenizer
from elastictrain.errors import DataError

if TYPE_CHECKING:
    from elastictrain.data_settings import Data


def live_fingerprint(
    spec: Data, manifest: str, tokenizer: Tokenizer | None, *, lanes: int, lane_batch_size: int
) -> dict[str, Any]:
    """See `fingerprint.seal_fingerprint`. `manifest`: the id of the manifest of segments."""
    packing: dict[str, Any] | None = None
    if tokenizer is not None:
        packing = {"version": PACKING_VERSION, "sequence_length": spec.sequence_length, "method": spec.packing}
    content = {
        "version": 1,
        "live_version": LIVE_VERSION,
        "manifest": manifest,
        "kind": spec.kind,
        "text_column": spec.text_column,
        "columns": list(spec.columns) if spec.columns is not None else None,
        "rows_per_block": spec.rows_per_block if spec.kind in CUT_BY_ROWS else None,
        "document": spec.document,
        "tokenizer": tokenizer.fingerprint if tokenizer else None,
        "packing": packing,
        "lanes": lanes,
        "lane_batch_size": lane_batch_size,
        "shuffle": spec.shuffle,
        "window_row_groups": spec.window_row_groups,
        "order_version": ORDER_VERSION,
    }
    return seal_fingerprint(content, [])


def check_alike(place: str, columns: str, others: str) -> None:
    """Raise DataError where the order recorded in `place` has other columns, in words, than the other sources of a
    mixture. Two live sources may come to that whose first segments different workers have seen first.
    """
    if columns and others and columns != others:
        raise DataError(
            f"{place}: the segments of this order have the columns {columns}; those of the other sources are {others}. "
            "Rows of one batch must be alike: write one of them to a new manifest, and start with a new "
            "checkpoint.path and data.live.record"
        )
