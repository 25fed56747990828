"""What all settings share: frozen, unknown keys refused, errors that name the setting and what was got."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Annotated, Any, cast, get_args, get_origin

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from elastictrain.errors import ConfigError

if TYPE_CHECKING:
    from pydantic._internal._model_construction import ModelMetaclass as _ModelType
else:
    _ModelType = type(BaseModel)


def not_a_switch(value: object) -> object:
    """YAML reads `yes` and `on` as True, and True counts as 1: `steps: yes` must not be a run of one step."""
    if isinstance(value, bool):
        raise ValueError(f"expected a whole number (got the switch {value})")
    return value


PositiveInt = Annotated[int, BeforeValidator(not_a_switch), Field(ge=1)]


class _SaysWhichSetting(_ModelType):
    """`Workers(min=0)` in Python raises the same ConfigError as `workers: {min: 0}` in YAML. A text without
    a name is the first setting, where that is a text.

    On the metaclass, because pydantic would call an `__init__` of ours for nested settings too, and lose their path.
    """

    def __call__(self, *args: Any, **settings: Any) -> Any:
        if args:  # `Checkpoint("s3://bucket/run")` says what it means; numbers or two texts would not
            first, field = next(iter(cast("type[BaseModel]", self).model_fields.items()))
            if len(args) > 1 or first in settings or field.annotation is not str or not isinstance(args[0], str):
                raise ConfigError(
                    f"{self.__name__}: expected settings by name, such as {self.__name__}({first}=...) "
                    f"(got {', '.join(map(repr, args))} without a name)"
                )
            settings[first] = args[0]
        try:
            return super().__call__(**settings)
        except ValidationError as error:
            raise ConfigError(explain(error, cast("type[BaseModel]", self), self.__name__)) from None


class Settings(BaseModel, metaclass=_SaysWhichSetting):
    # A job is written down and read back: infinities and NaN do not survive that, and no setting needs them.
    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True, allow_inf_nan=False)


def a_number(value: object) -> object:
    if isinstance(value, bool):
        raise ValueError(f"expected a number (got the switch {value})")
    return value


def _some_time(value: timedelta) -> timedelta:
    if value <= timedelta(0):
        raise ValueError(f"expected a time above 0, such as 5m or 90s (got {value})")
    return value


def _duration(value: object) -> object:
    """`90`, `"90s"`, `"5m"`, `"1h30m"`; everything else is pydantic's (ISO 8601, timedelta)."""
    a_number(value)
    match = _DURATION.fullmatch(value) if isinstance(value, str) else None
    if match is None or not any(match.groups()):
        return value
    hours, minutes, seconds = (float(part or 0) for part in match.groups())
    return timedelta(hours=hours, minutes=minutes, seconds=seconds)


_DURATION = re.compile(r"(?:(\d+(?:\.\d+)?)h)?(?:(\d+(?:\.\d+)?)m)?(?:(\d+(?:\.\d+)?)s)?")

Duration = Annotated[timedelta, BeforeValidator(_duration), AfterValidator(_some_time)]
"""`"5m"`, `"90s"`, `"1h30m"` or seconds; above 0."""


def explain(error: ValidationError, model: type[BaseModel], where: str = "job") -> str:
    """All that is wrong, a line each: setting, what was got, what was expected; unknown keys with the nearest one."""
    lines: dict[str, None] = {}
    for problem in error.errors():
        parts = tuple(part for part in problem["loc"] if not _UNION_TAG.match(str(part)))
        branch = tuple(part for part in problem["loc"] if not _TYPE_TAG.match(str(part)))
        path = ".".join(str(part) for part in parts)
        if problem["type"] == "extra_forbidden":
            text = f"unknown setting {path!r}{nearest(str(parts[-1]), _keys_at(model, branch[:-1]))}"
        elif problem["type"] == "missing":
            text = f"setting {path!r} is missing"
        elif problem["type"] == "value_error":  # ours: names the setting and what was got
            text = problem["msg"].removeprefix("Value error, ")
            text = text if _last(parts) in text else f"{path}: {text}"
        else:
            text = f"{path + ': ' if path else ''}{problem['msg']} (got {short(problem['input'])})"
        lines[f"{where}: {text}"] = None
    return "\n".join(lines)


_TYPE_TAG = re.compile(r"^(str|tuple\[.*\])$")
_UNION_TAG = re.compile(r"^(str|tuple\[.*\]|<.*>)$")
"""pydantic names the branch of a union in an error's place; the user wrote only the setting."""


def _last(parts: tuple[int | str, ...]) -> str:
    return str(parts[-1]) if parts else ""


def nearest(key: str, known: Sequence[str], noun: str = "settings") -> str:
    """The end of an "unknown ..." message: the nearest known word, or all of them."""
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    if near:
        return f"; did you mean {near[0]!r}?"
    return f"; known {noun}: {', '.join(sorted(known))}" if known else ""


def kind(raw: object) -> str:
    return "nothing (an empty file)" if raw is None else type(raw).__name__


def short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def kinds_in(annotation: Any) -> Iterator[type[Any]]:
    """Every class that an annotation is made of: of a union, of what is annotated, of a tuple."""
    if isinstance(annotation, type):
        yield annotation
    for inner in get_args(annotation):
        yield from kinds_in(inner)


def _keys_at(model: type[BaseModel], loc: tuple[int | str, ...]) -> list[str]:
    """The settings that there are at a place; `<Name>` in it says which class of a union was meant."""
    current: type[BaseModel] = model
    parts = [str(part) for part in loc]
    while parts:
        field = current.model_fields.get(parts.pop(0))
        nested = [kind for kind in kinds_in(field.annotation) if issubclass(kind, BaseModel)] if field else []
        if field is None or not nested:
            return []
        tag = parts.pop(0) if parts and parts[0].startswith("<") else ""
        if parts and get_origin(field.annotation) in (dict, tuple):
            parts.pop(0)  # the key of an entry
        current = next((one for one in nested if f"<{one.__name__}>" == tag), nested[0])
    return list(current.model_fields)
