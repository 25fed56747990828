"""Whether two processes compute the same bits: the facts that decide it (see `engine.numerics`), compared in words."""

from __future__ import annotations

from collections.abc import Mapping

WHAT = {
    "torch": "torch version",
    "device": "device model",
    "cpu": "CPU instruction set",
    "threads": "intra-op threads",
    "compute_dtype": "compute dtype",
    "matmul_precision": "matmul precision",
    "deterministic": "deterministic algorithms",
    "attention": "attention backend",
}


def differences(run: Mapping[str, str], other: Mapping[str, str], who: str) -> list[str]:
    """Every difference as a sentence; empty when equal bits can be promised."""
    return [
        f"{who} has {WHAT.get(key, key)} {other.get(key, 'unknown')}, the run has {value}: results will differ in the "
        "last bits"
        for key, value in run.items()
        if other.get(key) != value
    ]
