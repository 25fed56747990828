"""What is trained, and one way of cutting it up: the inputs of the cost model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from pydantic import TypeAdapter, ValidationError

from elastictrain.errors import ConfigError
from elastictrain.planner.profiles import Dtype
from elastictrain.settings import nearest

Attention = Literal["plain", "fused", "flash1", "flash2"]
Checkpointing = Literal["none", "selective", "every_layer"]
"""Of activations. "selective": only the scores of attention are computed again (Korthikanti et al. 2022)."""
Schedule = Literal["1f1b", "gpipe", "zb-h1"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Transformer:
    """A decoder of equal layers. `ffn`: width of the MLP; `gated`: three matrices (SwiGLU) instead of two.

    `attention`: how it is computed. "plain": scores pass through memory in f32, operation by operation; "fused": one
    kernel for scale, mask and softmax; "flash1" and "flash2": scores never reach memory. `fused_norm`: one kernel per
    norm, which keeps no f32 copies.
    """

    layers: int
    hidden: int
    heads: int
    sequence: int
    vocab: int
    ffn: int
    gated: bool = False
    attention: Attention = "flash2"
    fused_norm: bool = True
    tied: bool = False
    loss_over_shards: bool = True
    """The loss of a tensor-parallel head is computed on its shards; otherwise the logits are gathered first."""

    def __post_init__(self) -> None:
        for name in ("layers", "hidden", "heads", "sequence", "vocab", "ffn"):
            if getattr(self, name) < 1:
                raise ConfigError(f"model.{name}={getattr(self, name)}: expected 1 or more")

    @property
    def layer_params(self) -> int:
        return 4 * self.hidden * self.hidden + (3 if self.gated else 2) * self.hidden * self.ffn

    @property
    def vocab_params(self) -> int:
        return self.vocab * self.hidden

    @property
    def params(self) -> int:
        return self.layers * self.layer_params + (1 if self.tied else 2) * self.vocab_params


def gated_width(hidden: int) -> int:
    """LLaMA's rule (Touvron et al. 2023): two thirds of 4h, rounded up to a multiple of 256."""
    return math.ceil(8 * hidden / 3 / 256) * 256


def parse_model(raw: object, *, where: str = "model") -> Transformer:
    """A decoder's shape from plain data; `ffn` may be left out. Raises ConfigError naming what is wrong."""
    if not isinstance(raw, Mapping):
        raise ConfigError(f"{where}: expected a mapping with layers, hidden, heads, sequence and vocab")
    raw = dict(raw)
    known = list(Transformer.__dataclass_fields__)
    switches = {name for name, field in Transformer.__dataclass_fields__.items() if isinstance(field.default, bool)}
    for key in raw:
        if key not in known:
            raise ConfigError(f"{where}: unknown setting {key!r}{nearest(str(key), known)}")
        if isinstance(raw[key], bool) != (key in switches):
            raise ConfigError(
                f"{where}: {key}={raw[key]!r}: expected {'true or false' if key in switches else 'no switch'}"
            )
    if "ffn" not in raw and isinstance(raw.get("hidden"), int):
        raw["ffn"] = gated_width(raw["hidden"]) if raw.get("gated") else 4 * raw["hidden"]
    try:
        return TypeAdapter(Transformer).validate_python(raw)
    except ValidationError as error:
        lines = [f"{where}: {'.'.join(map(str, e['loc']))}: {e['msg']} (got {e['input']!r})" for e in error.errors()]
        raise ConfigError("\n".join(lines)) from None


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """tensor x pipeline x workers, and how each is run. `micro_batch`: sequences of one forward. `micro_batches`: how
    many of them a pipeline does in a step.
    """

    tensor: int = 1
    pipeline: int = 1
    workers: int = 1
    micro_batch: int = 1
    micro_batches: int = 1
    checkpointing: Checkpointing = "none"
    schedule: Schedule = "1f1b"
    chunks: int = 1
    """Model chunks per stage (interleaved 1F1B, Narayanan et al. 2021): the bubble shrinks by this factor."""
    zero_stage: int = 1
    sequence_parallel: bool = False
    mirrors: bool = False
    dtype: Dtype = "bf16"

    @property
    def devices(self) -> int:
        return self.tensor * self.pipeline * self.workers
