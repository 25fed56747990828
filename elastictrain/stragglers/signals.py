"""What a worker says of a step: one fixed record of 64 bytes, which travels with the vote. Pure.

Durations only, each between two readings of one worker's monotonic clock: no clock is ever compared with another one.
`arrive_s` begins when the vote of the step before was complete, which is nearly the same moment for all workers; so it
says who came last to the exchange, and how much of the others' time in it was waiting (`parts`).

Nothing that a worker says is believed blindly: `checked` takes out what cannot be true.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

FLAG_CHECKPOINT = 1
"""The worker began, or waited for, a checkpoint since its last vote."""
FLAG_EVALUATION = 2
FLAG_COLLECTION = 4
"""Python's garbage collector took a noticeable part of the step."""
FLAG_COMPILE = 8
"""Something was compiled or warmed up: first steps of a generation, of a split of lanes, of a new shape."""
EXCUSED = FLAG_CHECKPOINT | FLAG_EVALUATION | FLAG_COLLECTION | FLAG_COMPILE
LEFT_OUT = FLAG_CHECKPOINT | FLAG_EVALUATION | FLAG_COMPILE
"""Steps that `whatif` leaves out; the collector is a cause of its own there."""

_FLAGS = 0xFF
"""The upper half of the flags says how many lanes more than its own a worker has computed, as a signed byte. What does
not fit there stands in `more`, and in older records nowhere.
"""
_MOST_MORE = 127

LONGEST_S = 86_400.0
"""No duration of one step is longer than a day; whoever says so has a broken clock."""

_RECORD = struct.Struct("<HHffffffffddif")
RECORD_BYTES = 64
"""Room in the vote for each worker; what the fields leave of it is zero."""
_PADDING = bytes(RECORD_BYTES - _RECORD.size)

RECORD = np.dtype(
    {
        "names": [
            "flags", "lanes", "data_s", "compute_s", "arrive_s", "exchange_s", "vote_s", "gather_s", "step_s",
            "collected_s", "tokens", "squares", "more", "mirror_s",
        ],
        "formats": ["<u2", "<u2", *["<f4"] * 8, "<f8", "<f8", "<i4", "<f4"],
        "offsets": [0, 2, *range(4, 36, 4), 36, 44, 52, 56],
        "itemsize": RECORD_BYTES,
    }
)  # fmt: skip
"""The record as an array's element. Seconds; vote, gather and the whole step (see `Signal`) are of the step before."""

Records = npt.NDArray[np.void]
Floats = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Signal:
    """One worker's step.

    `data_s`: waited for batches. `compute_s`: forward and backward of all its `lanes`, without that. `arrive_s`: from
    the last vote's end to the exchange. `exchange_s`: in exchange and mirror, waiting included, `mirror_s` of it in the
    mirror. `collected_s`: of `compute_s`, in Python's garbage collector. `vote_s`, `gather_s`, `step_s`: of the step
    before (they are not over when this travels). `tokens`, `squares`: Σ of the lanes' sequence lengths, and of their
    squares. `more`: so many lanes more than were dealt out to it has it computed (less: negative), where lanes are
    shared (`redundancy`).
    """

    lanes: int
    compute_s: float
    data_s: float = 0.0
    arrive_s: float = 0.0
    exchange_s: float = 0.0
    collected_s: float = 0.0
    vote_s: float = 0.0
    gather_s: float = 0.0
    step_s: float = 0.0
    tokens: float = 0.0
    squares: float = 0.0
    flags: int = 0
    more: int = 0
    mirror_s: float = 0.0

    def encode(self) -> bytes:
        """The record, `RECORD_BYTES` long. Numbers that do not fit say so by being the largest that does."""
        return (
            _RECORD.pack(
                self.flags & _FLAGS | (max(-_MOST_MORE, min(_MOST_MORE, self.more)) & 0xFF) << 8,
                min(self.lanes, 0xFFFF),
                *(
                    _fits(value)
                    for value in (
                        self.data_s, self.compute_s, self.arrive_s, self.exchange_s, self.vote_s, self.gather_s,
                        self.step_s, self.collected_s,
                    )
                ),
                self.tokens,
                self.squares,
                self.more if abs(self.more) >= _MOST_MORE else 0,
                _fits(self.mirror_s),
            )
            + _PADDING
        )  # fmt: skip


_LARGEST = 3.0e38


def _fits(value: float) -> float:
    """A float32 or the nearest one to it (NaN stays)."""
    return max(-_LARGEST, min(_LARGEST, value)) if value == value else value


_FLOATS = [name for name in RECORD.names or () if RECORD[name].kind == "f"]


def decode(raw: bytes) -> Records:
    """Records of all workers in rank order. What is no number is the ordinary NaN: of others, which signal, NumPy warns
    whoever computes with them. Raises ValueError when `raw` is no whole number of records.
    """
    if len(raw) % RECORD_BYTES:
        raise ValueError(f"{len(raw)} bytes are no whole number of records of {RECORD_BYTES}")
    records = np.frombuffer(raw, dtype=RECORD).copy()
    for name in _FLOATS:
        column = records[name]
        column[np.isnan(column)] = np.nan
    return records


def table(**columns: Any) -> Records:
    """Records from columns of equal length; what is not given is 0. For simulators and tests."""
    size = max(np.size(column) for column in columns.values())
    found = np.zeros(size, dtype=RECORD)
    for name, column in columns.items():
        found[name] = column
    return found


_SLACK, _SLACK_S = 1.05, 1e-3
_DURATIONS = (
    "data_s", "compute_s", "arrive_s", "exchange_s", "vote_s", "gather_s", "step_s", "collected_s", "mirror_s",
)  # fmt: skip
LEAST_LANE_S = 1e-6
"""No lane is computed in less: whoever says so has no clock."""


def checked(records: Records) -> Flags:
    """Whether each record can be true: finite durations from 0 to a day, some compute for its lanes, no more waiting
    for data and computing than there was time before the exchange (5 % and 1 ms are let pass), counts that are not
    negative. Shape [workers].
    """
    sound = np.ones(len(records), dtype=bool)
    for name in _DURATIONS:
        if name not in (records.dtype.names or ()):  # of an older version
            continue
        values = records[name]
        sound &= (values >= 0) & (values <= LONGEST_S)  # NaN is neither
    for name in ("tokens", "squares"):
        sound &= (records[name] >= 0) & np.isfinite(records[name])
    sound &= (records["compute_s"] > 0) == (records["lanes"] > 0)
    with np.errstate(over="ignore", invalid="ignore"):
        compute, data, arrive = (records[name].astype(np.float64) for name in ("compute_s", "data_s", "arrive_s"))
        sound &= compute >= LEAST_LANE_S * records["lanes"]
        sound &= compute + data <= _SLACK * arrive + _SLACK_S
    return np.asarray(sound)


def counted(records: Records) -> Flags:
    """Whether a record says how many lanes were dealt out (`dealt`): those of older versions have no room for more than
    126 lanes of others, and none has for 65,535 lanes. Shape [workers].
    """
    upper = records["flags"] >> 8
    at_the_end = (upper == _MOST_MORE) | (upper == 256 - _MOST_MORE)
    return np.asarray((~at_the_end | (_more(records) != 0)) & (records["lanes"] < 0xFFFF))


def _more(records: Records) -> npt.NDArray[np.int64]:
    """What did not fit into the flags; 0 of what did, and in a run directory of an older version."""
    there = "more" in (records.dtype.names or ())
    return records["more"].astype(np.int64) if there else np.zeros(len(records), dtype=np.int64)


def dealt(records: Records) -> npt.NDArray[np.int64]:
    """How many lanes were dealt out to each worker, whoever has computed them. Shape [workers]."""
    upper = (records["flags"] >> 8).astype(np.int64)
    upper, more = np.where(upper > _MOST_MORE, upper - 256, upper), _more(records)
    return np.asarray(records["lanes"].astype(np.int64) - np.where(more != 0, more, upper))


def as_dealt(records: Records) -> Records:
    """What each worker would have said if it had computed the lanes that were dealt out to it, and no others, at the
    speed that it had. Of one that has computed none nothing is known.
    """
    own, lanes = dealt(records), records["lanes"].astype(np.int64)
    if (own == lanes).all():
        return records
    found = records.copy()
    times = np.where(lanes > 0, own / np.maximum(lanes, 1), 0.0)
    for name in ("compute_s", "data_s", "collected_s", "tokens", "squares"):
        found[name] = np.clip(records[name] * times, -_LARGEST, _LARGEST)  # nonsense may be as large as a float is
    found["lanes"], found["flags"] = own, records["flags"] & _FLAGS
    if "more" in (found.dtype.names or ()):
        found["more"] = 0
    return found


def parts(records: Records, sound: Flags) -> tuple[Floats, Floats]:
    """(wait, transfer) of exchange and mirror in seconds, shape [workers]: who waited for the last one to come to
    either, and how long data took after that. So who waits in the mirror for one whose exchange took long has no slow
    link itself. Unsound records count for nothing and get 0.
    """
    arrive = np.where(sound, records["arrive_s"], 0.0).astype(np.float64)
    both = np.where(sound, records["exchange_s"], 0.0).astype(np.float64)
    mirror = np.minimum(both, np.where(sound, mirrored_s(records), 0.0))
    exchange = both - mirror
    wait = np.where(sound, np.minimum(exchange, arrive.max(initial=0.0) - arrive), 0.0)
    done = arrive + exchange
    wait += np.where(sound, np.minimum(mirror, done.max(initial=0.0) - done), 0.0)
    return wait, both - wait


def mirrored_s(records: Records) -> Floats:
    """Seconds in the mirror; 0 in records of an older version, which do not tell it from the exchange."""
    there = "mirror_s" in (records.dtype.names or ())
    return records["mirror_s"].astype(np.float64) if there else np.zeros(len(records))


def logarithms(records: Records, sound: Flags, used: Flags, work: Floats, ordinary_s: Floats) -> Floats:
    """What a step says of every worker, as logarithms: seconds per unit of `work`, the stretch by waiting for data and
    by its transfer, work beyond the number of lanes. Shape [4, workers]. `ordinary_s`: of its computation, usually.
    """
    compute = np.maximum(records["compute_s"].astype(np.float64), 1e-9)
    _, transfer = parts(records, sound)
    longest = float(np.median(ordinary_s[used])) if used.any() else 1.0
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.stack(
            [
                np.log(compute / work),
                np.log1p(records["data_s"] / ordinary_s),
                np.log1p(transfer / longest),
                np.log(work / np.maximum(records["lanes"], 1)),
            ]
        )
