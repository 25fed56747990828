"""Which integer types the batches of text have: `data.batch_dtype`. Pure.

Tokens, numbers of documents and positions are kept in as few bytes as they need until a batch is made. int64 is what
embeddings and losses take; a narrower type costs less to write, to keep and to copy.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from elastictrain.errors import DataError

if TYPE_CHECKING:
    from elastictrain.data_settings import Data, Mixture

INT64: np.dtype[Any] = np.dtype(np.int64)
_NARROW = (np.uint8, np.int16, np.uint16, np.int32)
"""The narrowest first; of two that take the same bytes the one with which torch can do more."""


@dataclass(frozen=True)
class BatchTypes:
    """The types of a batch of text: of its tokens, and of what counts places in a row (document ids, positions)."""

    tokens: np.dtype[Any] = INT64
    places: np.dtype[Any] = INT64


def narrowest(count: int) -> np.dtype[Any]:
    """Return the smallest type for the numbers 0 to `count` - 1, of those that `data.batch_dtype` may lead to."""
    return next((np.dtype(kind) for kind in _NARROW if count - 1 <= np.iinfo(kind).max), INT64)


def batch_types(spec: Data | Mixture, vocabulary_size: int | None) -> BatchTypes:
    """Return the types that `data.batch_dtype` asks for; `vocabulary_size`: None in table mode.

    Raises DataError for a vocabulary with tokens that int32 does not hold.
    """
    if spec.batch_dtype == "int64" or vocabulary_size is None or spec.sequence_length is None:
        return BatchTypes()
    if spec.batch_dtype == "narrow":  # documents are numbered from 1 on; at most there is one for each token of a row
        return BatchTypes(narrowest(vocabulary_size), narrowest(spec.sequence_length + 2))
    int32 = np.dtype(np.int32)
    if vocabulary_size - 1 > np.iinfo(int32).max:
        raise DataError(
            f"data.batch_dtype is int32, and data.tokenizer has tokens up to {vocabulary_size - 1}, which it does not "
            "hold; set data.batch_dtype: int64"
        )
    return BatchTypes(int32, int32)
