"""The pulse in shared memory: what is written is read, torn or missing bytes are never read as a beat."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
import threading
import time
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elastictrain import pulse
from elastictrain.errors import ClusterError
from elastictrain.pulse import Pulse, PulseFile, pulse_folder, pulse_paths, start_ticks, sweep
from elastictrain.signs import WAITING, Activity


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return pulse_folder("a run", tmp_path)


def test_what_is_written_is_read(folder: Path) -> None:
    before_s = time.monotonic()
    writer = Pulse.create(folder, 4)
    reader = PulseFile(next(pulse_paths(folder)))
    first = reader.read()
    assert first is not None
    assert (first.worker, first.pid, first.start_ticks) == (4, os.getpid(), start_ticks(os.getpid()))
    assert (first.thread, first.activity, first.count) == (threading.get_native_id(), Activity.STARTING, 1)
    assert before_s <= first.entered_s <= first.beat_s <= time.monotonic()
    writer.begin_step(3, 17)
    writer.enter(Activity.VOTE)
    writer.beat()
    beat = reader.read()
    assert beat is not None
    assert (beat.generation, beat.step, beat.activity, beat.count) == (3, 17, Activity.VOTE, 4)
    assert beat.entered_s < beat.beat_s
    assert (beat.steps_done, beat.step_s) == (0, 0.0)


def test_a_step_is_measured_from_its_begin_to_its_end(folder: Path) -> None:
    writer = Pulse.create(folder, 0)
    reader = PulseFile(next(pulse_paths(folder)))
    began_s = time.monotonic()
    writer.begin_step(1, 1)
    while time.monotonic() < began_s + 0.02:
        writer.beat()
    writer.end_step()
    took_s = time.monotonic() - began_s
    writer.enter(Activity.EVALUATE)  # between steps: not part of any
    writer.begin_step(1, 2)
    beat = reader.read()
    assert beat is not None
    assert beat.steps_done == 1
    assert 0.02 <= beat.step_s <= took_s


def test_the_training_thread_is_the_one_that_says_so(folder: Path) -> None:
    writer = Pulse.create(folder, 0)
    reader = PulseFile(next(pulse_paths(folder)))
    ids = []

    def adopt() -> None:
        writer.adopt()
        ids.append(threading.get_native_id())

    thread = threading.Thread(target=adopt)
    thread.start()
    thread.join()
    beat = reader.read()
    assert beat is not None
    assert [beat.thread] == ids != [threading.get_native_id()]


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 5), st.integers(0, 79), st.binary(min_size=1, max_size=40))
def test_a_torn_newest_slot_falls_back_on_the_one_before(beats: int, at: int, junk: bytes) -> None:
    """A writer that is stopped in the middle of a beat: any prefix of the slot is new, zeroed or old."""
    import tempfile

    with tempfile.TemporaryDirectory() as home:
        folder = pulse_folder("x", Path(home))
        writer = Pulse.create(folder, 0)
        for _ in range(beats):
            writer.beat()
        newest = pulse._SLOTS_AT[(beats + 1) & 1]
        memory = writer._memory
        original = bytes(memory[newest : newest + 80])
        memory[newest : newest + 80] = (original[:at] + junk + original[at + len(junk) :])[:80]
        changed = bytes(memory[newest : newest + 80])
        reader = PulseFile(next(pulse_paths(folder)))
        beat = reader.read()
        counts_agree = changed[:8] == changed[72:80]
        assert beat is None or beat.count == (struct.unpack("<q", changed[:8])[0] if counts_agree else beats)
        memory[newest : newest + 8] = bytes(8)  # struct zeroes a slot before it fills it
        memory[newest + 72 : newest + 80] = bytes(8)
        fallen = reader.read()
        assert fallen is not None
        assert fallen.count == beats
        reader.close()


def test_a_reader_in_another_process_never_sees_a_torn_beat(folder: Path) -> None:
    """step and generation are written as count x 3 and count x 7: a mixture would show."""
    code = f"""
import sys, time
sys.path[:0] = {[str(Path(pulse.__file__).parents[1])]!r}
from pathlib import Path
from elastictrain.pulse import Pulse
writer = Pulse.create(Path({str(folder)!r}), 1)
print("ready", flush=True)
until = time.monotonic() + 1.0
while time.monotonic() < until:
    writer._generation, writer._step = (writer._count + 1) * 3, (writer._count + 1) * 7
    writer.beat()
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        reader = PulseFile(next(pulse_paths(folder)))
        seen = []
        while process.poll() is None:
            beat = reader.read()
            if beat is not None and beat.count > 1:
                assert (beat.generation, beat.step) == (beat.count * 3, beat.count * 7)
                seen.append(beat.count)
        assert process.returncode == 0
    # While the newest slot is being written, the one before it is read.
    assert all(later >= earlier - 1 for earlier, later in pairwise(seen))
    assert len(set(seen)) > 100


def test_a_file_that_is_no_pulse_is_refused_and_a_cut_one_is_unreadable(folder: Path) -> None:
    (folder / "a.pulse").write_bytes(b"")
    (folder / "b.pulse").write_bytes(b"something else, and long enough for a header")
    for path in pulse_paths(folder):
        with pytest.raises(ValueError, match="is no pulse"):
            PulseFile(path)
        path.unlink()
    writer = Pulse.create(folder, 0)
    assert writer.path is not None
    reader = PulseFile(writer.path)
    kept = writer.path.read_bytes()
    writer.path.write_bytes(kept[:100])
    assert reader.read() is None
    writer.path.write_bytes(kept)
    assert reader.read() is not None


def test_an_activity_that_this_version_does_not_know_is_no_beat(folder: Path) -> None:
    writer = Pulse.create(folder, 0)
    writer._activity = 99
    writer.beat()
    writer.beat()
    assert PulseFile(next(pulse_paths(folder))).read() is None


def test_the_folder_is_the_users_own(tmp_path: Path) -> None:
    mine = pulse_folder("one", tmp_path)
    assert mine.stat().st_mode & 0o777 == 0o700
    assert pulse_folder("one", tmp_path) == mine != pulse_folder("two", tmp_path)
    target = tmp_path / "elsewhere"
    mine.rename(target)
    mine.symlink_to(target)
    with pytest.raises(ClusterError, match="should be this user's folder for signs of life, but is not; remove it"):
        pulse_folder("one", tmp_path)


def test_a_worker_starts_without_a_place_for_its_pulse(tmp_path: Path) -> None:
    mute, why = Pulse.create_or_mute(tmp_path / "missing", 3)
    assert why.startswith("FileNotFoundError")
    mute.begin_step(1, 1)
    mute.adopt()
    mute.close()
    assert Pulse.create_or_mute(None, 3)[1] == "no folder"
    good, why = Pulse.create_or_mute(tmp_path, 3)
    assert (good.path is not None, why) == (True, "")


def test_a_worker_that_leaves_takes_its_pulse_along(folder: Path) -> None:
    writer = Pulse.create(folder, 0)
    writer.close()
    writer.beat()
    writer.close()
    assert list(pulse_paths(folder)) == []
    assert list(pulse_paths(folder / "gone")) == []


def test_sweep_removes_what_dead_runs_left_behind_and_nothing_else(tmp_path: Path) -> None:
    alive, dead, empty = (pulse_folder(name, tmp_path) for name in ("alive", "dead", "empty"))
    Pulse.create(alive, 0)
    header = struct.pack("<8sqqqq", pulse.MAGIC, 0, os.getpid(), 1, 0)  # our pid, but another start
    (dead / "0-1.pulse").write_bytes(header)
    (tmp_path / "elastictrain-other").mkdir()
    assert sweep(tmp_path) == [dead]
    assert alive.exists()
    assert empty.exists()
    assert (tmp_path / "elastictrain-other").exists()


def test_the_start_of_a_process_names_it() -> None:
    own = start_ticks(os.getpid())
    assert own is not None
    assert own > 0
    with subprocess.Popen(["true"]) as process:
        ticks = start_ticks(process.pid)
        assert ticks is not None
        assert ticks >= own
    assert start_ticks(process.pid) in (None, *range(ticks + 1, ticks + 10**6))  # gone, or a later process


def test_a_beat_costs_next_to_nothing(folder: Path) -> None:
    writer = Pulse.create(folder, 0)
    best_s = min(_time_of(writer.beat, 2_000) for _ in range(20))
    assert best_s < 5e-6  # 0.4 us measured; the margin is for machines under load


def _time_of(call: object, times: int) -> float:
    assert callable(call)
    began_s = time.perf_counter()
    for _ in range(times):
        call()
    return (time.perf_counter() - began_s) / times


def test_a_worker_waits_where_others_can_hold_it_up() -> None:
    assert {Activity.EXCHANGE, Activity.MIRROR, Activity.VOTE, Activity.GATHER, Activity.MEET, Activity.IDLE} == WAITING
    order = [Activity.DATA, Activity.COMPUTE, Activity.EXCHANGE, Activity.MIRROR, Activity.VOTE, Activity.APPLY]
    assert [*order, Activity.GATHER] == sorted([*order, Activity.GATHER])
