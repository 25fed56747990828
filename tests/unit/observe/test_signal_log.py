"""signals.jsonl: what is written comes back, whatever happened to the file."""

from __future__ import annotations

import base64
import json
import zlib
from pathlib import Path

import numpy as np
import pytest

from elastictrain.errors import ConfigError
from elastictrain.job import parse_job
from elastictrain.observe.rundir import RunDirectory
from elastictrain.observe.signal_log import NAME, SignalLog, described, read_signals
from tests.support.signals import LAYOUT, records


def steps_of(folder: Path) -> list[int]:
    return [record.step for record in read_signals(folder)[0]]


def test_what_is_written_comes_back(tmp_path: Path) -> None:
    log = SignalLog(tmp_path, LAYOUT, excused=11)
    one, two = records([1.0, 2.0]), records([0.5, 0.5, 0.7])
    assert log.append(3, 1, (4, 9), one)
    assert log.append(4, 2, (4, 9, 10), two)
    log.close()
    found, excused = read_signals(tmp_path)
    assert excused == 11
    assert [(r.generation, r.step, r.workers) for r in found] == [(3, 1, (4, 9)), (4, 2, (4, 9, 10))]
    assert found[0].records.tobytes() == one.tobytes()
    assert found[1].records.tobytes() == two.tobytes()
    assert found[1].records["compute_s"].tolist() == pytest.approx([0.5, 0.5, 0.7])


def test_a_step_that_was_done_again_counts_once(tmp_path: Path) -> None:
    log = SignalLog(tmp_path, LAYOUT, excused=0)
    for step in (1, 2, 3, 4, 2, 3):
        log.append(1, step, (0,), records([float(step)]))
    log.close()
    assert steps_of(tmp_path) == [1, 2, 3]


def test_damaged_lines_are_passed_over(tmp_path: Path) -> None:
    log = SignalLog(tmp_path, LAYOUT, excused=0)
    for step in (1, 2):
        log.append(1, step, (0, 1), records([1.0, 1.0]))
    log.close()
    short = base64.b64encode(zlib.compress(b"x" * 63)).decode()
    whole = base64.b64encode(zlib.compress(records([1.0, 1.0]).tobytes())).decode()
    good = {"step": 9, "generation": 1, "every": 1, "workers": [0, 1], "records": whole}
    bad = [
        {**good, "records": short}, {**good, "records": "%%%"}, {**good, "workers": [0]}, {**good, "workers": [0, 0]},
        {**good, "records": base64.b64encode(b"no deflate").decode()}, {"step": 9}, {**good, "step": None},
    ]  # fmt: skip
    path = tmp_path / NAME
    path.write_text(path.read_text() + "".join(json.dumps(line) + "\n" for line in bad) + '{"step": 7, "gen')
    assert steps_of(tmp_path) == [1, 2]
    again = SignalLog(tmp_path, LAYOUT, excused=0)
    again.append(2, 3, (0,), records([1.0]))
    again.close()
    assert steps_of(tmp_path) == [1, 2, 3]


def test_a_long_file_is_thinned_and_goes_on_so(tmp_path: Path) -> None:
    log = SignalLog(tmp_path, LAYOUT, excused=0, most_bytes=6_000)
    written = [log.append(1, step, (0, 1), records([1.0, 2.0])) for step in range(1, 200)]
    log.close()
    assert (tmp_path / NAME).stat().st_size <= 7_000
    found = steps_of(tmp_path)
    stride = found[1] - found[0]
    assert stride in (4, 8, 16)
    assert found == list(range(stride, 200, stride))
    assert sum(written) < 199
    again = SignalLog(tmp_path, LAYOUT, excused=0, most_bytes=6_000)
    assert not again.append(1, 200 * stride + 1, (0, 1), records([1.0, 2.0]))
    assert again.append(1, 201 * stride, (0, 1), records([1.0, 2.0]))
    again.close()


def test_a_file_that_cannot_be_gone_on_with_is_kept_beside_a_new_one(tmp_path: Path) -> None:
    """A run that is resumed by another version, or after a power cut, does not end for it."""
    for number, first in enumerate(('{"version": 0}', "\x00\x00 no line", '{"step": 3, "every": "x"}'), 1):
        (tmp_path / NAME).write_text(first + '\n{"step": 1, "every": 0}\n')
        log = SignalLog(tmp_path, LAYOUT, excused=0)
        assert log.append(1, 7, (0, 1), records([1.0, 2.0]))
        log.close()
        assert steps_of(tmp_path) == [7]
        assert (tmp_path / f"signals-{number}.jsonl").read_text().startswith(first)
        (tmp_path / NAME).unlink()


def test_strides_that_are_none_are_passed_over(tmp_path: Path) -> None:
    SignalLog(tmp_path, LAYOUT, excused=0).close()
    with (tmp_path / NAME).open("a") as file:
        file.write('{"step": 1, "every": 0}\n{"step": 2, "every": "x"}\n{"step": 4, "every": 2}\n')
    log = SignalLog(tmp_path, LAYOUT, excused=0)
    assert not log.append(1, 5, (0, 1), records([1.0, 2.0]))
    assert log.append(1, 6, (0, 1), records([1.0, 2.0]))
    log.close()


def test_a_missing_file_is_explained_and_one_without_a_layout(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has recorded no signals of its workers \(signals.jsonl is not there\)"):
        read_signals(tmp_path)
    (tmp_path / NAME).write_text('{"version": 1}\n')
    with pytest.raises(ConfigError, match=r"its first line does not say how records are laid out"):
        read_signals(tmp_path)


def test_a_layout_as_plain_data_is_the_same_layout() -> None:
    assert np.dtype(json.loads(json.dumps(described(LAYOUT)))) == LAYOUT


def test_a_run_directory_records_and_gives_back(tmp_path: Path) -> None:
    data = {"kind": "jsonl", "path": "x", "text_column": "t", "sequence_length": 4}
    job = parse_job({"recipe": "a:B", "data": data, "steps": 3})
    with RunDirectory.create(tmp_path / "run", job) as run:
        assert run.signals(1, 1, (0, 1), records([1.0, 2.0]), excused=11)
    assert steps_of(tmp_path / "run") == [1]
    with pytest.raises(ConfigError, match=r"is open for reading only"):
        RunDirectory.open(tmp_path / "run").signals(1, 2, (0, 1), records([1.0, 2.0]), excused=11)
    with RunDirectory.resume(tmp_path / "run", job) as run:
        run.signals(2, 2, (0,), records([1.0]), excused=11)
    assert steps_of(tmp_path / "run") == [1, 2]
