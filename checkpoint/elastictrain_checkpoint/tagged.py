"""State that is not tensors, as JSON that comes back exactly: never pickle.

JSON itself loses tuples, integer keys, integers beyond 2^53 (in most readers), NaN and infinities. Those
are written
with a tag: ``{"$tuple": […]}``, ``{"$dict": [[key, value], …]}``, ``{"$int": "…"}``, ``{"$float": "nan"}``.
All else is plain JSON, for people and tools to read. Types that are not listed (NumPy scalars, sets, enums,
objects) are refused with their place in the tree, because what cannot come back exactly must not seem to
have been saved.
"""

from __future__ import annotations

import base64
import math
from typing import Any

from elastictrain_checkpoint.errors import InvalidPiece
from elastictrain_checkpoint.hashing import unbase64

EXACT_INT = 1 << 53
DECIMAL_BITS = 4096
MAX_DEPTH = 100


def encode(value: Any, where: str = "tree") -> Any:
    """Tagged JSON for ``value``: None, bool, int, float, str, bytes, list, tuple and dict of these.

    Raises:
        InvalidPiece: another type, or deeper than `MAX_DEPTH`; the message says where.

    """
    return _encode(value, where, 0)


def _encode(value: Any, where: str, depth: int) -> Any:
    if depth > MAX_DEPTH:
        raise InvalidPiece(f"{where[:80]}…: nested deeper than {MAX_DEPTH} levels (a cycle?)")
    kind = type(value)
    if value is None or kind in (bool, str):
        return value
    if kind is int:
        # Python reads and writes decimals of any length only up to a limit; hexadecimal has none.
        text = str(value) if value.bit_length() <= DECIMAL_BITS else hex(value)
        return value if -EXACT_INT <= value <= EXACT_INT else {"$int": text}
    if kind is float:
        return value if math.isfinite(value) else {"$float": repr(value)}
    if kind is bytes:
        return {"$bytes": base64.b64encode(value).decode()}
    if kind in (list, tuple):
        items = [_encode(item, f"{where}[{i}]", depth + 1) for i, item in enumerate(value)]
        return items if kind is list else {"$tuple": items}
    if kind is dict:
        if all(type(key) is str and not key.startswith("$") for key in value):
            return {key: _encode(item, f"{where}.{key}", depth + 1) for key, item in value.items()}
        return {
            "$dict": [
                [_encode(key, f"{where} key", depth + 1), _encode(item, f"{where}.{_shown(key)}", depth + 1)]
                for key, item in value.items()
            ]
        }
    raise InvalidPiece(
        f"{where} is a {kind.__module__}.{kind.__qualname__}; the tree holds None, bool, int, float, str, bytes, list, "
        f"tuple and dict (convert scalars with .item(), save arrays as tensors)"
    )


def _shown(key: Any) -> str:
    """A key in a message; a whole number may be too long to be written in decimals."""
    return hex(key)[:40] if type(key) is int and key.bit_length() > DECIMAL_BITS else str(key)


def decode(value: Any) -> Any:
    """Inverse of `encode`.

    Raises:
        ValueError: an unknown or malformed tag.

    """
    if isinstance(value, list):
        return [decode(item) for item in value]
    if not isinstance(value, dict):
        return value
    tag = next(iter(value), "")
    if not tag.startswith("$"):
        return {key: decode(item) for key, item in value.items()}
    return _decode_tag(tag, value)


def _decode_tag(tag: str, value: dict[str, Any]) -> Any:
    body = value[tag]
    match tag, body:
        case _ if len(value) != 1:
            raise ValueError(f"tag {tag} stands beside other keys")
        case "$tuple", list():
            return tuple(decode(item) for item in body)
        case "$dict", list() if all(isinstance(pair, list) and len(pair) == 2 for pair in body):
            return {decode(key): decode(item) for key, item in body}
        case "$int", str():
            return int(body, 16 if body.lstrip("-").startswith("0x") else 10)
        case "$float", "nan" | "inf" | "-inf":
            return float(body)
        case "$bytes", str():
            return unbase64(body)
    raise ValueError(f"unknown or malformed tag {tag}")
