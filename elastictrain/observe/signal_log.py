"""`signals.jsonl` of a run directory: what every worker said of its steps, for `elastictrain whatif`.

The first line says how a worker's record is laid out (names, formats and offsets of a structured NumPy type), so that a
later version still reads it. Every other line is a step: its generation, its workers by number, and their records in
that order, packed and in base64. A file that has become too long keeps every second step, then every fourth, and so on.
"""

from __future__ import annotations

import base64
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from elastictrain.errors import ConfigError
from elastictrain.observe.lines import LineWriter, encode, read_lines, replace_file

NAME = "signals.jsonl"
VERSION = 1
MOST_BYTES = 64 * 2**20
"""Beyond this, every second of the steps that are there is left out."""

Records = npt.NDArray[np.void]


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One step: `records[i]` is what worker `workers[i]` said of it."""

    generation: int
    step: int
    workers: tuple[int, ...]
    records: Records


class SignalLog:
    """Appends to `signals.jsonl`. `excused`: bits of a record's `flags` that make a step say nothing of speed.

    Raises ClusterError when the file cannot be written.
    """

    def __init__(self, folder: Path, layout: np.dtype[np.void], *, excused: int, most_bytes: int = MOST_BYTES) -> None:
        self.path, self._most_bytes = folder / NAME, most_bytes
        there = list(read_lines(self.path))
        header = {"version": VERSION, "record": described(layout), "excused": excused}
        if there and there[0] != header:  # of another version, or damaged: kept for people, and begun anew
            _set_aside(self.path)
            there = []
        strides = [every for line in there[1:] if isinstance(every := line.get("every"), int) and every > 0]
        self._stride = 2 ** max(strides, default=1).bit_length() // 2
        self._writer = LineWriter(self.path)
        self._bytes = self.path.stat().st_size
        if not there:
            self._append(header)

    def append(self, generation: int, step: int, workers: Sequence[int], records: Records) -> bool:
        """Write a step down; False when it is one of those that are left out."""
        if step % self._stride:
            return False
        packed = base64.b64encode(zlib.compress(records.tobytes(), 1)).decode("ascii")
        self._append({"step": step, "generation": generation, "every": self._stride, "workers": list(workers),
                      "records": packed})  # fmt: skip
        if self._bytes > self._most_bytes:
            self._thin()
        return True

    def close(self) -> None:
        self._writer.close()

    def _append(self, line: Mapping[str, Any]) -> None:
        self._writer.append(line)
        self._bytes += len(encode(line)) + 1

    def _thin(self) -> None:
        self._stride *= 2
        lines = [line for line in read_lines(self.path) if "step" not in line or line["step"] % self._stride == 0]
        self._writer.close()
        text = "".join(encode(line) + "\n" for line in lines)
        replace_file(self.path, text)
        self._writer, self._bytes = LineWriter(self.path), len(text.encode())


def _set_aside(path: Path) -> None:
    number = 1
    while (other := path.with_name(f"{path.stem}-{number}{path.suffix}")).exists():
        number += 1
    path.rename(other)


def read_signals(folder: Path) -> tuple[list[StepRecord], int]:
    """The steps in the order in which they happened (a step that was done again, once), and the excused flags.

    A line that is damaged is passed over. Raises ConfigError when there are no signals.
    """
    lines = read_lines(folder / NAME)
    header = next(lines, None)
    if header is None:
        raise ConfigError(
            f"RUN {str(folder)!r} has recorded no signals of its workers ({NAME} is not there); they are recorded "
            "while a job with two workers or more runs, unless stragglers.action is off"
        )
    try:
        layout = np.dtype(header["record"])
        excused = int(header["excused"])
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{folder / NAME}: its first line does not say how records are laid out: {error}") from None
    found: list[StepRecord] = []
    for record in _steps(lines, layout):
        while found and found[-1].step >= record.step:  # the run went back to a checkpoint
            found.pop()
        found.append(record)
    return found, excused


def _steps(lines: Iterator[dict[str, Any]], layout: np.dtype[np.void]) -> Iterator[StepRecord]:
    for line in lines:
        try:
            raw = zlib.decompress(base64.b64decode(line["records"], validate=True))
            records = np.frombuffer(raw, dtype=layout)
            workers = tuple(int(worker) for worker in line["workers"])
            step = StepRecord(int(line["generation"]), int(line["step"]), workers, records)
        except (KeyError, TypeError, ValueError, zlib.error):
            continue
        if len(workers) == len(set(workers)) == len(records) > 0:
            yield step


def described(layout: np.dtype[np.void]) -> dict[str, Any]:
    """A structured type as plain data; `np.dtype` makes it again."""
    fields: Mapping[str, Any] = layout.fields or {}
    names = list(layout.names or ())
    return {
        "names": names, "formats": [fields[name][0].str for name in names],
        "offsets": [fields[name][1] for name in names], "itemsize": layout.itemsize,
    }  # fmt: skip
