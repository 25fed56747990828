"""What the settings of a simulation share."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from elastictrain.settings import not_a_switch

Seconds = Annotated[float, BeforeValidator(not_a_switch), Field(ge=0)]
Share = Annotated[float, BeforeValidator(not_a_switch), Field(ge=0, le=1)]
Count = Annotated[int, BeforeValidator(not_a_switch), Field(ge=0)]


class Part(BaseModel):
    """A group of settings: frozen, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
