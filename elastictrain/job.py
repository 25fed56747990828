"""The job: recipe + data + number of lanes + steps + policies. What a user submits, in Python or as YAML.

Everything that belongs to the mathematics (recipe, data, lanes, seed, numerics) is here and nowhere else; what the
cluster looks like is only in `workers`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import (
    BeforeValidator,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    field_serializer,
    field_validator,
    model_validator,
)

from elastictrain.data_settings import AnyData
from elastictrain.data_settings import Data as Data
from elastictrain.data_settings import Mixture as Mixture
from elastictrain.data_settings import MixtureStage as MixtureStage
from elastictrain.errors import ConfigError
from elastictrain.origin import StartFrom
from elastictrain.settings import Duration, PositiveInt, Settings, a_number, explain, kind, not_a_switch, short
from elastictrain.straggler_settings import Redundancy as Redundancy
from elastictrain.straggler_settings import Stragglers as Stragglers


class Workers(Settings):
    """How many workers, and what each of them gets."""

    min: PositiveInt = 1
    """Below this the run parks and waits."""
    max: PositiveInt = 1
    start: PositiveInt | None = None
    """Workers at the start; default `max`."""
    spares: Annotated[int, BeforeValidator(not_a_switch), Field(ge=0)] = 0
    """Worker processes that are imported, warmed and waiting."""
    replace: bool = True
    """Start a new worker for every one that is lost (it joins at a commit)."""
    cpus: Annotated[float, Field(ge=0)] = 1.0
    gpus: Annotated[float, Field(ge=0)] = 0.0
    lane_shares: dict[int, Annotated[float, Field(gt=0)]] = Field(default_factory=dict)
    """Relative speed by worker number: how many lanes it gets. Default even."""
    block_shares: dict[int, Annotated[float, Field(ge=0)]] = Field(default_factory=dict)
    """Relative memory by worker number: how much of the state it owns. Default even."""
    domain_label: str | None = None
    """A label of Ray's nodes (rack, zone): mirrors lie on another value of it. Default: on another node."""
    notice_s: Annotated[float, Field(gt=0)] = 30.0
    """How long after SIGTERM a worker may still live before whoever sent it sends SIGKILL."""
    spot_notices: Literal["aws", "gcp", "azure"] | None = None
    """Ask this cloud's metadata service on every node whether the machine is about to go."""

    @model_validator(mode="after")
    def _bounds(self) -> Self:
        if self.min > self.max:
            raise ValueError(f"workers.min={self.min} > workers.max={self.max}; lower workers.min or raise workers.max")
        if self.start is not None and not self.min <= self.start <= self.max:
            raise ValueError(f"workers.start={self.start} is outside workers.min={self.min} .. workers.max={self.max}")
        return self

    @property
    def initial(self) -> int:
        return self.max if self.start is None else self.start


DEFAULT_EVERY_STEPS = 100


class Best(Settings):
    """The `n` checkpoints with the least (`mode` min) or greatest value of a metric of their step."""

    metric: str
    """`loss`, `grad_norm`, or `evaluation.` and a name that the recipe's `evaluate` gives."""
    n: PositiveInt = 1
    mode: Literal["min", "max"] = "min"

    @field_validator("metric")
    @classmethod
    def _is_recorded(cls, value: str) -> str:
        if value in ("loss", "grad_norm") or value.removeprefix("evaluation.") not in ("", value):
            return value
        raise ValueError(
            f"checkpoint.keep.best.metric={value!r}: expected loss, grad_norm, or evaluation.NAME for what the recipe's"
            " evaluate() gives"
        )


class Keep(Settings):
    """Which checkpoints stay: those that any of these wants, pinned ones, and those that the kept ones refer to."""

    newest: PositiveInt = 3
    """So many of the newest."""
    every_steps: PositiveInt | None = None
    """Every one whose step is a multiple of this."""
    younger: Duration | None = None
    """Every one that was committed less than this ago: "2h", "90s" or seconds."""
    spaced: Duration | None = None
    """One for each such stretch of time, as long as the run lives."""
    best: Best | None = None
    verify: bool = False
    """Read the newest one back, every byte, before anything is removed."""


def _number_or_mapping(value: object) -> str:
    return "<mapping>" if isinstance(value, Mapping | Keep) else "<number>"


AnyKeep = Annotated[
    Annotated[PositiveInt, Tag("<number>")] | Annotated[Keep, Tag("<mapping>")], Discriminator(_number_or_mapping)
]
"""How many checkpoints stay, or which."""


class Copy(Settings):
    """A further place that checkpoints are copied to, beside training, after they are committed in `checkpoint.path`.

    A run goes on, and is resumed, with the newest checkpoint that is whole in any of these places.
    """

    path: str
    """A folder or any fsspec URL."""
    every_steps: PositiveInt = 1
    """Copy a checkpoint only if it is at least so many steps after the last one that was copied here; the one of the
    last step always is.
    """
    keep: AnyKeep = 3
    """How many stay here, or which (`Keep`)."""
    storage_options: dict[str, Any] = Field(default_factory=dict)


def _a_list(value: object) -> object:
    if not isinstance(value, list | tuple):
        raise ValueError(f"checkpoint.copy_to: expected a list of places, each with its path (got {short(value)})")
    return value


def place_of(path: str) -> str:
    """What two ways to write the same place have in common."""
    scheme, _, rest = path.rpartition("://")
    if scheme in ("", "file", "local"):
        return os.path.abspath(os.path.expanduser(rest))  # noqa: PTH100, PTH111  (leaves ~nobody, and links, as they are)
    return f"{scheme}://{rest.rstrip('/')}"


class Checkpoint(Settings):
    """Where and how often the state is stored. `path`: a folder or any fsspec URL.

    How often: `every_steps` (100 if nothing else is said), or a budget: `max_overhead`, `max_loss` or both.
    """

    path: str
    every_steps: PositiveInt | None = None
    max_overhead: Annotated[float, BeforeValidator(a_number), Field(gt=0, le=1)] | None = None
    """Fraction of the time that storing may cost, as 0.01; the state is stored as often as that allows."""
    max_loss: Duration | None = None
    """If everything died at once, no more than this is computed again: "5m", "90s" or seconds. Wins over
    `max_overhead` where both cannot be kept.
    """
    keep: AnyKeep = 3
    """How many stay, or which (`Keep`)."""
    incremental: bool = False
    """Refer to what is unchanged since the last checkpoint (frozen layers, rows of an embedding) instead of writing it
    again. Off, since a pack that is damaged then damages every checkpoint that refers to it.
    """
    full_every: PositiveInt = 10
    """With `incremental`: every so many checkpoints one is written in full."""
    at_end: bool = True
    storage_options: dict[str, Any] = Field(default_factory=dict)
    copy_to: Annotated[tuple[Copy, ...], BeforeValidator(_a_list)] = ()
    """Further places for what is stored, the nearest first (`Copy`)."""

    @model_validator(mode="before")
    @classmethod
    def _how_often(cls, raw: Any) -> Any:
        if isinstance(raw, Mapping) and all(raw.get(k) is None for k in ("every_steps", "max_overhead", "max_loss")):
            return {**raw, "every_steps": DEFAULT_EVERY_STEPS}
        return raw

    @model_validator(mode="after")
    def _one_answer(self) -> Self:
        budget = [f"{k}={v}" for k, v in (("max_overhead", self.max_overhead), ("max_loss", self.max_loss)) if v]
        if self.every_steps is not None and budget:
            raise ValueError(
                f"checkpoint.every_steps={self.every_steps} and checkpoint.{' and '.join(budget)} both say how often "
                "to store; set either every_steps, or max_overhead and max_loss"
            )
        return self

    def kept(self) -> list[tuple[str, int | Keep]]:
        """Every setting that says what stays, with its name."""
        copies = [(f"checkpoint.copy_to.{number}.keep", copy.keep) for number, copy in enumerate(self.copy_to)]
        return [("checkpoint.keep", self.keep), *copies]

    @model_validator(mode="after")
    def _places_differ(self) -> Self:
        named = {place_of(self.path): "checkpoint.path"}
        for number, copy in enumerate(self.copy_to):
            setting, place = f"checkpoint.copy_to.{number}.path", place_of(copy.path)
            for other, of in named.items():
                if place == other or place.startswith(f"{other}/") or other.startswith(f"{place}/"):
                    how = "are the same place" if place == other else "lie one in the other"
                    raise ValueError(
                        f"{setting}={copy.path!r} and {of} {how}; a copy must be somewhere else: set {setting} to "
                        "another folder or URL"
                    )
            named[place] = setting
        return self


class Numerics(Settings):
    """What belongs to the mathematics besides recipe, data, lanes and seed: set in a worker before its first tensor."""

    compute_dtype: Literal["f32", "bf16"] = "f32"
    """dtype of the forward and backward; master weights and optimizer state are always fp32."""
    threads: PositiveInt = 1
    """Intra-op CPU threads per worker."""
    matmul_precision: Literal["highest", "high", "medium"] = "highest"
    deterministic: bool = True
    strict: bool = False
    """Refuse a worker or a checkpoint whose numerics differ, instead of reporting it."""


class Integrity(Settings):
    """Checks for memory and arithmetic that are silently wrong (docs/integrity.md says what they find, and when)."""

    state: bool = True
    """Compare sums of the state with every vote, against the other copies."""
    witness: bool = False
    """Take these sums right after every apply as well: a copy that has changed then gives itself away, and the step is
    redone. Without it, two copies that differ send the run back to its newest checkpoint. Costs as much again.
    """
    recompute_every: PositiveInt | None = 50
    """At every step that is a multiple of this, compute one lane a second time on another worker. None: never."""
    distrust: Literal["since_last_check", "since_it_joined"] = "since_last_check"
    """How far back the run goes when a worker is found to compute wrongly: to the newest checkpoint that is not newer
    than the last check that it passed, or than its first step (certain, also when it is wrong only now and then)."""


class Job(Settings):
    """A training job. See the field docs; `load_job` reads the same from YAML."""

    name: str = "run"
    recipe: Any
    """An object with `model()`, `optimizer(params)` and `loss(model, batch)`, or "module:Class" / "file.py:Class"."""
    recipe_args: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of the recipe class, when `recipe` is given by name."""
    data: AnyData
    lanes: PositiveInt = 8
    """L: micro-batch slots of a step. Fixed for the life of the job; 4 to 8 lanes per worker are a good choice."""
    lane_batch_size: PositiveInt = 1
    """Samples per lane and step. The global batch is lanes x lane_batch_size."""
    micro_batches: PositiveInt = 1
    """Cut a lane's samples into this many backward passes (less memory, same lane)."""
    steps: PositiveInt
    seed: int = 0
    clip_grad_norm: Annotated[float, Field(gt=0)] | None = None
    on_nan: Literal["stop", "skip"] = "stop"
    """A loss or gradient that is not finite: stop the run, or skip the step on all workers alike."""
    evaluate_every: PositiveInt | None = None
    """Call the recipe's `evaluate` at every commit whose step is a multiple of this, and at the last one."""
    workers: Workers = Workers()
    plan: Literal["auto"] | None = None
    """auto: choose how many workers are quickest, between `workers.min` and `workers.max`, by the planner's cost model
    for `cluster`. The result is the same bits whatever it chooses."""
    cluster: str | None = None
    """YAML of the nodes and their links, for `plan: auto`; `elastictrain profile` writes one."""
    checkpoint: Checkpoint | None = None
    start_from: StartFrom | None = None
    """Weights to begin with, of any checkpoint that can be read. Default: the recipe's initial values."""
    numerics: Numerics = Numerics()
    integrity: Integrity = Integrity()
    stragglers: Stragglers = Stragglers()
    redundancy: Redundancy = Redundancy()
    gradients: Literal["sum", "hand_over"] = "sum"
    """Sum lanes locally before the exchange (less traffic), or hand them to their owners one by one (less memory)."""
    ownership: Literal["sliced", "whole"] = "sliced"
    """Blocks are slices of parameters, or (optimizers that need whole matrices) whole parameters."""
    block_elements: Annotated[int, Field(ge=4096, multiple_of=4096)] | None = None
    """Elements per block; default chosen from the size of the model alone."""
    mirrors: bool = True
    """Keep a second holder of every block. Off only to measure what it costs."""
    debug: bool = False
    """Let breakpoints stand: no worker is taken for frozen, however long it does nothing. A dead one still is dead."""
    run_dir: str | None = None
    """Folder for events, metrics, plots; default `runs/<name>-<time>`."""

    @field_validator("recipe")
    @classmethod
    def _recipe_is_usable(cls, value: Any) -> Any:
        if isinstance(value, str):
            if ":" not in value:
                raise ValueError(f'recipe={value!r}: expected "module:Class" or "file.py:Class"')
            return value
        missing = [name for name in ("model", "optimizer", "loss") if not callable(getattr(value, name, None))]
        if missing:
            raise ValueError(
                f"recipe={short(value)} has no {', '.join(f'{name}()' for name in missing)}; expected an object with "
                'model(), optimizer(params) and loss(model, batch), or "module:Class"'
            )
        return value

    @field_serializer("recipe")
    def _recipe_by_name(self, value: Any) -> str:
        if isinstance(value, str):
            return value
        named = value if isinstance(value, type) else type(value)
        return f"{named.__module__}:{named.__qualname__}"

    @property
    def watches_workers(self) -> bool:
        """Whether workers say how their steps went, and slow ones are looked for. Lanes that are handed over one by one
        make everybody wait at each of them, so times say nothing of who was late.
        """
        return self.stragglers.action != "off" and self.gradients == "sum"

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.stragglers.action in ("lanes", "evict") and not self.watches_workers:
            raise ValueError(
                f"stragglers.action={self.stragglers.action} needs gradients=sum: with gradients={self.gradients} "
                "times do not tell who is slow; set gradients: sum, or stragglers.action: off"
            )
        self.redundancy.check(self.gradients, self.workers.max, self.stragglers.action, self.lanes)
        if self.workers.max > self.lanes:
            raise ValueError(
                f"lanes={self.lanes} < workers.max={self.workers.max}: every worker needs a lane; "
                "raise lanes or lower workers.max"
            )
        if self.plan is not None and self.cluster is None:
            raise ValueError(
                f"plan={self.plan!r} needs cluster: a file that says which devices there are; measure them with "
                "`elastictrain profile`"
            )
        if self.plan is not None and (self.workers.lane_shares or self.workers.start is not None):
            named = "lane_shares" if self.workers.lane_shares else "start"
            raise ValueError(
                f"plan={self.plan!r} and workers.{named} both say who does how much; remove workers.{named} or plan"
            )
        if self.lane_batch_size % self.micro_batches:
            raise ValueError(
                f"lane_batch_size={self.lane_batch_size} is not a multiple of micro_batches={self.micro_batches}"
            )
        if self.data.lacks_record and not self.checkpoint:
            raise ValueError(
                f"{self.data.lacks_record}.live.record is not set, and there is no checkpoint.path to record the order "
                "in; set one of them"
            )
        for where, keep in self.checkpoint.kept() if self.checkpoint is not None else ():
            best = keep.best if isinstance(keep, Keep) else None
            if best is not None and best.metric.startswith("evaluation.") and self.evaluate_every is None:
                raise ValueError(
                    f"{where}.best.metric={best.metric!r}, but evaluate_every is not set: nothing is evaluated; "
                    "set evaluate_every, or take the metric loss"
                )
        return self


def parse_job(raw: Mapping[str, Any], *, where: str = "job") -> Job:
    """Build a job from plain data. Raises ConfigError naming every wrong setting."""
    if not isinstance(raw, Mapping):
        raise ConfigError(f"{where}: expected a mapping of settings, got {kind(raw)}")
    try:
        return Job.model_validate(dict(raw))
    except ValidationError as error:
        raise ConfigError(explain(error, Job, where)) from None


def load_job(path: str | Path, **overrides: Any) -> Job:
    """Read `job.yaml`. `overrides` replace top-level settings. Raises ConfigError."""
    file = Path(path)
    if not file.is_file():
        raise ConfigError(f"job file {file}: no such file; expected YAML with at least recipe, data and steps")
    try:
        raw = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: not valid YAML: {error}") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{file}: expected a mapping of settings, got {kind(raw)}")
    return parse_job(raw | overrides, where=str(file))


def dump_job(job: Job) -> str:
    """The job as YAML, every setting spelled out; `load_job` reads it back."""
    return yaml.safe_dump(job.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
