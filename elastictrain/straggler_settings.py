"""What a job says about slow workers: watching them, moving lanes, and lanes that more than one worker may compute."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from elastictrain.settings import Settings, a_number, not_a_switch


def off_is_no_switch(value: object) -> object:
    """YAML reads `off` and `no` as False: where "off" is one of the words, that is meant. `on` says not which."""
    if value is True:
        raise ValueError("YAML reads `on` and `yes` as a switch (got True); say which: watch, lanes or evict")
    return "off" if value is False else value


class Stragglers(Settings):
    """What is done about workers that are slow, or slower than others from the start (docs/stragglers.md)."""

    action: Annotated[Literal["off", "watch", "lanes", "evict"], BeforeValidator(off_is_no_switch)] = "watch"
    """"watch": say who is slow, and why. "lanes": also deal the lanes out by speed, between two steps; no bit changes.
    "evict": also replace a worker by a spare that waits, or leave it out, where moving lanes is not enough.
    """
    min_gain: Annotated[float, BeforeValidator(a_number), Field(gt=0, lt=1)] = 0.03
    """Share of a step's computation that a change must win."""

    @model_validator(mode="before")
    @classmethod
    def _short(cls, value: Any) -> Any:
        """`stragglers: lanes` is `stragglers: {action: lanes}`."""
        return {"action": value} if isinstance(value, str | bool) else value


Dropped = dict[Annotated[int, Field(ge=1)], tuple[Annotated[int, Field(ge=0)], ...]]
"""By step: the lanes that do not count in it."""


class Redundancy(Settings):
    """Lanes that more than one worker may compute within a step, without a change of bits; or of which the last to be
    done do not count (docs/stragglers.md).
    """

    lanes: Literal["none", "take_over", "first_result", "coded", "drop_slowest"] = "none"
    """"take_over": who is done takes over lanes that a late worker has not begun. "first_result": it also computes a
    copy of the one that the late worker is in, and the first result counts. "coded": groups of workers have the same
    lanes, and the first of a group to be done is enough (everything is computed `group` times).
    "drop_slowest": the last `drop_at_most` lanes of a step do not count if they are late. It changes what is learned:
    which samples count depends on time. Which did not is recorded, and `replay` repeats it.
    """
    depth: Annotated[int, BeforeValidator(not_a_switch), Field(ge=1, le=127)] = 2
    """With `take_over` and `first_result`: so many lanes of each worker, its last ones, have a second holder, which
    reads their data too."""
    group: Annotated[int, BeforeValidator(not_a_switch), Field(ge=2)] = 2
    """With `coded`: how many workers have the same lanes."""
    drop_at_most: Annotated[int, BeforeValidator(not_a_switch), Field(ge=1, le=127)] = 1
    """With `drop_slowest`: so many lanes of a step, of all workers together, may not count."""
    replay: str | Dropped | None = None
    """Let the same lanes not count as in another run: its run directory, or its metrics.jsonl. Where the run is
    started it becomes {step: lanes}."""

    @property
    def drops(self) -> bool:
        """Whether there may be lanes that do not count."""
        return self.lanes == "drop_slowest" or self.replay is not None

    @property
    def reach(self) -> int:
        """How many of its last lanes a worker may lose."""
        return self.drop_at_most if self.lanes == "drop_slowest" else self.depth

    @property
    def replayed(self) -> Dropped | None:
        """By step, the lanes that are not to count; None: no run is repeated. Raises ValueError before it was read."""
        if isinstance(self.replay, str):
            raise ValueError(f"redundancy.replay={self.replay!r} was not read")
        return self.replay

    def check(self, gradients: str, most_workers: int, action: str, lane_count: int) -> None:
        """Raises ValueError where the rest of the job does not go with it."""
        if self.replay is not None:
            self._check_replay(gradients, lane_count)
            return
        if self.lanes == "none":
            return
        if self.lanes == "drop_slowest" and self.drop_at_most >= lane_count:
            raise ValueError(
                f"redundancy.drop_at_most={self.drop_at_most} with lanes={lane_count}: a step needs a lane that "
                f"counts; set redundancy.drop_at_most to {max(1, lane_count // 8)}, or raise lanes"
            )
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

    def _check_replay(self, gradients: str, lane_count: int) -> None:
        if self.lanes not in ("none", "drop_slowest"):
            raise ValueError(
                f"redundancy.replay with redundancy.lanes={self.lanes}: a run is repeated without lanes of others, by "
                "whose computation no bit changes; set redundancy.lanes: none"
            )
        if gradients != "sum":
            raise ValueError(f"redundancy.replay needs gradients=sum (got {gradients}); set gradients: sum")
        for step, dropped in self.replay.items() if isinstance(self.replay, dict) else ():
            wrong = [lane for lane in dropped if lane >= lane_count]
            if wrong or len(set(dropped)) >= lane_count:
                raise ValueError(
                    f"redundancy.replay: in step {step} lanes {list(dropped)} do not count, and the job has lanes "
                    f"0 to {lane_count - 1}, of which one must; set lanes to that of the run that is repeated"
                )
