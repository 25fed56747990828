"""The setting `start_from`: what a new run begins with instead of the recipe's initial values."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from elastictrain.settings import Settings


class Place(Settings):
    """A further place of a run's checkpoints."""

    path: str
    """A folder or any fsspec URL."""
    storage_options: dict[str, Any] = Field(default_factory=dict)


class StartFrom(Settings):
    """Weights that a new run begins with: step 0, data from the beginning."""

    checkpoint: str
    """A run directory; folder or URL of another run's checkpoints, of a checkpoint of another format, or one
    `.safetensors` file.
    """
    copies: tuple[Place, ...] = ()
    """Of another run's checkpoints: further places that they lie in, nearest first; those of a run directory are taken
    from its job.
    """
    step: Annotated[int, Field(ge=0)] | None = None
    """Of another run's checkpoints; default the newest."""
    format: Literal["auto", "elastictrain", "safetensors", "dcp", "universal", "megatron"] = "auto"
    mapping: str | tuple[dict[str, Any], ...] | None = None
    """Rules for names and shapes (docs/checkpoint-formats.md): a JSON file, or the rules themselves."""
    strict: bool = True
    """Refuse a checkpoint that lacks tensors of the model or has others; if off, these keep the recipe's values."""
    optimizer: bool = False
    """Take the optimizer's state and the moving average along, not the weights only."""
    storage_options: dict[str, Any] = Field(default_factory=dict)
    fingerprint: str | None = None
    """What `checkpoint` has to be; filled in when a run starts, so that it is the same whenever it is read again."""

    def provenance(self) -> dict[str, Any]:
        """What checkpoints of the run say of it; no secrets."""
        said = self.model_dump(mode="json", exclude={"storage_options", "copies"})
        return said | ({"copies": [{"path": one.path} for one in self.copies]} if self.copies else {})

    def differences(self, recorded: dict[str, Any]) -> list[str]:
        """How this differs from what a checkpoint says that its run has started from; sentences. What is filled in when
        a run starts counts only where it is given here.
        """
        mine = self.provenance()
        given = {key for key in ("step", "fingerprint") if mine[key] is not None}
        given |= set() if isinstance(self.mapping, str) else {"mapping"}
        return [
            f"start_from.{key}={mine[key]!r}, the run was started with {recorded.get(key)!r}"
            for key in ("checkpoint", "format", "strict", "optimizer", *sorted(given))
            if mine[key] != recorded.get(key)
        ]
