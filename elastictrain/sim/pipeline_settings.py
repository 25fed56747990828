"""What a scenario file says about pipelines, and the pipelines that come of it."""

from __future__ import annotations

from random import Random
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BeforeValidator, Field, model_validator

from elastictrain.errors import CapacityError, ConfigError
from elastictrain.planner.model import parse_model
from elastictrain.planner.pipelines import pipelines_of
from elastictrain.planner.profiles import DEVICES, LINKS
from elastictrain.settings import PositiveInt, nearest, not_a_switch
from elastictrain.sim import draws
from elastictrain.sim.parts import Count, Part, Seconds, Share
from elastictrain.sim.pipelines import PipelineScenario
from elastictrain.sim.speeds import Slowness
from elastictrain.stragglers.stage_ways import Price, StageAction

if TYPE_CHECKING:
    from elastictrain.sim.scenario import Scenario

STEPS = 1000
USED = frozenset({"pipeline", "workers", "seed", "spares", "steps", "noise", "hiccups", "rates"})
"""Settings of a scenario that mean something where pipelines are simulated."""
_LEAST_SLOW_S = 60.0


class SlowPlace(Part):
    """From step `begin` to before `end`, `worker` takes `factor` times as long."""

    worker: Count
    factor: Annotated[float, BeforeValidator(not_a_switch), Field(gt=1)]
    begin: PositiveInt
    end: PositiveInt

    @model_validator(mode="after")
    def _lasts(self) -> SlowPlace:
        if self.end <= self.begin:
            raise ValueError(f"end={self.end} is not after begin={self.begin}; it is the first step without slowness")
        return self


class PipelineSettings(Part):
    """Pipelines that are simulated instead of the controller's cluster; the engine runs none.

    `pipelines`, all of the same `stages`: stage s of pipeline p begins with worker `p * stages + s`; the last workers
    are spares. `model`: a decoder, as for `elastictrain plan --model`. `devices`: a profile's name, or one for every
    stage; spares have the first. `link`: between stages. `actions`: what may be done about slow places; none: they are
    named. `pause_s`: of a change. `bias`: by how much layers differ from what the planner expects (standard deviation
    of the logarithm). `slowness`: who is slow when; else it is drawn, by `rates.slow_down_h`.
    """

    model: dict[str, Any]
    stages: PositiveInt = 4
    pipelines: PositiveInt = 1
    micro_batches: PositiveInt = 16
    micro_batch: PositiveInt = 1
    devices: str | tuple[str, ...] = "h100"
    link: str = "ib-hdr"
    actions: tuple[StageAction, ...] = ("move_layers", "swap_roles")
    pause_s: Seconds = 5.0
    bias: Share = 0.03
    slowness: tuple[SlowPlace, ...] = ()

    @model_validator(mode="after")
    def _fits(self) -> PipelineSettings:
        if not isinstance(self.devices, str) and len(self.devices) != self.stages:
            raise ValueError(
                f"devices has {len(self.devices)} names for stages={self.stages}; give one name, or one each"
            )
        for name in self.names:
            if name not in DEVICES:
                raise ValueError(f"devices: {name!r} has no profile{nearest(name, list(DEVICES), 'devices')}")
        if self.link not in LINKS:
            raise ValueError(f"link={self.link!r} is no known link{nearest(self.link, list(LINKS), 'links')}")
        if "leave_out" in self.actions and self.stages == 1:
            raise ValueError("actions has leave_out, but stages=1 leaves nobody; remove it")
        return self

    @property
    def names(self) -> tuple[str, ...]:
        """The device of every stage."""
        return (self.devices,) * self.stages if isinstance(self.devices, str) else self.devices

    @property
    def workers(self) -> int:
        """Without spares."""
        return self.stages * self.pipelines


def contradiction(scenario: Scenario) -> str | None:
    """What in a scenario with pipelines has no meaning there, or contradicts it, in words."""
    pipeline = scenario.pipeline
    assert pipeline is not None
    spares = scenario.spares or 0
    unused = sorted(scenario.model_fields_set - USED)
    if unused:
        hint = "; pipeline.actions says what is done" if "stragglers" in unused else ""
        hint = "; say how many steps" if "hours" in unused else hint
        return f"{', '.join(unused)}: has no meaning with pipeline, remove it{hint}"
    faults = sorted(scenario.rates.model_fields_set - {"slow_down_h"})
    if faults:
        return f"rates.{faults[0]}: with pipeline only slow_down_h is simulated; remove the others"
    if "workers" in scenario.model_fields_set and scenario.workers != pipeline.workers:
        return (
            f"workers={scenario.workers}, but pipeline has {pipeline.pipelines} x {pipeline.stages} stages: remove "
            f"workers, or say {pipeline.workers}"
        )
    if pipeline.slowness and scenario.rates.slow_down_h is not None:
        return "pipeline.slowness and rates.slow_down_h: slowness is either given or drawn; remove one of them"
    if "replace" in pipeline.actions and not spares:
        return "pipeline.actions has replace, but spares=0; say how many workers wait, or remove it"
    for slow in pipeline.slowness:
        if slow.worker >= pipeline.workers + spares:
            return f"pipeline.slowness: there is no worker {slow.worker}, they are 0 to {pipeline.workers + spares - 1}"
    return None


def pipelines_from(scenario: Scenario) -> PipelineScenario:
    """The pipelines of a scenario, each cut by the planner for healthy devices. Raises ConfigError, and CapacityError
    when the model does not fit.
    """
    settings = scenario.pipeline
    assert settings is not None
    model = parse_model(settings.model, where="simulate: pipeline.model")
    if settings.stages > model.layers:
        raise ConfigError(f"simulate: pipeline.stages={settings.stages} is more than the model's {model.layers} layers")
    spares = tuple(range(settings.workers, settings.workers + (scenario.spares or 0)))
    devices = [*settings.names * settings.pipelines, *settings.names[:1] * len(spares)]
    work = pipelines_of(
        model, devices, stages=settings.stages, pipelines=settings.pipelines, micro_batches=settings.micro_batches,
        micro_batch=settings.micro_batch, link=settings.link,
    )  # fmt: skip
    found = []
    for first in range(0, settings.workers, settings.stages):
        placement = work.best(range(first, first + settings.stages), work.healthy())
        if placement is None:
            raise CapacityError(
                f"simulate: {model.params:,} parameters do not fit on {settings.stages} stages of "
                f"{', '.join(sorted(set(settings.names)))}; more stages, other devices or a smaller micro_batch "
                "would help"
            )
        found.append(placement)
    steps = scenario.steps or STEPS
    step_s = max(work.step_s(placement, work.healthy()) for placement in found)
    return PipelineScenario(
        work, tuple(found), spares, steps, scenario.seed, scenario.noise, settings.bias,
        hiccup_every=1 / scenario.hiccups if scenario.hiccups else float("inf"), slowness=_slowness(scenario, step_s),
        allowed=settings.actions, price=Price(settings.pause_s, LINKS[settings.link].beta_bytes_s),
    )  # fmt: skip


def _slowness(scenario: Scenario, step_s: float) -> tuple[Slowness, ...]:
    """As given, or drawn as the cluster's slow-downs are: a worker is slow once at a time."""
    settings, mean_h, steps = scenario.pipeline, scenario.rates.slow_down_h, scenario.steps or STEPS
    assert settings is not None
    if mean_h is None:
        return tuple(Slowness(one.worker, "compute", one.factor, one.begin, one.end) for one in settings.slowness)
    found = []
    for worker in range(settings.workers):
        rng, at = Random(f"{scenario.seed}/slow stage {worker}"), 0.0
        while (at := at + rng.expovariate(1 / (3600 * mean_h))) < steps * step_s:
            long_s = _LEAST_SLOW_S + draws.lasts_s(rng, settings.workers)
            begin = 1 + int(at / step_s)
            found.append(Slowness(worker, "compute", draws.factor(rng), begin, begin + 1 + int(long_s / step_s)))
            at += long_s
    return tuple(found)
