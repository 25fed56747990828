"""Bytes as tokens, kept in a byte each until a batch is made of them.

Tokens of the tokenizer `bytes` are 0 to 256; only the end of a document needs more than eight bits. In UTF-8 no byte
is 255, so 255 stands for it here: decoded blocks take half the memory, and so does what is gathered from them. A block
whose text has such a byte all the same (it is no UTF-8) is kept as uint16. Which of the two it is says the name of the
array: BYTE_TOKENS or "tokens".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from elastictrain.data.packing import TokenArray

BYTE_TOKENS = "byte_tokens"
TOKENS = "tokens"
END_OF_DOCUMENT = 256
STANDS_FOR_END = 255
_END = bytes([STANDS_FOR_END])

_AT_ONCE = 1 << 17
"""Tokens that are widened in one go: they stay in a processor's cache."""

Arrays = dict[str, npt.NDArray[Any]]


def narrow(tokens: TokenArray) -> npt.NDArray[np.uint8] | None:
    """Return tokens of the tokenizer `bytes` in a byte each, in the shape they have; None if 255 is one of them."""
    if np.any(tokens == STANDS_FOR_END):
        return None
    found = tokens.astype(np.uint8)
    found[tokens == END_OF_DOCUMENT] = STANDS_FOR_END
    return found


def widen(narrow_tokens: npt.NDArray[np.uint8], out: npt.NDArray[Any]) -> None:
    """Write tokens that are kept in a byte each to `out`, of the same shape, C-contiguous, and of a wider type."""
    source, target = narrow_tokens.reshape(-1), out.reshape(-1)
    for at in range(0, len(source), _AT_ONCE):
        _widen(source[at : at + _AT_ONCE], target[at : at + _AT_ONCE])


def _widen(narrow_tokens: npt.NDArray[np.uint8], out: npt.NDArray[Any]) -> None:
    out[...] = narrow_tokens
    text = narrow_tokens.tobytes()
    at = text.find(_END)  # ends are rare, and C's memchr is faster than a comparison of all
    while at >= 0:
        out[at] = END_OF_DOCUMENT
        at = text.find(_END, at + 1)


def checksum_of_widened(narrow_tokens: npt.NDArray[np.uint8]) -> int:
    """Return the 64-bit XXH3 of the tokens, shape [n], as uint16: what the index holds of a block."""
    digest, wide = xxhash.xxh3_64(), np.empty(min(len(narrow_tokens), _AT_ONCE), dtype=np.uint16)
    for at in range(0, len(narrow_tokens), _AT_ONCE):
        part = narrow_tokens[at : at + _AT_ONCE]
        _widen(part, wide[: len(part)])
        digest.update(wide[: len(part)].data)
    return digest.intdigest()


def alike(parts: Sequence[Arrays]) -> list[Arrays]:
    """Return arrays of several blocks or windows with the same names: where some have tokens in a byte each and others
    have not, all of them are widened to uint16.
    """
    if len({BYTE_TOKENS in part for part in parts}) < 2:
        return list(parts)
    return [_widened(part) for part in parts]


def _widened(arrays: Arrays) -> Arrays:
    if BYTE_TOKENS not in arrays:
        return arrays
    wide = np.empty(arrays[BYTE_TOKENS].shape, dtype=np.uint16)
    widen(arrays[BYTE_TOKENS], wide)
    return {TOKENS: wide, **{name: array for name, array in arrays.items() if name != BYTE_TOKENS}}
