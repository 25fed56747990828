"""Checkpoints in and out of other formats, copied and compared: bytes per second, against a plain write of as many.

Sides are interleaved; every writing side ends durable (fsync), as an import, an export and a copy do. Files are warm.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file

import common
from elastictrain_checkpoint import Manifest, Reader, Store, load
from elastictrain_checkpoint.convert import (
    default_rules,
    export_dcp,
    export_safetensors,
    import_checkpoint,
    only_the_model,
    open_source,
)
from elastictrain_checkpoint.difference import diff
from elastictrain_checkpoint.mapping import Mapped
from elastictrain_checkpoint.source import Arrays
from elastictrain_checkpoint.transfer import copy_checkpoint


def tensors(count: int, elements: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {f"layers.{i}.weight": torch.randn(elements, generator=generator) for i in range(count)}


def sync(folder: Path) -> None:
    """Make what others wrote as durable as what we write."""
    for path in folder.rglob("*"):
        if path.is_file():
            file = os.open(path, os.O_RDONLY)
            os.fsync(file)
            os.close(file)


def plain_write(state: dict[str, torch.Tensor], out: Path) -> None:
    with (out / "plain").open("wb", buffering=0) as file:
        for tensor in state.values():
            file.write(tensor.numpy().data)
        os.fsync(file.fileno())


def bring_in(url: Path, out: Path) -> None:
    source = open_source(str(url))
    import_checkpoint(Mapped(source, default_rules(source)), Store(out))


def sides(state: dict[str, torch.Tensor], folder: Path) -> dict[str, Callable[[Path], object]]:
    """Name → what to do with an empty folder."""
    store = Store(folder / "ours")
    held = {f"model/{n}": ("F32", tuple(t.shape), t.numpy()) for n, t in state.items()}
    import_checkpoint(Arrays(held), store, step=1)
    manifest: Manifest = load(store, 1)
    (folder / "hf").mkdir()
    save_file(state, folder / "hf" / "model.safetensors")
    dcp.save({"model": dict(state)}, checkpoint_id=folder / "dcp", no_dist=True)

    def stock_safetensors(out: Path) -> None:
        save_file(state, out / "model.safetensors")
        sync(out)

    def model() -> Mapped:
        return Mapped(Reader(store, manifest), only_the_model())

    return {
        "plain write, fsync": lambda out: plain_write(state, out),
        "import safetensors": lambda out: bring_in(folder / "hf", out),
        "import DCP": lambda out: bring_in(folder / "dcp", out),
        "export safetensors": lambda out: export_safetensors(model(), Store(out)),
        "export safetensors as BF16": lambda out: export_safetensors(model(), Store(out), cast="BF16"),
        "save_file of safetensors, fsync (from memory)": stock_safetensors,
        "export DCP": lambda out: export_dcp(Reader(store, manifest), Store(out)),
        "dcp.save (from memory)": lambda out: dcp.save({"model": dict(state)}, checkpoint_id=out, no_dist=True),
        "cp": lambda out: copy_checkpoint(store, manifest, Store(out)),
        "diff with itself": lambda _: list(diff(Reader(store, manifest), Reader(store, manifest))),
    }


def main() -> None:
    options = common.arguments(__doc__)
    warnings.simplefilter("ignore")
    results = common.Results("formats", "Checkpoints of other formats: in, out, copied, compared", options)
    cases = {"large": (16, 1 << 20), "small": (2000, 4096)} if options.quick else {
        "large": (64, 1 << 20), "small": (8000, 4096),
    }  # fmt: skip
    rounds = 3 if options.quick else 7
    with common.scratch("formats") as folder:
        for case, (count, elements) in cases.items():
            state = tensors(count, elements)
            size = sum(t.numel() * t.element_size() for t in state.values())
            place = folder / case
            place.mkdir()
            made = sides(state, place)
            seconds: dict[str, list[float]] = {name: [] for name in made}
            for number in range(rounds):
                for name, act in made.items():
                    out = place / "out"
                    with contextlib.suppress(FileNotFoundError):
                        shutil.rmtree(out)
                    out.mkdir()
                    begun_s = time.perf_counter()
                    act(out)
                    seconds[name].append(time.perf_counter() - begun_s)
                print(f"{case}: round {number + 1} of {rounds}", flush=True)
            base = np.array(seconds["plain write, fsync"])
            for name, taken in seconds.items():
                results.row(
                    **{
                        "case": case,
                        "side": name,
                        "MiB/s": size / 2**20 / common.median(taken),
                        "time / plain write": float(np.median(np.array(taken) / base)),
                        "s": common.spread(taken),
                    }
                )
            results.raw[case] = seconds
    results.notes += [
        f"{', '.join(f'{name}: {n} tensors of {e} float32' for name, (n, e) in cases.items())}; {rounds} rounds.",
        "Imports, exports and cp check every byte that they read, and make what they write durable; dcp.save does too.",
    ]
    results.write()


if __name__ == "__main__":
    main()
