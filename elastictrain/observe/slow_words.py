"""Sentences about slow workers and what is done about them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from elastictrain.observe.events import Data

_SHOWN = 8
_NOW = {
    "slow": "is slow ({cause})",
    "still_slow": "is still slow, though less ({cause})",
    "faster": "is faster than it was before ({cause})",
    "recovered": "is as fast again as it was ({cause})",
    "imbalance": "has more work than others",
    "nonsense": "reports nonsense",
}


_INSTEAD = {
    "nothing": "lanes stay as they are",
    "smaller_move": "fewer lanes move than speeds ask for",
    "replace": "a slow worker is replaced, since lanes cannot move as speeds ask for",
    "leave_out": "a slow worker is left out, since lanes cannot move as speeds ask for",
}


def _reason(data: Data) -> str:
    return f": {data['reason']}" if data.get("reason") else ""


def _straggler(data: Data) -> str:
    who = "the network" if data.get("worker") is None else f"worker {data['worker']}"
    what = "still_slow" if data["what"] == "slow" and data.get("factor", 1.0) < 1 else data["what"]
    return f"{who} {_NOW[what].format(cause=data.get('cause'))}{_reason(data)}"


def _lanes_moved(data: Data) -> str:
    lanes: Mapping[str, tuple[int, int]] = data["lanes"]
    shown = [f"worker {worker} {old} → {new}" for worker, (old, new) in list(lanes.items())[:_SHOWN]]
    shown += [f"{len(lanes) - _SHOWN} more"] if len(lanes) > _SHOWN else []
    moved = "lanes are moved back" if data.get("action") == "move_back" else "lanes move"
    return f"{moved}: {', '.join(shown)}{_expected(data)}{_reason(data)}"


def _lanes_refused(data: Data) -> str:
    lanes = list(data["lanes"].items())
    shown = ", ".join(f"worker {worker} {count}" for worker, count in lanes[:_SHOWN])
    more = f", {len(lanes) - _SHOWN} more" if len(lanes) > _SHOWN else ""
    return f"{_INSTEAD[data.get('instead', 'nothing')]}: another split ({shown}{more}) does not fit{_reason(data)}"


def _expected(data: Data) -> str:
    before, after = data.get("before_s"), data.get("after_s")
    return f"; {before:.3g} s of computation a step, expected {after:.3g} s" if before and after else ""


def _leaves(data: Data) -> str:
    how = "gives its place to a spare" if data.get("action") == "replace" else "is left out"
    return f"worker {data['worker']} is too slow and {how}{_expected(data)}{_reason(data)}"


SLOWNESS: dict[str, Callable[[Data], str]] = {
    "straggler": _straggler,
    "lanes_moved": _lanes_moved,
    "lanes_refused": _lanes_refused,
    "straggler_leaves": _leaves,
}
