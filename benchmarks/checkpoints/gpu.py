"""What a checkpoint of state on a CUDA device costs the training beside it: the main thread's block, and slower steps.

A state of parameters and Adam's averages lies on the device; a step is a fixed amount of arithmetic and then an update
of all of it in place, so every step changes every byte. Steps are trained without a checkpoint, and then while one is
being written, until it is durable; sides take turns. The main thread's block is the longest that one call for the
checkpoint held it up: the call that begins it, or the announcement of an update. Needs a CUDA device.
"""

from __future__ import annotations

import itertools
import shutil
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

import common
from elastictrain.engine.saving import Owned
from elastictrain.engine.to_host import ToHost
from elastictrain_checkpoint import Store, commit
from elastictrain_checkpoint.lazy import LazySaver
from elastictrain_checkpoint.torch import AsyncSaver

GIB = 1 << 30
TENSOR_BYTES = 64 << 20
BOUNCE_BYTES = 256 << 20
MOST_STEPS = 20_000
NO_DEVICE = "this benchmark needs a CUDA device, and torch.cuda.is_available() is False: nothing was measured"


class Training:
    """State of about ``size_bytes`` on the device; a step takes about ``step_ms``."""

    def __init__(self, size_bytes: int, step_ms: float) -> None:
        elements = TENSOR_BYTES // 4
        count = max(3, size_bytes // TENSOR_BYTES)
        self.tensors = {f"layer.{number}": torch.randn(elements, device="cuda") for number in range(count)}
        self.state_bytes = count * TENSOR_BYTES
        self.square = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
        self.rounds = 1
        update_ms = self.timed_ms(lambda: self.update(), 3)
        round_ms = self.timed_ms(lambda: self.compute(), 10)
        self.rounds = max(1, int((step_ms - update_ms) / round_ms))

    def timed_ms(self, work: Callable[[], None], times: int) -> float:
        work()
        torch.cuda.synchronize()
        begun = time.perf_counter()
        for _ in range(times):
            work()
        torch.cuda.synchronize()
        return 1e3 * (time.perf_counter() - begun) / times

    def state(self) -> dict[str, Any]:
        """With fresh containers, as `state_dict()` gives them."""
        return {"state": dict(self.tensors)}

    def compute(self) -> None:
        for _ in range(self.rounds):
            self.square = torch.tanh(self.square @ self.square)

    def update(self) -> None:
        torch._foreach_mul_(list(self.tensors.values()), 0.999)


class Ours:
    def __init__(self, training: Training, folder: Path, bounce_bytes: int | None) -> None:
        self.training, self.step = training, 0
        self.saver = AsyncSaver(folder, bounce_bytes=bounce_bytes)

    def save(self) -> None:
        self.step += 1
        self.handle = self.saver.save(self.training.state(), step=self.step)

    def before_update(self) -> None:
        self.saver.before_mutation()

    @property
    def done(self) -> bool:
        return self.handle.done()

    def finish(self) -> None:
        self.handle.result()


class Run:
    """What a worker of a run does, without its votes: blocks to the host, packs beside training, and the manifest."""

    def __init__(self, training: Training, folder: Path) -> None:
        self.training, self.step = training, 0
        self.store = Store(folder)
        self.lazy, self.to_host = LazySaver(self.store, max_copy=1.0), ToHost()

    def save(self) -> None:
        self.step += 1
        owned = Owned(to_host=lambda tensors: self.to_host.begin(tensors, fresh=self.lazy.is_busy))
        for name, tensor in self.training.tensors.items():
            owned.add(name, tensor.shape, 0, tensor)
        owned.stage()
        names: dict[str, Any] = {"step": self.step, "attempt": f"g{self.step:06d}"}
        self.handle = self.lazy.save(
            owned.pieces,
            **names,
            writer="w0000",
            stable=owned.copies,
            ready=self.to_host.copied(),
            finish=lambda part: commit(self.store, **names, generation=self.step, parts=[part]),
        )

    def before_update(self) -> None:
        self.to_host.before_apply()
        self.lazy.before_mutation()

    @property
    def done(self) -> bool:
        return self.handle.done

    def finish(self) -> None:
        self.handle.result()


class Dcp:
    """`async_save` with pinned memory that is kept, copied to on a stream of its own and in the background."""

    def __init__(self, training: Training, folder: Path) -> None:
        self.training, self.folder, self.step = training, folder, 0
        self.stager = DefaultStager(
            StagingOptions(
                use_pinned_memory=True, use_shared_memory=False, use_async_staging=True, use_non_blocking_copy=True
            )
        )

    def save(self) -> None:
        self.step += 1
        writer = dcp.FileSystemWriter(self.folder / f"step-{self.step}", thread_count=1)
        self.saved: Any = dcp.async_save(
            self.training.state(), storage_writer=writer, async_stager=self.stager, no_dist=True
        )
        self.staged = False

    def before_update(self) -> None:
        if not self.staged:  # what is being copied may not change: who stages in the background has to wait here
            self.saved.staging_completion.result()
            self.staged = True

    @property
    def done(self) -> bool:
        return bool(self.saved.upload_completion.done())

    def finish(self) -> None:
        self.saved.upload_completion.result()


def steps(training: Training, system: Any, least: int) -> dict[str, float]:
    """Train ``least`` steps, or more until the checkpoint is durable; it is begun before the first of them."""
    blocked: list[float] = []

    def held_up(call: Callable[[], None]) -> None:
        at = time.perf_counter()
        call()
        blocked.append(1e3 * (time.perf_counter() - at))

    torch.cuda.synchronize()
    begun = time.perf_counter()
    if system is not None:
        held_up(system.save)
    number = 0
    for number in itertools.count(1):
        training.compute()
        if system is not None:
            held_up(system.before_update)
        training.update()
        if number % 4 == 0:
            torch.cuda.synchronize()  # a loop that logs its loss waits now and then
        if number >= least and (system is None or system.done or number == MOST_STEPS):
            break
    torch.cuda.synchronize()
    wall = time.perf_counter() - begun
    if system is not None:
        system.finish()
    return {
        "step ms": 1e3 * wall / number,
        "steps": float(number),
        "return ms": blocked[0] if blocked else 0.0,
        "block ms": max(blocked, default=0.0),
    }


def copy_ms(training: Training) -> float:
    """The same bytes to pinned memory and nothing else: what no checkpoint can go below."""
    pinned = torch.empty(TENSOR_BYTES // 4, pin_memory=True)
    return training.timed_ms(
        lambda: [pinned.copy_(t, non_blocking=True) for t in training.tensors.values()] and None, 3
    )


def main() -> None:
    options = common.arguments(
        __doc__,
        lambda parser: (
            parser.add_argument("--gib", type=float, default=None, help="size of the state (default: 16, quick: 2)"),
            parser.add_argument("--step-ms", type=float, default=250.0, help="length of a step (default: %(default)s)"),
            parser.add_argument("--rounds", type=int, default=None),
        ),
    )
    if not torch.cuda.is_available():
        print(NO_DEVICE)
        return
    gib = options.gib or (2.0 if options.quick else 16.0)
    rounds = options.rounds or (2 if options.quick else 5)
    least = 10 if options.quick else 40
    results = common.Results("checkpoint_gpu", "What a checkpoint of a device's state costs the training", options)
    training = Training(int(gib * GIB), options.step_ms)
    found: dict[str, list[dict[str, float]]] = {
        name: [] for name in ("none", "ours", "a run", "ours, bounced", "DCP, pinned")
    }
    with common.scratch("gpu") as folder:
        systems: dict[str, Any] = {
            "none": None,
            "ours": Ours(training, folder / "ours", None),
            "a run": Run(training, folder / "run"),
            "ours, bounced": Ours(training, folder / "bounced", BOUNCE_BYTES),
            "DCP, pinned": Dcp(training, folder / "dcp"),
        }
        for turn in range(rounds + 1):  # the first makes the pinned memory, and is shown by itself
            for name, system in systems.items():
                one = steps(training, system, least)
                if turn:
                    found[name].append(one)
                elif system is not None:
                    results.row(system=f"{name}, first save", **one)
                for old in folder.glob("*/step-*"):
                    shutil.rmtree(old)
        host_bytes = {name: system.saver.extra_bytes for name, system in systems.items() if isinstance(system, Ours)}
    inflation = {
        name: 100 * (common.median(a["step ms"] / b["step ms"] for a, b in zip(runs, found["none"], strict=True)) - 1)
        for name, runs in found.items()
    }
    for name, runs in found.items():
        shown = {key: common.median(one[key] for one in runs) for key in runs[0]}
        results.row(system=name, **shown, **{"step inflation %": inflation[name]})
    for name, runs in found.items():
        figures = {
            "step inflation while saving, %": (inflation[name], 3),
            "main-thread block, ms": (max(one["block ms"] for one in runs), 5),
        }
        for what, (value, most) in figures.items() if name != "none" else ():
            target, reached = f"{most} or less", common.verdict(value, most, at_most=True)
            if name not in ("ours", "a run"):
                target, reached = "none", "beside it"
            results.figure(f"{gib:g} GiB: {what}, {name}", value, target, reached)
    results.raw = found
    results.notes += [
        f"{torch.cuda.get_device_name()}; {len(training.tensors)} tensors of 64 MiB; steps of {options.step_ms:g} ms.",
        f"The bytes alone, device to pinned host: {copy_ms(training):.0f} ms.",
        "Memory on the host: " + ", ".join(f"{name} {size / GIB:.2f} GiB" for name, size in host_bytes.items()),
        f"`bounced`: through {BOUNCE_BYTES >> 20} MiB of pinned memory; updates wait on the host until all is through.",
    ]
    results.write()


if __name__ == "__main__":
    warnings.filterwarnings("ignore", module="torch")
    main()
