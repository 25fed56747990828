"""The state of a `Stream` as bytes: JSON, in one of three versions. Pure.

1: one source, and mixtures as older versions wrote them. 2: with what tells of data that have changed. 3: a mixture, in
fewer bytes: `at` is (step, seed, lanes, size); `names` of the sources, joined by commas where none has one; `data`, in
base 85, eight bytes of the fingerprint of each source that the data have; `plans` with a weight for each name
(0: the segment does not name it, null: it says 0).
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from typing import Any

from elastictrain.errors import DataError

FIRST, CHANGED, MIXTURE = 1, 2, 3
_AT = ("step", "seed", "lanes", "size")
_HASH_BYTES = 8


def dump_state(content: Mapping[str, Any]) -> bytes:
    """Return the bytes of a state; `content` as `parse_state` gives it back, without the version."""
    if "plans" in content:
        shown = {"v": MIXTURE, **_packed(content)}
    else:
        shown = {"v": CHANGED if "begun" in content else FIRST, **content}
    return json.dumps(shown, separators=(",", ":")).encode()


def parse_state(state: bytes) -> dict[str, Any]:
    """Return what a state of any version says. Raises DataError for one of a newer version, or none."""
    try:
        stored = json.loads(state)
        version = stored["v"]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"this is no state of a stream ({error}); expected what Stream.state() gave") from error
    if version not in (FIRST, CHANGED, MIXTURE):
        raise DataError(f"this state has version {version}; this version of elastictrain reads {FIRST} to {MIXTURE}")
    return _unpacked(stored) if version == MIXTURE else dict(stored)


def _packed(content: Mapping[str, Any]) -> dict[str, Any]:
    hashes: Mapping[str, str] = content["data"]
    planned = {name for _, plan in content["plans"] for segment in plan for name in segment["weights"]}
    names = [*hashes, *sorted(planned - hashes.keys())]
    as_text = ",".join(names)
    rest = {key: value for key, value in content.items() if key not in (*_AT, "data", "plans")}
    return {
        "at": [content[key] for key in _AT],
        "names": as_text if as_text.split(",") == names else names,
        "data": base64.b85encode(bytes.fromhex("".join(hashes.values()))).decode(),
        "plans": [[step, [_shorter(segment, names) for segment in plan]] for step, plan in content["plans"]],
        **rest,
    }


def _shorter(segment: Mapping[str, Any], names: Sequence[str]) -> list[Any]:
    weights = segment["weights"]
    shares = [(weights[name] or None) if name in weights else 0 for name in names]
    length = segment.get("sequence_length")
    return [segment["from_step"], shares, *([] if length is None else [length])]


def _unpacked(stored: Mapping[str, Any]) -> dict[str, Any]:
    names = stored["names"].split(",") if isinstance(stored["names"], str) else list(stored["names"])
    digits = base64.b85decode(stored["data"]).hex()
    size = 2 * _HASH_BYTES
    hashes = [digits[at : at + size] for at in range(0, len(digits), size)]
    rest = {key: value for key, value in stored.items() if key not in ("at", "names", "data", "plans")}
    return {
        **rest,
        **dict(zip(_AT, stored["at"], strict=True)),
        "data": dict(zip(names, hashes, strict=False)),
        "plans": [[step, [_whole(segment, names) for segment in plan]] for step, plan in stored["plans"]],
    }


def _whole(segment: Sequence[Any], names: Sequence[str]) -> dict[str, Any]:
    from_step, shares, *length = segment
    weights = {name: share or 0 for name, share in zip(names, shares, strict=True) if share != 0}
    shown = {"from_step": from_step, "weights": dict(sorted(weights.items()))}
    return {**shown, "sequence_length": length[0]} if length else shown
