"""Places for the stages of a pipeline, and a pipeline on them."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Kind:
    """Places for stages that are alike. `count`: how many. `layer_s`: seconds of each layer for one micro-batch,
    forward and backward. `fixed_s`: more for each stage. `keep_bytes`: what each layer keeps (parameters and state).
    `live_bytes`: activations of each layer for one micro-batch in flight. `memory_bytes`: what a stage may use.
    `params` of each layer: a stage may have `most_params` at most (a limit on its exchange of gradients).

    `again_s`, `again_bytes`: more seconds of each layer when its activations are computed again, and what it then keeps
    instead of `live_bytes` (not more than that). `working_bytes`: more for the one layer that is being computed again.
    Empty: nothing is computed again.
    """

    count: int
    layer_s: tuple[float, ...]
    keep_bytes: tuple[float, ...]
    live_bytes: tuple[float, ...]
    memory_bytes: float
    fixed_s: float = 0.0
    params: tuple[float, ...] = ()
    most_params: float = math.inf
    again_s: tuple[float, ...] = ()
    again_bytes: tuple[float, ...] = ()
    working_bytes: float = 0.0


@dataclass(frozen=True, slots=True)
class Stage:
    """Layers `lo .. hi-1` on a place of this kind; `time_s` for one micro-batch with what it receives. `again`: so many
    of the layers, from the first on, are computed again.
    """

    kind: int
    lo: int
    hi: int
    time_s: float
    again: int = 0


@dataclass(frozen=True, slots=True)
class Pipeline:
    """`time_s` of all micro-batches. `exact`: False when the search was cut off; `bound_s` says how good it is then."""

    stages: tuple[Stage, ...]
    time_s: float
    bound_s: float
    exact: bool
