"""What a job says about slow workers: watching them, moving lanes, and lanes that more than one worker may compute."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from elastictrain.settings import Settings, a_number, not_a_switch


class Stragglers(Settings):
    """What is done about workers that are slow, or slower than others from the start (docs/stragglers.md)."""

    action: Literal["off", "watch", "lanes", "evict"] = "watch"
    """"watch": say who is slow, and why. "lanes": also deal the lanes out by speed, between two steps; no bit changes.
    "evict": also replace a worker by a spare that waits, or leave it out, where moving lanes is not enough.
    """
    min_gain: Annotated[float, BeforeValidator(a_number), Field(gt=0, lt=1)] = 0.03
    """Share of a step's computation that a change must win."""


class Redundancy(Settings):
    """Lanes that more than one worker may compute within a step; no bit changes (docs/stragglers.md)."""

    lanes: Literal["none", "take_over", "first_result", "coded"] = "none"
    """"take_over": who is done takes over lanes that a late worker has not begun. "first_result": it also computes a
    copy of the one that the late worker is in, and the first result counts. "coded": groups of workers have the same
    lanes, and the first of a group to be done is enough (everything is computed `group` times).
    """
    depth: Annotated[int, BeforeValidator(not_a_switch), Field(ge=1, le=127)] = 2
    """With `take_over` and `first_result`: so many lanes of each worker, its last ones, have a second holder, which
    reads their data too. A worker's signal has room for 127 lanes of others."""
    group: Annotated[int, BeforeValidator(not_a_switch), Field(ge=2)] = 2
    """With `coded`: how many workers have the same lanes."""

    def check(self, gradients: str, most_workers: int, action: str) -> None:
        """Raises ValueError where the rest of the job does not go with it."""
        if self.lanes == "none":
            return
        if gradients != "sum":
            raise ValueError(
                f"redundancy.lanes={self.lanes} needs gradients=sum: with gradients={gradients} every lane is sent "
                "when it is computed, and nobody is late alone; set gradients: sum, or redundancy.lanes: none"
            )
        least = self.group if self.lanes == "coded" else 2
        if most_workers < least:
            raise ValueError(
                f"redundancy.lanes={self.lanes} with workers.max={most_workers}: expected {least} workers or more, so "
                "that others can compute a worker's lanes; raise workers.max, or set redundancy.lanes: none"
            )
        if self.lanes == "coded" and action in ("lanes", "evict"):
            raise ValueError(
                f"redundancy.lanes=coded and stragglers.action={action}: in a group all have the same lanes, so moving "
                "them helps nobody; set stragglers.action: watch, or redundancy.lanes: take_over"
            )
