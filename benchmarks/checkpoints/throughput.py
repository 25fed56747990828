"""Saving and loading against the disk itself and against torch.distributed.checkpoint (DCP), large and small tensors.

Every round does all cases one after the other, so that what else the machine does hits all alike; ratios are medians
over rounds, and always throughput by throughput: 2 means twice as fast, half the time. Both sides end a save with fsync
of every file; loads are warm (from the page cache) and fill buffers that were there before.

What hashing costs is a few percent, less than one round differs from the next. So it has rounds of its own, many, and
nothing between what is compared: a save and two loads with hashes and without, which of them first in turn.
"""

from __future__ import annotations

import gc
import os
import random
import shutil
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import numpy as np

import common
from elastictrain_checkpoint import PackWriter, Piece, Reader, Request, Store, commit, hashing, load, reader, verify

Arrays = Mapping[str, np.ndarray]
MIB = 1 << 20
LARGE, SMALL = "64 x 4 MiB", "3,000 x 16 KiB"


def arrays(count: int, shape: tuple[int, ...]) -> dict[str, np.ndarray]:
    made = np.random.default_rng(0).standard_normal((count, *shape), dtype=np.float32)
    return {f"model/layers.{i // 10}.part{i % 10}.weight": made[i].copy() for i in range(count)}


# --- ours ---


def our_save(folder: Path, state: Arrays) -> None:
    store = Store(folder)
    pieces = [Piece(name, "F32", value.shape, 0, value) for name, value in state.items()]
    part = PackWriter(store, step=1, attempt="a", writer="w0").write(pieces)
    commit(store, step=1, attempt="a", generation=1, parts=[part])


def our_load(folder: Path, state: Arrays) -> None:
    store = Store(folder)
    source = Reader(store, load(store, 1))
    source.read_many([Request(name, 0, value.size, value) for name, value in state.items()])


def our_verify(folder: Path, _: Arrays) -> None:
    store = Store(folder)
    if problems := verify(store, load(store, 1)):
        raise AssertionError(problems)


# --- the peer, and the disk ---


def dcp_save(folder: Path, state: Arrays, threads: int = 1) -> None:
    import torch.distributed.checkpoint as dcp

    writer = dcp.FileSystemWriter(folder, thread_count=threads, single_file_per_rank=threads == 1, sync_files=True)
    dcp.save(tensors(state), storage_writer=writer, no_dist=True)


def dcp_load(folder: Path, state: Arrays) -> None:
    import torch.distributed.checkpoint as dcp

    dcp.load(tensors(state), storage_reader=dcp.FileSystemReader(folder), no_dist=True)


def tensors(state: Arrays) -> dict[str, Any]:
    import torch

    return {name: torch.from_numpy(value) for name, value in state.items()}


def raw_save(folder: Path, state: Arrays) -> None:
    folder.mkdir(parents=True)
    file = os.open(folder / "raw", os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    views = [memoryview(value).cast("B") for value in state.values()]
    for at in range(0, len(views), 512):
        batch = views[at : at + 512]
        size = sum(map(len, batch))
        if os.writev(file, batch) != size:
            raise OSError("short write")
    os.fsync(file)
    os.close(file)


def raw_save_early(folder: Path, state: Arrays) -> None:
    """As `raw_save`, with room set aside and the device at work from the first bytes on, as our own writer does it."""
    stream = hashing.Blocks([hashing.Run(memoryview(v).cast("B")) for v in state.values()], nbytes(state))
    folder.mkdir(parents=True)
    Store(folder).create("raw", stream)


def nbytes(state: Arrays) -> int:
    return sum(value.nbytes for value in state.values())


def raw_load(folder: Path, state: Arrays) -> None:
    file = os.open(folder / "raw", os.O_RDONLY)
    views = [memoryview(value).cast("B") for value in state.values()]
    for at in range(0, len(views), 512):
        batch = views[at : at + 512]
        if os.readv(file, batch) != sum(map(len, batch)):
            raise OSError("short read")
    os.close(file)


# --- measuring ---


def without_hashes(work: Callable[[Path, Arrays], None]) -> Callable[[Path, Arrays], None]:
    """The same work with hashes that cost nothing (and say nothing): the difference is the price of hashing."""

    def call(folder: Path, state: Arrays) -> None:
        kept = hashing.block_sum, hashing._hash_cells, hashing._cell_hash, reader.block_sum_of
        hashing.block_sum = lambda _: 0
        hashing._hash_cells = _no_cells
        hashing._cell_hash = lambda _: b"0123456789abcdef"
        reader.block_sum_of = lambda _: 0
        try:
            work(folder, state)
        finally:
            hashing.block_sum, hashing._hash_cells, hashing._cell_hash, reader.block_sum_of = kept

    return call


def _no_cells(run: hashing.Run, start: int, stop: int) -> int:
    step = run.cell_bytes
    if not step:
        return 0
    if stop < len(run.view):
        stop -= stop % step
    run.cells.extend([b"0123456789abcdef"] * -(-(stop - start) // step))
    return stop


def timed(work: Callable[[Path, Arrays], None], folder: Path, state: Arrays) -> float:
    gc.collect()
    begun = time.perf_counter()
    work(folder, state)
    return time.perf_counter() - begun


def measure(folder: Path, state: Arrays, rounds: int) -> dict[str, list[float]]:
    """Seconds of each case in each round."""
    saves = {
        "raw": raw_save,
        "raw, begun early": without_hashes(raw_save_early),
        "elastictrain": our_save,
        "elastictrain without hashes": without_hashes(our_save),
        "DCP": dcp_save,
        "DCP, 2 threads": lambda place, what: dcp_save(place, what, threads=2),
    }
    loads = {
        "raw": (raw_load, "raw"),
        "elastictrain": (our_load, "elastictrain"),
        "elastictrain without hashes": (without_hashes(our_load), "elastictrain without hashes"),
        "elastictrain, verify alone": (our_verify, "elastictrain"),
        "DCP": (dcp_load, "DCP"),
    }
    found: dict[str, list[float]] = {f"save {name}": [] for name in saves} | {f"load {name}": [] for name in loads}
    targets = {name: np.empty_like(value) for name, value in state.items()}
    for value in targets.values():
        value.fill(0)
    os.sync()
    for number in range(rounds + 1):  # the first warms up
        place = folder / str(number)
        names = list(saves)
        for name in names[number % len(names) :] + names[: number % len(names)]:
            taken = timed(saves[name], place / name, state)
            if number:
                found[f"save {name}"].append(taken)
        for name in list(loads)[number % len(loads) :] + list(loads)[: number % len(loads)]:
            work, where = loads[name]
            work(place / where, targets)  # once unmeasured: what was just written is not yet as warm everywhere
            taken = timed(work, place / where, targets)
            if number:
                found[f"load {name}"].append(taken)
            if not all(np.array_equal(value, targets[key]) for key, value in state.items()):
                raise AssertionError(f"{name} has loaded something else")
        shutil.rmtree(place)
        os.sync()
    return found


def measure_hashing(folder: Path, state: Arrays, rounds: int) -> dict[str, list[list[float]]]:
    """(seconds, seconds of processor time) with hashes and without, of as many neighbours in time."""
    targets = {name: np.zeros_like(value) for name, value in state.items()}
    works = {"hashes": (our_save, our_load), "none": (without_hashes(our_save), without_hashes(our_load))}
    found: dict[str, list[list[float]]] = {f"{verb} {name}": [] for verb in ("save", "load") for name in works}

    def note(case: str, work: Callable[[Path, Arrays], None], place: Path, what: Arrays, *, counts: bool) -> None:
        gc.collect()
        worked, begun = time.process_time(), time.perf_counter()
        work(place, what)
        taken = [time.perf_counter() - begun, time.process_time() - worked]
        if counts:
            found[case].append(taken)

    for number in range(rounds + 1):  # the first warms up
        order = list(works) if number % 2 else list(works)[::-1]
        our_save(folder / "first", state)  # whichever save follows on a removal is the slowest
        for name in order:
            os.sync()
            note(f"save {name}", works[name][0], folder / name, state, counts=number > 0)
        for again in range(4):  # the first two find what was just written
            for name in order if again % 2 else order[::-1]:
                note(f"load {name}", works[name][1], folder / name, targets, counts=number > 0 and again > 1)
        shutil.rmtree(folder)
    return found


def undisturbed(values: Iterable[float]) -> float:
    """The mean of the fastest third: what else a machine and its disk do only ever adds time, to half of the rounds or
    more (a disk that was ours at full speed for a while takes five times as long from then on).
    """
    found = sorted(values)
    return statistics.fmean(found[: -(-len(found) // 3)])


def price(found: Mapping[str, list[list[float]]], verb: str, which: int, drawn: Sequence[int] | None = None) -> float:
    """Percent that hashing adds to a save or load. ``which``: 0 for time, 1 for processor time. ``drawn``: of which
    pairs of neighbours; all of them if not given.
    """
    with_, without = found[f"{verb} hashes"], found[f"{verb} none"]
    drawn = range(len(with_)) if drawn is None else drawn
    one, other = (undisturbed(taken[number][which] for number in drawn) for taken in (with_, without))
    return 100 * (one / other - 1)


def price_by_chance(found: Mapping[str, list[list[float]]], verb: str) -> tuple[float, float]:
    """Where 90 % of the prices in time lie when pairs are drawn anew."""
    draw, count = random.Random(0), len(found[f"{verb} hashes"])
    prices = [price(found, verb, 0, draw.choices(range(count), k=count)) for _ in range(2000)]
    return common.quantile(prices, 0.05), common.quantile(prices, 0.95)


def ratio(found: Mapping[str, list[float]], one: str, other: str) -> float:
    """How many times as fast ``one`` is as ``other``: the median over rounds."""
    return common.median(b / a for a, b in zip(found[one], found[other], strict=True))


def case(results: common.Results, folder: Path, name: str, state: Arrays, rounds: int) -> None:
    size = nbytes(state)
    found = measure(folder, state, rounds)
    results.raw[name] = found
    for what, taken in found.items():
        verb = what.partition(" ")[0]
        results.row(
            **{
                "tensors": name,
                "case": what,
                "ms": 1000 * common.median(taken),
                "ms over rounds": common.spread([1000 * one for one in taken]),
                "MiB/s": size / MIB / common.median(taken),
                "throughput / raw": ratio(found, what, f"{verb} raw"),
                "throughput / DCP": ratio(found, what, f"{verb} DCP"),
            }
        )
    best = min(("save DCP", "save DCP, 2 threads"), key=lambda peer: common.median(found[peer]))

    def figure(title: str, one: str, other: str, least: float | None) -> None:
        value = ratio(found, one, other)
        if least is None:
            results.figure(f"{title}, {name}", value, "none", "beside it")
        else:
            results.figure(f"{title}, {name}", value, f"{least:g} or more", common.verdict(value, least, at_most=False))

    if name == LARGE:
        figure("durable save with hashes: throughput / raw write + fsync", "save elastictrain", "save raw", 0.9)
        figure(
            "durable save with hashes: throughput / raw write, begun early, + fsync",
            "save elastictrain",
            "save raw, begun early",
            None,
        )
        figure("load, verified, warm: throughput / raw readinto", "load elastictrain", "load raw", 0.8)
        figure("verify, warm: throughput / raw readinto", "load elastictrain, verify alone", "load raw", 1.0)
        figure("save: throughput / DCP at its best", "save elastictrain", best, 1.6)
        figure("load: throughput / DCP", "load elastictrain", "load DCP", 2.0)
        priced = measure_hashing(folder / "hashing", state, 3 * rounds)
        results.raw["hashing"] = priced
        for verb, most in (("save", 5.0), ("load", 10.0)):
            cost = price(priced, verb, 0)
            reached = common.verdict(cost, most, at_most=True)
            title = f"cost of hashing, % of a {verb}, {name}"
            results.figure(title, cost, f"{most:g} or less", reached)
            low, high = price_by_chance(priced, verb)
            results.figure(f"{title}: 90 % of what chance makes of it", f"{low:.1f} .. {high:.1f}", "none", "beside it")
            results.figure(f"{title}, of processor time", price(priced, verb, 1), "none", "beside it")
    else:
        figure("save: throughput / DCP at its best", "save elastictrain", best, 12.0)
        figure("save, what the disk allows: raw write + fsync / DCP at its best", "save raw", best, None)
        figure("save: throughput / raw write + fsync", "save elastictrain", "save raw", None)
        figure("load: throughput / DCP", "load elastictrain", "load DCP", 15.0)


def main() -> None:
    options = common.arguments(__doc__, lambda parser: parser.add_argument("--rounds", type=int, default=None))
    warnings.filterwarnings("ignore", message=".*single process.*")
    results = common.Results("checkpoint_throughput", "Checkpoints: saving and loading", options)
    rounds = options.rounds or (5 if options.quick else 15)
    with common.scratch("checkpoints") as folder:
        case(results, folder / "large", LARGE, arrays(64, (1024, 1024)), rounds)
        case(results, folder / "small", SMALL, arrays(3000, (64, 64)), rounds)
    results.notes += [
        "Ratios are medians over rounds of neighbours in time: above 1 means faster.",
        "Both sides sync every file; elastictrain also syncs folders, and writes, syncs and reads back its manifest.",
        (
            "Raw: writev of all tensors into one file and fsync; readv, in one thread, into buffers that were touched "
            "before. Elastictrain can be faster: it sets room aside and lets the device begin before the last byte (as "
            "`raw, begun early` does), and reads in as many threads as there are processors, four at most."
        ),
        (
            "What hashing costs: the mean of the fastest third of the rounds with hashes against that of those without "
            "(what disturbs a round only adds time), and where it lies when pairs of neighbours are drawn anew."
        ),
        "Verify alone: what `elastictrain ckpt verify` does, which keeps no tensor.",
        "A load includes opening the checkpoint: reading and checking the manifest, or DCP's metadata.",
        "DCP: FileSystemWriter without a process group, one thread or two, sync_files; it verifies nothing on load.",
    ]
    results.write()


if __name__ == "__main__":
    main()
