"""Seeds that are derived from the job's."""

from __future__ import annotations


def lane_seed(seed: int, step: int, lane: int) -> int:
    """One 63-bit seed per (job seed, step, lane): splitmix64 finaliser (Steele et al. 2014) over the three."""
    value = (seed * 0x9E3779B97F4A7C15 + step * 0xBF58476D1CE4E5B9 + lane * 0x94D049BB133111EB) & (2**64 - 1)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        value = ((value ^ (value >> shift)) * factor) & (2**64 - 1)
    return (value ^ (value >> 31)) >> 1


def stage_seed(seed: int, stage: int) -> int:
    """The seed of the data order that begins with a stage; later ones have their own, so that they repeat nothing."""
    return seed if stage == 0 else lane_seed(seed, 0, stage)
