"""How strong slow-downs are and how long they last: for both simulations of slow workers (`speeds`, `pace`)."""

from __future__ import annotations

from random import Random

from elastictrain.stragglers.rental import prior_s


def lasts_s(rng: Random, workers: int) -> float:
    """Seconds beyond the least: a Lomax distribution of shape 2, with the mean that is expected of so many workers."""
    return float(prior_s(workers) * ((1.0 - rng.random()) ** -0.5 - 1.0))


def factor(rng: Random) -> float:
    """By how much a lane takes longer."""
    return min(6.0, 1.15 + rng.expovariate(1 / 0.85))
