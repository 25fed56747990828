"""What a checkpoint in the background costs the training beside it, against `torch.distributed.checkpoint.async_save`.

Every round trains the same few steps with each system and without a checkpoint; the checkpoint is begun after the first
step. Measured: how long the call takes; the total stall, which adds what is waited or copied before the next optimizer
step; the wall time, and the processor time of all threads, of the steps beyond those without a checkpoint; and, in a
process of its own for each system, the peak of resident memory above that of the same steps without a checkpoint.

Steps without a checkpoint are run right before and right after those of each system, and their median is what each step
is compared with: a machine drifts by more in a minute than a checkpoint adds. What a checkpoint adds is then, for the
first step with it, the second and so on, the mean of the middle half of all rounds, and the sum of these: a hiccup in a
step of one round counts for nothing, on either side. How far it may be off by chance is found by drawing rounds anew.

`--best` measures only our default, the best configuration of DCP, and the bytes alone: more rounds, or a larger state,
in the same time.
"""

from __future__ import annotations

import gc
import json
import os
import random
import shutil
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

import common
from elastictrain_checkpoint import disk
from elastictrain_checkpoint.direct_io import huge_memory, open_direct
from elastictrain_checkpoint.lazy import MAX_COPY
from elastictrain_checkpoint.torch import AsyncSaver

STEPS = 5
LEAST_ROUNDS = 48
"""Together long enough for every system to finish its write among them, and not much longer: noise grows with time."""
CASES = {"256 MiB": (64, 1 << 20), "1 GiB": (256, 1 << 20), "3000 x 16 KiB": (3000, 4096)}
"""name -> (tensors, elements of each): parameters and the two averages of Adam together."""
OURS = "ours, lazy"
BEST = "DCP, kept staging"
BARE = "none"
FLOOR = "the bytes alone"


class Training:
    """Parameters, Adam, and a step: a fixed amount of arithmetic, then the update."""

    def __init__(self, tensors: int, elements: int) -> None:
        torch.manual_seed(0)
        self.parameters = [torch.randn(elements, requires_grad=True) for _ in range(-(-tensors // 3))]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-4, foreach=True)
        for parameter in self.parameters:
            parameter.grad = torch.randn(elements)
        self.square = torch.randn(512, 512)
        self.rounds = max(LEAST_ROUNDS, self.state_bytes // (512 * 512 * 4) // 4)
        self.optimizer.step()

    @property
    def state_bytes(self) -> int:
        return 12 * sum(parameter.numel() for parameter in self.parameters)

    def state(self) -> dict[str, Any]:
        """With fresh containers, as `state_dict()` gives them."""
        model = {f"layer.{number}": parameter.detach() for number, parameter in enumerate(self.parameters)}
        return {"model": model, "optim": self.optimizer.state_dict()}

    def compute(self) -> None:
        for _ in range(self.rounds):
            self.square = torch.tanh(self.square @ self.square)


class Ours:
    """`AsyncSaver`, lazy (copy on step, up to a fraction of the state) or eager (copied at the call)."""

    def __init__(self, training: Training, folder: Path, lazy: bool, max_copy: float = MAX_COPY) -> None:
        self.training, self.lazy, self.step = training, lazy, 0
        self.saver = AsyncSaver(folder, max_copy=max_copy)

    def save(self) -> None:
        self.step += 1
        self.handle = self.saver.save(self.training.state(), step=self.step, lazy=self.lazy)

    def before_step(self) -> None:
        self.saver.before_mutation()

    def finish(self) -> dict[str, float]:
        self.handle.result()
        return {"copied": self.handle.copied_bytes, "pool": self.saver.extra_bytes}


class Dcp:
    """`async_save` in a thread. `kept`: one stager for all saves, which copies into memory that it has. Its options for
    pinned memory and for staging in the background need a device.
    """

    def __init__(self, training: Training, folder: Path, kept: bool, threads: int) -> None:
        self.training, self.folder, self.step, self.threads = training, folder, 0, threads
        options = StagingOptions(
            use_pinned_memory=False, use_shared_memory=False, use_async_staging=False, use_non_blocking_copy=False
        )
        self.stager = DefaultStager(options) if kept else None

    def save(self) -> None:
        self.step += 1
        writer = dcp.FileSystemWriter(self.folder / f"step-{self.step}", thread_count=self.threads)
        self.future: Any = dcp.async_save(
            self.training.state(), storage_writer=writer, async_stager=self.stager, no_dist=True
        )

    def before_step(self) -> None:
        """Staging has ended when `async_save` returns."""

    def finish(self) -> dict[str, float]:
        self.future.result()
        return {}


class Bytes:
    """As many bytes as the state has, always the same few, written past the page cache and synced by a thread that does
    nothing else: what it costs the steps that the device takes a checkpoint at all.
    """

    def __init__(self, training: Training, folder: Path) -> None:
        self.path, self.size = folder / "bytes", training.state_bytes
        folder.mkdir(parents=True)
        self.memory = memoryview(huge_memory(4 << 20))
        np.frombuffer(self.memory, dtype=np.uint8).fill(1)

    def save(self) -> None:
        self.thread = threading.Thread(target=self.write)
        self.thread.start()

    def write(self) -> None:
        file = os.open(self.path, os.O_WRONLY | os.O_CREAT)
        disk.reserve(file, self.size)
        direct = open_direct(file)
        for start in range(0, self.size, len(self.memory)):
            data = self.memory[: self.size - start]
            if os.pwrite(file if direct is None else direct, data, start) != len(data):
                raise OSError("short write")
        os.fsync(file)
        for one in (file, direct):
            if one is not None:
                os.close(one)

    def before_step(self) -> None:
        """Nothing waits."""

    def finish(self) -> dict[str, float]:
        self.thread.join()
        self.path.unlink()
        return {}


SYSTEMS: dict[str, Callable[[Training, Path], Any]] = {
    OURS: lambda training, folder: Ours(training, folder, lazy=True),
    "ours, lazy, copies all": lambda training, folder: Ours(training, folder, lazy=True, max_copy=1.0),
    "ours, lazy, copies nothing": lambda training, folder: Ours(training, folder, lazy=True, max_copy=0.0),
    "ours, eager": lambda training, folder: Ours(training, folder, lazy=False),
    BEST: lambda training, folder: Dcp(training, folder, kept=True, threads=1),
    "DCP, kept staging, 2 threads": lambda training, folder: Dcp(training, folder, kept=True, threads=2),
    "DCP, default": lambda training, folder: Dcp(training, folder, kept=False, threads=1),
}


def train(training: Training, system: Any) -> dict[str, Any]:
    """A few steps, with a checkpoint after the first if there is a system."""
    returned = waited = 0.0
    worked, steps, begun = time.process_time(), [], time.perf_counter()
    for step in range(STEPS):
        training.compute()
        if system is not None:
            at = time.perf_counter()
            system.before_step()
            waited += time.perf_counter() - at
        training.optimizer.step()
        if step == 0 and system is not None:
            at = time.perf_counter()
            system.save()
            returned = time.perf_counter() - at
        steps.append(-begun + (begun := time.perf_counter()))
    more = system.finish() if system is not None else {}
    times = {"steps s": steps, "processor s": time.process_time() - worked}
    return {"return ms": 1e3 * returned, "stall ms": 1e3 * (returned + waited), **times, **more}


def peak_bytes() -> int:
    """The largest resident memory since `forget_peak`."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def memory(case: str, name: str, folder: Path) -> int:
    """In this process: bytes that the second checkpoint's steps need beyond the same steps without one."""
    training = Training(*CASES[case])
    train(training, None)
    gc.collect()
    forget_peak()
    train(training, None)
    bare = peak_bytes()
    system = SYSTEMS[name](training, folder)
    train(training, system)
    forget_peak()
    train(training, system)
    return peak_bytes() - bare


def memory_of(case: str, name: str, folder: Path) -> int:
    """`memory` in a process of its own."""
    command = [sys.executable, __file__, "--memory", case, name, str(folder)]
    made = subprocess.run(command, env=common.child_environment(), capture_output=True, text=True, check=True)
    return int(json.loads(made.stdout.splitlines()[-1]))


def middle(values: Iterable[float]) -> float:
    """The mean of the middle half."""
    found = sorted(values)
    out = len(found) // 4
    return sum(found[out : len(found) - out]) / (len(found) - 2 * out)


def added_ms(runs: Sequence[Mapping[str, Any]]) -> float:
    """What a checkpoint adds to the steps from its beginning on: of each step the middle of all rounds."""
    return sum(middle(steps) for steps in zip(*(one["added ms"] for one in runs), strict=True))


def by_chance(ours: Sequence[Mapping[str, Any]], theirs: Sequence[Sequence[Mapping[str, Any]]]) -> tuple[float, float]:
    """Where 90 % of the ratios of `added_ms` lie, ours to the best of theirs, when rounds are drawn anew."""
    draw, found = random.Random(0), []
    for _ in range(2000):
        rounds = draw.choices(range(len(ours)), k=len(ours))
        best = min(added_ms([one[number] for number in rounds]) for one in theirs)
        found.append(added_ms([ours[number] for number in rounds]) / best if best > 0 else float("inf"))
    return common.quantile(found, 0.05), common.quantile(found, 0.95)


def measure(case: str, names: list[str], rounds: int, folder: Path) -> tuple[int, dict[str, list[dict[str, Any]]]]:
    """All systems in turn, round by round, each between two runs without a checkpoint; the first round warms up and is
    dropped.
    """
    training = Training(*CASES[case])
    systems = {
        name: (SYSTEMS | {FLOOR: Bytes})[name](training, folder / str(number)) for number, name in enumerate(names)
    }
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in [BARE, *names]}
    for turn in range(rounds + 1):
        before = train(training, None)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            one = train(training, systems[name])
            for old in sorted((folder / str(names.index(name))).glob("step-*")):
                shutil.rmtree(old)  # the disk holds one checkpoint
            after = train(training, None)
            bare_s = common.median([*before["steps s"], *after["steps s"]])
            one["added ms"] = [1e3 * (taken - bare_s) for taken in one["steps s"]]
            one["added processor ms"] = 1e3 * (one["processor s"] - (before["processor s"] + after["processor s"]) / 2)
            if turn:
                found[name].append(one)
                found[BARE].append(after)
            before = after
    return training.state_bytes, found


def memcpy_ms(size: int) -> float:
    """A copy of that many bytes into memory that is warm: what an eager save cannot go below."""
    source, target = torch.ones(size // 4), torch.ones(size // 4)
    times = []
    for _ in range(5):
        at = time.perf_counter()
        target.copy_(source)
        times.append(1e3 * (time.perf_counter() - at))
    return common.median(times)


def main() -> None:
    if len(sys.argv) > 1 and sys.argv[1] == "--memory":
        print(json.dumps(memory(sys.argv[2], sys.argv[3], Path(sys.argv[4]))))
        return
    options = common.arguments(
        __doc__,
        lambda parser: (
            parser.add_argument("--rounds", type=int, default=None),
            parser.add_argument("--cases", nargs="+", choices=list(CASES), default=None),
            parser.add_argument("--name", default="checkpoint_stall", help="of the results (default: %(default)s)"),
            parser.add_argument("--best", action="store_true", help=f"only {OURS!r} and {BEST!r}"),
        ),
    )
    rounds = options.rounds or (3 if options.quick else 9)
    cases = options.cases or (["256 MiB"] if options.quick else list(CASES))
    names = [name for name in SYSTEMS if not options.quick or name in (OURS, "ours, eager", BEST)]
    names = [OURS, BEST] if options.best else names
    results = common.Results(options.name, "What a checkpoint in the background costs the training", options)
    for case in cases:
        with common.scratch("stall") as folder:
            size, found = measure(case, names, rounds, folder)
            found[FLOOR] = measure(case, [FLOOR], -(-rounds // 2), folder / "floor")[1][
                FLOOR
            ]  # not between: it tires the disk
            results.raw[case] = found
            bare_s = common.median(taken for one in found[BARE] for taken in one["steps s"])
            shown: dict[str, dict[str, Any]] = {}
            for number, name in enumerate([*names, FLOOR]):
                runs = found[name]
                extra = memory_of(case, name, folder / f"memory-{number}") if name != FLOOR else float("nan")
                shown[name] = {
                    "return ms": common.median(one["return ms"] for one in runs),
                    "stall ms": common.median(one["stall ms"] for one in runs),
                    "added wall ms": added_ms(runs),
                    "added wall ms over rounds": common.spread([sum(one["added ms"]) for one in runs]),
                    "added processor ms": common.median(one["added processor ms"] for one in runs),
                    "extra memory / state": extra / size,
                    "copied / state": common.median(one.get("copied", float("nan")) for one in runs) / size,
                    "pool / state": max(one.get("pool", float("nan")) for one in runs) / size,
                }
                results.row(state=case, system=name, **shown[name], **{"step ms": 1e3 * bare_s})
            report(results, case, shown, memcpy_ms(size))
            low, high = by_chance(found[OURS], [found[name] for name in names if name.startswith("DCP")])
            results.figure(
                f"{case}: added wall / DCP, 90 % of what chance makes of it",
                f"{low:.2f} .. {high:.2f}",
                "none",
                "beside it",
            )
            best_ms = min(one["added wall ms"] for name, one in shown.items() if name.startswith("DCP"))
            floor = shown[FLOOR]["added wall ms"] / best_ms
            results.figure(f"{case}: added wall / DCP, of the bytes alone", floor, "none", "beside it")
    results.notes += [
        (
            f"{STEPS} steps a round, a checkpoint after the first; {rounds} rounds, systems in turn; medians, but for "
            "`added wall`. Both sides write durably (fsync); one thread trains, what writes has threads of its own."
        ),
        (
            "`added wall` is the time of these steps beyond the median of the steps without a checkpoint right before "
            "and right after: of the first step, the second … the mean of the middle half of the rounds, added up; "
            "a write that takes longer than the steps is not in it. `added processor` is the "
            "time of all threads of the process, from the first step until the checkpoint is there: less exact on a "
            "quiet machine, but other processes hardly touch it."
        ),
        (
            f"`{FLOOR}`: as many bytes as the state has, always the same 4 MiB, written past the page cache and synced "
            "by a thread that copies and hashes nothing, in rounds of their own: what the device's work alone costs."
        ),
        (
            "Extra memory: peak of resident memory in the steps of a second checkpoint, beyond the same steps without "
            f"one. A save copies up to {MAX_COPY:g} of the state (`max_copy`), and the update waits while more is left "
            "to be written; `copies all` never waits, `copies nothing` waits for all."
        ),
    ]
    results.write()


def report(results: common.Results, case: str, shown: dict[str, dict[str, Any]], copy_ms: float) -> None:
    """The figures of one case, against the best of DCP in each."""
    ours, others = shown[OURS], [shown[name] for name in shown if name.startswith("DCP")]
    small = case.startswith("3000")
    targets = {"return ms": 0.10, "stall ms": 0.10 if small else 0.35, "added wall ms": 0.5}
    for key, target in targets.items():
        value = ours[key] / min(other[key] for other in others)
        name = f"{case}: {key.removesuffix(' ms')} / DCP"
        results.figure(name, value, f"{target:g} or less", common.verdict(value, target, at_most=True))
    value = ours["extra memory / state"]
    results.figure(f"{case}: extra memory / state", value, "0.25 or less", common.verdict(value, 0.25, at_most=True))
    # Memory is bought with time: what the two ends of `max_copy` need beside it.
    for end in ("copies all", "copies nothing"):
        other = shown.get(f"ours, lazy, {end}")
        if other is not None:
            for key in ("extra memory / state", "stall ms"):
                results.figure(f"{case}, {end}: {key}", other[key], "none", f"beside it: {ours[key]:.4g} by default")
    if not small and "ours, eager" in shown:
        eager = shown["ours, eager"]["stall ms"] / copy_ms
        results.figure(
            f"{case}: eager stall / memcpy", eager, "1.05 or less", common.verdict(eager, 1.05, at_most=True)
        )


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", module="torch")
    main()
