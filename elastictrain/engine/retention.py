"""Which checkpoints stay: the settings `keep` of a job in the words of the library."""

from __future__ import annotations

from elastictrain.job import Keep
from elastictrain_checkpoint.policies import Best, EverySteps, Newest, Policy, Spaced, Younger


def policy_of(keep: int | Keep) -> Policy:
    """`checkpoint.keep`, and that of a copy."""
    if isinstance(keep, int):
        return Newest(keep)
    found: Policy = Newest(keep.newest)
    if keep.every_steps is not None:
        found |= EverySteps(keep.every_steps)
    if keep.younger is not None:
        found |= Younger(keep.younger)
    if keep.spaced is not None:
        found |= Spaced(keep.spaced)
    if keep.best is not None:
        found |= Best(keep.best.metric, keep.best.n, keep.best.mode)
    return found
