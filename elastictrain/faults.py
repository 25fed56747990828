"""Faults with addresses: `kill(worker=3, step=17, phase="exchange")`. Pure; who performs them is the caller's business.

The same list drives a real run (`elastictrain run job.yaml --faults faults.yaml`), the tests and the benchmarks.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, cast

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from elastictrain.errors import ConfigError
from elastictrain.job import PositiveInt, nearest, not_a_switch

Phase = Literal["compute", "exchange", "mirror", "vote", "apply", "gather", "form", "seal"]
PHASES: tuple[Phase, ...] = ("compute", "exchange", "mirror", "vote", "apply", "gather")


WorkerNumber = Annotated[int, BeforeValidator(not_a_switch), Field(ge=0)]


class _Fault(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Kill(_Fault):
    """SIGKILL `worker` in the middle of `phase` of `step`.

    Phases "form" and "seal": while it enters the generation whose first step that is.
    """

    do: Literal["kill"] = "kill"
    worker: WorkerNumber
    step: PositiveInt
    phase: Phase = "compute"


class Fail(_Fault):
    """Raise an exception in `worker` in the middle of `phase` of `step`."""

    do: Literal["fail"] = "fail"
    worker: WorkerNumber
    step: PositiveInt
    phase: Phase = "compute"


class Add(_Fault):
    """Start one more worker as soon as `step` has been published; it joins at a commit when it is ready."""

    do: Literal["add"] = "add"
    step: PositiveInt


class Drain(_Fault):
    """Let `worker` hand over and leave at a commit, as soon as `step` has been published."""

    do: Literal["drain"] = "drain"
    worker: WorkerNumber
    step: PositiveInt


Fault = Kill | Fail | Add | Drain


def kill(worker: int, step: int, phase: Phase = "compute") -> Kill:
    return _checked(Kill, worker=worker, step=step, phase=phase)


def fail(worker: int, step: int, phase: Phase = "compute") -> Fail:
    return _checked(Fail, worker=worker, step=step, phase=phase)


def add(step: int) -> Add:
    return _checked(Add, step=step)


def drain(worker: int, step: int) -> Drain:
    return _checked(Drain, worker=worker, step=step)


_OneFault = TypeVar("_OneFault", bound=_Fault)
_KINDS: dict[str, type[_Fault]] = {"kill": Kill, "fail": Fail, "add": Add, "drain": Drain}


def _checked(kind: type[_OneFault], **values: Any) -> _OneFault:
    try:
        return kind(**values)
    except ValidationError as error:
        name = kind.__name__.lower()
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


def kills_for(faults: Iterable[Fault], worker: int) -> tuple[Kill | Fail, ...]:
    """The faults that `worker` performs on itself."""
    return tuple(f for f in faults if isinstance(f, Kill | Fail) and f.worker == worker)
