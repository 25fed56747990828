"""What is simulated: a cluster, how often each kind of fault strikes it, and what everything costs in seconds."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BeforeValidator, Field, ValidationError, model_validator

from elastictrain.controller import MachineSpec
from elastictrain.controller.budgets import FailureBudget
from elastictrain.controller.facts import StragglerSpec
from elastictrain.errors import ConfigError
from elastictrain.settings import PositiveInt, explain, not_a_switch
from elastictrain.sim.parts import Count, Part, Seconds, Share
from elastictrain.sim.pipeline_settings import PipelineSettings, contradiction
from elastictrain.straggler_settings import off_is_no_switch

Hours = Annotated[float, BeforeValidator(not_a_switch), Field(gt=0)]
Check = Literal["auto", "all", "sampled", "off"]

SMALL_WORLD = 64
"""Up to this many workers `check="auto"` checks every invariant after every event."""


SAMPLE = 10_007
"""Otherwise after every so many events; a prime, so that the sample does not fall into step with the recoveries."""


class FaultRates(Part):
    """Mean hours between faults of each kind, of one worker, node or controller; None: never. And shares of 1.

    The defaults are a bad cluster: some ten times the losses that were reported for the training of Llama 3 (one
    interruption in 2.8 hours on 16,384 GPUs, so 45,000 hours for one GPU), so that a day shows every kind.

    `slow_down_h`: of one worker, for a while, as strong and as long as `sim.speeds` draws it.
    `unseen_freeze`: the share of frozen workers that nobody names, so that the machine's own deadlines must find them.
    `split_vote`: the share of faults that hit while a vote was complete at some members and not yet at others.
    `late_seal`: ... while a forming generation's seal was so.
    """

    worker_death_h: Hours | None = 5_000.0
    worker_freeze_h: Hours | None = 20_000.0
    torn_apply_h: Hours | None = 100_000.0
    node_loss_h: Hours | None = 4_000.0
    node_notice_h: Hours | None = 4_000.0
    node_partition_h: Hours | None = 10_000.0
    controller_death_h: Hours | None = 6.0
    slow_down_h: Hours | None = None
    start_failure: Share = 0.001
    corrupt_checkpoint: Share = 0.05
    unseen_freeze: Share = 0.1
    split_vote: Share = 0.05
    late_seal: Share = 0.05

    @classmethod
    def none(cls) -> FaultRates:
        """Nothing ever fails."""
        kinds = dict.fromkeys(name for name in cls.model_fields if name.endswith("_h"))
        shares = dict.fromkeys((name for name in cls.model_fields if not name.endswith("_h")), 0.0)
        return cls(**kinds, **shares)

    def worse(self, factor: float) -> FaultRates:
        """The same faults, `factor` times as often."""
        hours = {name: value for name, value in self.model_dump().items() if name.endswith("_h") and value is not None}
        return self.model_copy(update={name: value / factor for name, value in hours.items()})


class Costs(Part):
    """Seconds that things take. `step_s`: a step of the undisturbed world; a smaller world takes longer by the lanes of
    its busiest worker. Forming takes `forming_s + forming_doubling_s x log2(world)`, and `restore_s` more when the
    state comes from storage. What a worker has to say waits up to `poll_s` in its outbox; its answer to a call does
    not, and may overtake it. `node_back_s` and `partition_s` are means of exponential distributions; a
    partition shorter than `silence_s` only delays the step.
    """

    step_s: Annotated[float, Field(gt=0)] = 2.0
    start_s: Seconds = 90.0
    forming_s: Seconds = 0.5
    forming_doubling_s: Seconds = 0.25
    restore_s: Seconds = 60.0
    park_s: Seconds = 0.2
    message_s: Seconds = 0.02
    poll_s: Seconds = 0.1
    detect_death_s: Seconds = 0.1
    detect_frozen_s: Seconds = 2.5
    silence_s: Seconds = 2.0
    collective_timeout_s: Seconds = 30.0
    checkpoint_every_s: Annotated[float, Field(gt=0)] = 900.0
    checkpoint_write_s: Seconds = 30.0
    report_every_s: Annotated[float, Field(gt=0)] = 60.0
    notice_s: Seconds = 120.0
    node_back_s: Annotated[float, Field(gt=0)] = 900.0
    partition_s: Annotated[float, Field(gt=0)] = 20.0
    controller_back_s: Seconds = 5.0

    def forming_time_s(self, world: int, *, restores: bool) -> float:
        return self.forming_s + self.forming_doubling_s * math.log2(world) + (self.restore_s if restores else 0.0)


class Scenario(Part):
    """One simulation. Equal scenarios give equal reports.

    `spares`: by default a worker in a hundred. `min_workers`: by default three quarters. `spare_nodes`: machines that
    stand empty at the start, by default one in fifty. `steps`: the run may finish before the `hours` are over; None: it
    is stopped then. `stragglers`: what is done about slow workers, as in a job. `speeds`: of the devices, of which each
    worker has one; `noise`: standard deviation of the logarithm of a worker's time in a step; `hiccups`: the share of a
    worker's steps that take it 1.3 to several times as long. `shared_lanes`: so many lanes of each worker, its last
    ones, may be taken over within a step (`redundancy.depth` of a job with `take_over`). `check`: the machine's
    invariants after every event ("all"), after a sample of them, or not. `pipeline`: pipelines with slow places instead
    of all this (`simulate_pipelines`).
    """

    workers: PositiveInt = 1000
    hours: Hours = 24.0
    seed: Annotated[int, BeforeValidator(not_a_switch)] = 0
    spares: Count | None = None
    min_workers: PositiveInt | None = None
    workers_per_node: PositiveInt = 8
    spare_nodes: Count | None = None
    lanes_per_worker: PositiveInt = 4
    blocks_per_worker: PositiveInt = 4
    mirrors: bool = True
    steps: PositiveInt | None = None
    stragglers: Annotated[Literal["off", "watch", "lanes", "evict"], BeforeValidator(off_is_no_switch)] = "off"
    speeds: tuple[Annotated[float, BeforeValidator(not_a_switch), Field(gt=0)], ...] = (1.0,)
    noise: Share = 0.02
    hiccups: Share = 0.0
    shared_lanes: Count = 0
    check: Check = "auto"
    rates: FaultRates = FaultRates()
    costs: Costs = Costs()
    pipeline: PipelineSettings | None = None

    @model_validator(mode="after")
    def _fits(self) -> Scenario:
        if self.min_workers is not None and self.min_workers > self.workers:
            raise ValueError(f"min_workers={self.min_workers} is more than workers={self.workers}; lower min_workers")
        wrong = None if self.pipeline is None else contradiction(self)
        if wrong is not None:
            raise ValueError(wrong)
        return self

    @property
    def paced(self) -> bool:
        """Whether steps differ, and have to be simulated one by one."""
        unequal = self.rates.slow_down_h is not None or self.speeds != (1.0,)
        return unequal or self.stragglers != "off" or self.hiccups > 0 or self.shared_lanes > 0

    @property
    def end_s(self) -> float:
        return self.hours * 3600.0

    @property
    def spare_workers(self) -> int:
        return -(-self.workers // 100) if self.spares is None else self.spares

    @property
    def nodes(self) -> int:
        """Machines at the start."""
        used = -(-(self.workers + self.spare_workers) // self.workers_per_node)
        return used + (-(-used // 50) if self.spare_nodes is None else self.spare_nodes)

    @property
    def check_every(self) -> int:
        """Check the invariants after each so many events; 0: never."""
        every = 1 if self.workers <= SMALL_WORLD else SAMPLE
        return {"auto": every, "all": 1, "sampled": SAMPLE, "off": 0}[self.check]

    def step_time_s(self, world: int) -> float:
        """Seconds of a step with `world` workers: lanes are whole, so the busiest worker decides."""
        lanes = self.lanes_per_worker * self.workers
        return self.costs.step_s * -(-lanes // world) / self.lanes_per_worker

    def machine_spec(self) -> MachineSpec:
        """The job that the controller is told about. Its budgets are wide: here faults are random, never the user's."""
        never = int(self.end_s / self.costs.step_s) + 1_000_000
        many = 1_000_000
        return MachineSpec(
            lane_count=self.lanes_per_worker * self.workers,
            steps=never if self.steps is None else self.steps,
            block_elements=(1,) * (self.blocks_per_worker * self.workers),
            min_workers=-(-3 * self.workers // 4) if self.min_workers is None else self.min_workers,
            max_workers=self.workers,
            initial_workers=self.workers,
            spares=self.spare_workers,
            mirrors=self.mirrors,
            checkpoint=True,
            stragglers=StragglerSpec(self.stragglers in ("lanes", "evict"), self.stragglers == "evict")
            if self.stragglers != "off"
            else None,
            budget=FailureBudget(many, many, many, many, many, vain=many),
        )


def make_scenario(settings: Mapping[str, Any], *, worse: float = 1.0) -> Scenario:
    """A scenario from plain settings, with its faults `worse` times as often. Raises ConfigError that names every wrong
    one.
    """
    if not (worse > 0 and math.isfinite(worse)):
        raise ConfigError(f"simulate: worse: expected a number above 0 (got {worse})")
    try:
        made = Scenario.model_validate(dict(settings))
    except ValidationError as error:
        raise ConfigError(explain(error, Scenario, "simulate")) from None
    return made.model_copy(update={"rates": made.rates.worse(worse)})


def read_settings(path: Path) -> dict[str, Any]:
    """Settings of a scenario from a YAML file. Raises ConfigError when it is missing or no mapping."""
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"--scenario {path}: cannot be read as YAML: {error}") from None
    if not isinstance(raw, Mapping):
        raise ConfigError(f"--scenario {path}: expected settings such as `workers: 1000`, got {type(raw).__name__}")
    return dict(raw)
