"""Faults with addresses: `kill(worker=3, step=17, phase="exchange")`. Pure; who performs them is the caller's business.

The same list drives a real run (`elastictrain run job.yaml --faults faults.yaml`), the tests and the benchmarks.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar, cast

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from elastictrain.errors import ConfigError
from elastictrain.settings import PositiveInt, nearest, not_a_switch

Phase = Literal[
    "compute",
    "claim",
    "drop",
    "agree",
    "exchange",
    "mirror",
    "vote",
    "apply",
    "gather",
    "form",
    "restore",
    "seal",
    "store",
    "stored",
    "manifest",
    "committed",
]
PHASES: tuple[Phase, ...] = ("compute", "exchange", "mirror", "vote", "apply", "gather")
SHARING: tuple[Phase, ...] = ("claim", "drop", "agree")
"""Of a step whose lanes more than one worker may compute (`redundancy` in a job)."""
STORING: tuple[Phase, ...] = ("store", "stored", "manifest", "committed")
"""Of the checkpoint of a step, beside training."""


WorkerNumber = Annotated[int, BeforeValidator(not_a_switch), Field(ge=0)]


class _Fault(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class _InPhase(_Fault):
    """In the middle of `phase` of `step`. Where lanes are shared (`redundancy` in a job): "claim" (a lane was claimed
    and is not computed; with `coded`: all are computed and not claimed) "drop" (with
    `drop_slowest`: it has dropped a lane of another one, and nobody knows) and "agree" (before it says which lanes it
    has). Phases "form", "restore" (its share of a checkpoint) and "seal": while the worker enters the generation whose
    first step that is. Phases of storing the checkpoint of `step`, beside training: "store" (in the middle of a pack),
    "stored" (its first pack is durable, the others do not know it), and on the worker that publishes "manifest" (all
    shares are durable, there is no manifest) and "committed" (the manifest is there, nobody has heard of it).
    """

    worker: WorkerNumber
    step: PositiveInt
    phase: Phase = "compute"


class Kill(_InPhase):
    """SIGKILL `worker`."""

    do: Literal["kill"] = "kill"


class Fail(_InPhase):
    """Raise an exception in `worker`."""

    do: Literal["fail"] = "fail"


class Freeze(_InPhase):
    """SIGSTOP `worker`: it lives and does nothing."""

    do: Literal["freeze"] = "freeze"


class Terminate(_InPhase):
    """SIGTERM to `worker`: it hands over and leaves."""

    do: Literal["terminate"] = "terminate"


class LoseNode(_InPhase):
    """The node of `worker` is lost at once: every worker of the run there, and their node agent. Only on Ray.

    `how`: "stop" (SIGSTOP: a silent node, as when its machine or its network is gone; after `silent_s` its processes
    are continued, and whoever was given up by then is ended) or "kill" (SIGKILL: they are seen to be dead). What else
    runs on that node (Ray itself, other runs, this run's controller) is left alone.
    """

    do: Literal["lose_node"] = "lose_node"
    how: Literal["stop", "kill"] = "stop"
    silent_s: Annotated[float, BeforeValidator(not_a_switch), Field(gt=0, le=86400.0)] = 60.0


class KillController(_Fault):
    """SIGKILL the controller as soon as `step` has been published. What else is due then is asked for before."""

    do: Literal["kill_controller"] = "kill_controller"
    step: PositiveInt


class Add(_Fault):
    """Start one more worker as soon as `step` has been published; it joins at a commit when it is ready."""

    do: Literal["add"] = "add"
    step: PositiveInt


class Drain(_Fault):
    """Let `worker` hand over and leave at a commit, as soon as `step` has been published."""

    do: Literal["drain"] = "drain"
    worker: WorkerNumber
    step: PositiveInt


class Flip(_Fault):
    """Flip one bit in the memory of `worker`: a silent error, nothing raises.

    `what`: a "master" weight, a number of its "optimizer" state, a "parameter" as the forward reads it, or a number of
    its reduced "gradient". `of`: of a block that it owns, mirrors, or (only a parameter) neither. `when`, in `step`:
    "compute" (between two applies, while it computes), "reduced" (when its reduced gradient is there), "apply" (inside
    apply) or "gathered" (when parameters have been published). In fp32 a master is a parameter.
    """

    do: Literal["flip"] = "flip"
    worker: WorkerNumber
    step: PositiveInt
    what: Literal["master", "optimizer", "parameter", "gradient"]
    of: Literal["owned", "mirrored", "other"] = "owned"
    when: Literal["compute", "reduced", "apply", "gathered"] = "compute"
    bit: Annotated[int, BeforeValidator(not_a_switch), Field(ge=0, lt=32)] = 20

    @model_validator(mode="after")
    def _exists(self) -> Self:
        if self.what != "parameter" and self.of == "other":
            raise ValueError(f"a worker keeps the {self.what} only of blocks that it owns or mirrors; set of to one")
        if (self.what == "gradient") != (self.when == "reduced"):
            raise ValueError(f"what={self.what} and when={self.when}: a gradient is there only at when=reduced")
        return self


class Miscompute(_Fault):
    """From `step` on one in `one_in` lanes that `worker` computes comes out wrong, which ones by `seed`."""

    do: Literal["miscompute"] = "miscompute"
    worker: WorkerNumber
    step: PositiveInt = 1
    one_in: PositiveInt = 10
    seed: int = 0


class Slow(_Fault):
    """From `step` on, for `steps` steps (default: to the end), the "compute" (or the wait for "data") of `worker`'s
    lanes takes `factor` times as long; or what it gets over its "link": its exchange of gradients does (waiting for
    those who come later to it included), or takes `delay_s` longer in each step. Emulated: it waits after each lane, or
    after what has come. Who then needs it waits, too.
    """

    do: Literal["slow"] = "slow"
    worker: WorkerNumber
    step: PositiveInt = 1
    steps: PositiveInt | None = None
    factor: Annotated[float, BeforeValidator(not_a_switch), Field(gt=1, le=1000.0)] = 2.0
    what: Literal["compute", "data", "link"] = "compute"
    delay_s: Annotated[float, BeforeValidator(not_a_switch), Field(gt=0, le=3600.0)] | None = None

    @model_validator(mode="after")
    def _exists(self) -> Self:
        if self.delay_s is None:
            return self
        if self.what != "link":
            raise ValueError(f"delay_s={self.delay_s} and what={self.what}: only a link has a delay; use factor")
        if self.factor != type(self).model_fields["factor"].default:
            raise ValueError(f"delay_s={self.delay_s} and factor={self.factor}: a link has one of them; remove one")
        return self


AtPhase = Kill | Fail | Freeze | Terminate | LoseNode
"""What a worker does to itself (or, `LoseNode`, to its whole node) in the middle of a phase."""
OwnFault = AtPhase | Flip | Miscompute | Slow
"""What a worker does to itself."""
Fault = OwnFault | Add | Drain | KillController


def kill(worker: int, step: int, phase: Phase = "compute") -> Kill:
    return _checked(Kill, worker=worker, step=step, phase=phase)


def fail(worker: int, step: int, phase: Phase = "compute") -> Fail:
    return _checked(Fail, worker=worker, step=step, phase=phase)


def freeze(worker: int, step: int, phase: Phase = "compute") -> Freeze:
    return _checked(Freeze, worker=worker, step=step, phase=phase)


def terminate(worker: int, step: int, phase: Phase = "compute") -> Terminate:
    return _checked(Terminate, worker=worker, step=step, phase=phase)


def lose_node(
    worker: int, step: int, phase: Phase = "compute", *, how: Literal["stop", "kill"] = "stop", silent_s: float = 60.0
) -> LoseNode:
    return _checked(LoseNode, worker=worker, step=step, phase=phase, how=how, silent_s=silent_s)


def kill_controller(step: int) -> KillController:
    return _checked(KillController, step=step)


def flip(worker: int, step: int, what: str, *, of: str = "owned", when: str | None = None, bit: int = 20) -> Flip:
    when = when or ("reduced" if what == "gradient" else "compute")
    return _checked(Flip, worker=worker, step=step, what=what, of=of, when=when, bit=bit)


def miscompute(worker: int, step: int = 1, *, one_in: int = 10, seed: int = 0) -> Miscompute:
    return _checked(Miscompute, worker=worker, step=step, one_in=one_in, seed=seed)


def slow(
    worker: int,
    step: int = 1,
    *,
    factor: float = 2.0,
    steps: int | None = None,
    what: str = "compute",
    delay_s: float | None = None,
) -> Slow:
    return _checked(Slow, worker=worker, step=step, factor=factor, steps=steps, what=what, delay_s=delay_s)


def add(step: int) -> Add:
    return _checked(Add, step=step)


def drain(worker: int, step: int) -> Drain:
    return _checked(Drain, worker=worker, step=step)


_OneFault = TypeVar("_OneFault", bound=_Fault)
_KINDS: dict[str, type[_Fault]] = {
    "kill": Kill, "fail": Fail, "freeze": Freeze, "terminate": Terminate, "lose_node": LoseNode, "flip": Flip,
    "miscompute": Miscompute, "slow": Slow, "add": Add, "drain": Drain, "kill_controller": KillController,
}  # fmt: skip


def _checked(kind: type[_OneFault], **values: Any) -> _OneFault:
    try:
        return kind(**values)
    except ValidationError as error:
        name = kind.model_fields["do"].default
        shown = ", ".join(f"{key}={value!r}" for key, value in values.items())
        raise ConfigError(f"fault {name}({shown}): {_what(error, kind)}") from None


def _what(error: ValidationError, kind: type[_Fault]) -> str:
    """Every wrong key of one entry, with what was got, what is possible, and for unknown keys the nearest one."""
    said = []
    for problem in error.errors():
        key = str(problem["loc"][-1]) if problem["loc"] else "entry"
        if problem["type"] == "extra_forbidden":
            said.append(f"unknown key {key!r}{nearest(key, list(kind.model_fields), 'keys')}")
        elif problem["type"] == "missing":
            said.append(f"key {key!r} is missing")
        elif problem["type"] == "value_error":
            said.append(f"{key}: {problem['msg'].removeprefix('Value error, ')}")
        else:
            said.append(f"{key}: {problem['msg']} (got {problem['input']!r})")
    return "; ".join(said)


def _parse_entry(entry: Any) -> Fault:
    """One entry. Raises ConfigError without a place; `parse_faults` adds it."""
    if not isinstance(entry, Mapping):
        raise ConfigError("expected a mapping such as {do: kill, worker: 1, step: 17}")
    kind = _KINDS.get(str(entry.get("do")))
    if kind is None:
        raise ConfigError(f"do: expected one of {', '.join(_KINDS)} (got {entry.get('do')!r})")
    try:
        return cast("Fault", kind.model_validate(dict(entry)))
    except ValidationError as error:
        raise ConfigError(_what(error, kind)) from None


def parse_faults(raw: Any, *, where: str = "faults") -> tuple[Fault, ...]:
    """Check a list of fault entries. Raises ConfigError that names every wrong entry and what is wrong with it."""
    if not isinstance(raw, list | tuple):
        raise ConfigError(f"{where}: expected a list of entries such as {{do: kill, worker: 1, step: 17}}, got {raw!r}")
    faults, wrong = [], []
    for number, entry in enumerate(raw, 1):
        try:
            faults.append(entry if isinstance(entry, Fault) else _parse_entry(entry))
        except ConfigError as error:
            wrong.append(f"{where}: entry {number} {entry!r}: {error}")
    if wrong:
        raise ConfigError("\n".join(wrong))
    return tuple(faults)


def load_faults(path: str | Path) -> tuple[Fault, ...]:
    """Read a YAML file of faults. Raises ConfigError when it is missing or wrong; an empty file is no faults."""
    file = Path(path)
    if not file.is_file():
        raise ConfigError(f"--faults {file}: no such file; expected YAML with a list of faults")
    try:
        raw = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: not valid YAML: {error}") from None
    return parse_faults([] if raw is None else raw, where=str(file))


def kills_for(faults: Iterable[Fault], worker: int) -> tuple[OwnFault, ...]:
    """The faults that `worker` performs on itself."""
    return tuple(f for f in faults if isinstance(f, OwnFault) and f.worker == worker)
