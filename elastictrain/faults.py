"""Faults with addresses: `kill(worker=3, step=17, phase="exchange")`. Pure; who performs them is the caller's business.

The same list drives a real run (`elastictrain run job.yaml --faults faults.yaml`), the tests and the benchmarks.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from elastictrain.errors import ConfigError

Phase = Literal["compute", "exchange", "mirror", "vote", "apply", "gather", "form"]
PHASES: tuple[Phase, ...] = ("compute", "exchange", "mirror", "vote", "apply", "gather")


class _Fault(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Kill(_Fault):
    """SIGKILL `worker` in the middle of `phase` of `step` (phase "form": while it enters its next generation)."""

    do: Literal["kill"] = "kill"
    worker: int = Field(ge=0)
    step: int = Field(ge=1)
    phase: Phase = "compute"


class Fail(_Fault):
    """Raise an exception in `worker` in the middle of `phase` of `step`."""

    do: Literal["fail"] = "fail"
    worker: int = Field(ge=0)
    step: int = Field(ge=1)
    phase: Phase = "compute"


class Add(_Fault):
    """Start one more worker as soon as `step` has been published; it joins at a commit when it is ready."""

    do: Literal["add"] = "add"
    step: int = Field(ge=1)


class Drain(_Fault):
    """Let `worker` hand over and leave at a commit, as soon as `step` has been published."""

    do: Literal["drain"] = "drain"
    worker: int = Field(ge=0)
    step: int = Field(ge=1)


Fault = Annotated[Kill | Fail | Add | Drain, Field(discriminator="do")]
_LIST: TypeAdapter[tuple[Kill | Fail | Add | Drain, ...]] = TypeAdapter(tuple[Fault, ...])


def kill(worker: int, step: int, phase: Phase = "compute") -> Kill:
    return Kill(worker=worker, step=step, phase=phase)


def fail(worker: int, step: int, phase: Phase = "compute") -> Fail:
    return Fail(worker=worker, step=step, phase=phase)


def add(step: int) -> Add:
    return Add(step=step)


def drain(worker: int, step: int) -> Drain:
    return Drain(worker=worker, step=step)


def parse_faults(raw: Any, *, where: str = "faults") -> tuple[Kill | Fail | Add | Drain, ...]:
    """Check a list of fault entries. Raises ConfigError that names the entry and what is wrong with it."""
    if not isinstance(raw, list | tuple):
        raise ConfigError(f"{where}: expected a list of entries such as {{do: kill, worker: 1, step: 17}}, got {raw!r}")
    try:
        return _LIST.validate_python(tuple(raw))
    except ValidationError as error:
        first = error.errors()[0]
        index, *place = first["loc"]
        entry = raw[index] if isinstance(index, int) else raw
        raise ConfigError(
            f"{where}: entry {index} {entry!r}: {'.'.join(str(p) for p in place) or 'entry'}: {first['msg']}"
        ) from None


def load_faults(path: str | Path) -> tuple[Kill | Fail | Add | Drain, ...]:
    """Read a YAML file of faults. Raises ConfigError when it is missing or wrong."""
    file = Path(path)
    if not file.is_file():
        raise ConfigError(f"--faults {file}: no such file; expected YAML with a list of faults")
    return parse_faults(yaml.safe_load(file.read_text()) or [], where=str(file))


def kills_for(faults: Iterable[Kill | Fail | Add | Drain], worker: int) -> tuple[Kill | Fail, ...]:
    """The faults that `worker` performs on itself."""
    return tuple(f for f in faults if isinstance(f, Kill | Fail) and f.worker == worker)
