"""Time stamps out of worker processes, and kills on order. Installed by the benchmarks' recipe, so that it works alike
on plain processes and on Ray; the product has no hook for it.

Every process appends JSON lines to `<folder>/<pid>.jsonl`. Times are CLOCK_MONOTONIC, which all processes of a host
share. `cpu` is the processor time of all threads of the process: unlike the time it is little moved by what else runs
on the machine. A line costs some ten microseconds.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any, TextIO


class Stamps:
    """The file of this process, made with the first line."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._file: TextIO | None = None

    def __call__(self, kind: str, **values: Any) -> None:
        if self._file is None:
            self._file = (self.folder / f"{os.getpid()}.jsonl").open("a", buffering=1, encoding="utf-8")
        line = {"k": kind, "t": time.monotonic(), "cpu": time.process_time()} | values
        self._file.write(json.dumps(line) + "\n")


def read(folder: Path) -> list[dict[str, Any]]:
    """All lines of all processes in the order of time, each with its pid. A torn last line is left out."""
    found = []
    for path in folder.glob("*.jsonl"):
        whole = path.read_text(encoding="utf-8").rpartition("\n")[0]
        found += [json.loads(line) | {"pid": int(path.stem)} for line in whole.splitlines()]
    return sorted(found, key=lambda line: line["t"])


# --- memory ---


def memory_bytes(field: str) -> int:
    """`VmRSS` or `VmHWM` (its peak since the last `forget_peak`) of this process."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}; this benchmark needs Linux")


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def live_tensor_bytes() -> int:
    """Bytes of all storages that a Python tensor refers to."""
    import torch

    sizes: dict[int, int] = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), torch.Tensor) and thing.device.type == "cpu":
            storage = thing.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
    return sum(sizes.values())


# --- the engine ---


def install(folder: str, *, memory_base: int | None = None) -> None:
    """Stamp every step of this process's session: start, applied, end (with its phases). With `memory_base` (the RSS
    from which to count) peaks too. Obeys orders: a file `kill-<pid>` that names a phase,
    and `block-<pid>` (it waits for ever, at the next point of a step).
    """
    from elastictrain.engine import forming, probes, stepping
    from elastictrain.faults import Kill

    looped: Any = stepping.Stepping
    if getattr(stepping, "_stamped", False):
        return
    stepping._stamped = True
    stamp = Stamps(folder)
    one_step, apply_step, at = looped._one_step, stepping.apply_step, probes.Probes.at
    memory = MemoryWatch(stamp, memory_base) if memory_base is not None else None

    def stamped_step(self: Any, *arguments: Any) -> Any:
        where = {"step": self.step, "generation": self.plan.generation, "rank": self.runner.rank}
        stamp("start", **where, world=self.layout.world_size)
        if memory is not None:
            memory.before_step()
        result = one_step(self, *arguments)
        stamp("end", **where, phases=self.runner.seconds)
        if memory is not None:
            memory.after_step()
        return result

    def stamped_apply(session_: Any, pending: Any, *arguments: Any) -> Any:
        result = apply_step(session_, pending, *arguments)
        stamp("applied", step=pending.step, generation=arguments[-1])
        return result

    def ordered(self: Any, step: int, phase: str) -> None:
        order = f"{folder}/kill-{os.getpid()}"
        if os.path.exists(order) and Path(order).read_text(encoding="ascii") == phase:  # noqa: PTH110 - hot path
            stamp("kill", step=step, phase=phase)
            os.kill(os.getpid(), signal.SIGKILL)
        if os.path.exists(f"{folder}/block-{os.getpid()}"):  # noqa: PTH110 - hot path
            stamp("block", step=step, phase=phase)
            threading.Event().wait()
        if any(isinstance(fault, Kill) and (fault.step, fault.phase) == (step, phase) for fault in self._waiting):
            stamp("kill", step=step, phase=phase)
        if memory is not None and phase == "vote":
            memory.at_vote()
        at(self, step, phase)

    looped._one_step = stamped_step
    stepping.apply_step = forming.apply_step = stamped_apply  # type: ignore[attr-defined]
    probes.Probes.at = ordered  # type: ignore[method-assign]


def install_moves(folder: str) -> None:
    """Stamp what moves while a generation forms, and send as much again through gloo alone, after the seal."""
    from elastictrain.engine import forming, session

    if getattr(forming, "_stamped", False):
        return
    forming._stamped = True
    stamp = Stamps(folder)
    move, publish, enter = forming._move, forming._publish_all, forming.enter_generation
    moving: dict[str, Any] = {}

    def watched(what: Any) -> Any:
        def run(session_: Any, plan: Any, groups: Any, *more: Any) -> Any:
            exchange = groups.exchange

            def counted(sends: Any, recvs: Any, **named: Any) -> None:
                moving["sends"] += [(peer, t.numel() * t.element_size()) for peer, t in sends]
                moving["recvs"] += [(peer, t.numel() * t.element_size()) for peer, t in recvs]
                exchange(sends, recvs, **named)

            groups.exchange = counted
            groups.all_gather_equal(b"now")  # all begin together, as the bare transfer does
            begun = time.monotonic()
            try:
                return what(session_, plan, groups, *more)
            finally:
                groups.exchange = exchange
                moving["ours_s"] += time.monotonic() - begun

        return run

    def entered(session_: Any, plan: Any, groups: Any) -> None:
        moving.update(sends=[], recvs=[], ours_s=0.0)
        enter(session_, plan, groups)
        if groups.world > 1:
            begun = time.monotonic()
            fresh_s = _bare_gloo(groups, moving["sends"], moving["recvs"], touched=False)
            bare_s = _bare_gloo(groups, moving["sends"], moving["recvs"], touched=True)
            received = sum(size for _, size in moving["recvs"])
            stamp("moved", generation=plan.generation, joiner=session_.worker in plan.joiners, ours_s=moving["ours_s"],
                  bare_s=bare_s, fresh_s=fresh_s, received_bytes=received,
                  extra_s=time.monotonic() - begun)  # fmt: skip

    forming._move, forming._publish_all = watched(move), watched(publish)
    session.enter_generation = entered  # type: ignore[attr-defined]


def _bare_gloo(groups: Any, sends: list[tuple[int, int]], recvs: list[tuple[int, int]], *, touched: bool) -> float:
    """Seconds for one buffer per pair and direction, of all the bytes that went that way. `touched`: whether the pages
    of the receiver are there already; a newcomer's are not.
    """
    import torch

    def buffers(pieces: list[tuple[int, int]], make: Any = torch.ones) -> dict[int, Any]:
        sizes: dict[int, int] = {}
        for peer, size in pieces:
            sizes[peer] = sizes.get(peer, 0) + size
        return {peer: make(size, dtype=torch.uint8) for peer, size in sorted(sizes.items()) if size}

    out, coming, group = buffers(sends), buffers(recvs, torch.ones if touched else torch.empty), groups._gloo
    groups.all_gather_equal(b"now")
    begun = time.monotonic()
    works = [group.recv([t], peer, 77) for peer, t in coming.items()]
    works += [group.send([t], peer, 77) for peer, t in out.items()]
    for work in works:
        work.wait()
    return time.monotonic() - begun


class MemoryWatch:
    """Peaks of this process above `base`: up to its first step (building, forming), and in steps from the third on."""

    def __init__(self, stamp: Stamps, base: int) -> None:
        self._stamp, self._base, self._steps, self._live = stamp, base, 0, 0

    def before_step(self) -> None:
        self._steps += 1
        if self._steps == 1:
            self._stamp("built", peak=memory_bytes("VmHWM") - self._base)
        if self._steps in (1, 3):
            forget_peak()

    def at_vote(self) -> None:
        self._live = live_tensor_bytes()

    def after_step(self) -> None:
        self._stamp("memory", peak=memory_bytes("VmHWM") - self._base, live=self._live, nth=self._steps)
