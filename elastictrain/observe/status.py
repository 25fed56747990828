"""What a run looks like at this moment: `status.json`, the live view and `elastictrain status`."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field


class Status(BaseModel):
    """`state`: the controller's phase, as its name: gathering, forming, running, parking, finishing, finished, failed,
    stopped. `lanes`: lanes per worker number. `held_once`: blocks with a single holder. `waiting`: why the run waits.
    `exposure_s`: if everything died now, so many seconds of training would be lost; `stored_step`: the newest step that
    is stored. `checkpoint_given_up`: the data of that event, until a checkpoint is committed. `copies`: by
    further place of checkpoints, its newest step, the steps that wait, and what is wrong. `speeds`: relative, by worker
    number, once lanes were dealt out by them. `taken_over`: where lanes are shared, the sums over the last steps that
    tokens/s is taken over, as in a metrics row; `lanes_dropped`: where lanes may be dropped, how many were in these.
    `last_recovery`: the data of the last `recovery` event.
    `error`: why it failed. Times in seconds or ISO UTC.
    """

    model_config = ConfigDict(extra="allow")

    state: str = "gathering"
    name: str = ""
    run_dir: str = ""
    step: int = 0
    steps: int = 0
    generation: int = 0
    world: int = 0
    lanes: dict[int, int] = Field(default_factory=dict)
    held_once: int = 0
    spares: int = 0
    loss: float | None = None
    tokens_per_s: float | None = None
    exposure_s: float | None = None
    stored_step: int | None = None
    checkpoint_given_up: dict[str, Any] | None = None
    copies: dict[str, dict[str, Any]] = Field(default_factory=dict)
    speeds: dict[int, float] = Field(default_factory=dict)
    taken_over: dict[str, Any] | None = None
    lanes_dropped: int | None = None
    last_recovery: dict[str, Any] | None = None
    waiting: str | None = None
    error: str | None = None
    updated: str | None = None
