r"""Rules that say which tensors are wanted, under which names, and in which form. Pure.

Rules are applied in order, each to what the one before has left; so splitting a fused projection whose heads are
interleaved is three rules: reshape, split, reshape. They are data (JSON), so that a mapping can lie beside a model:

```json
[{"op": "only", "match": "model/.*"},
 {"op": "split", "match": "(.*)\\.qkv\\.weight", "into": ["\\1.q.weight", "\\1.k.weight", "\\1.v.weight"]},
 {"op": "rename", "match": "model/(.*)", "to": "model/transformer.\\1"}]
```

``match`` is a regular expression that must fit the whole name. A rule that fits nothing is an error, since it is most
likely misspelt, unless it says ``"optional": true``.
"""

from __future__ import annotations

import json
import re
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, field_validator, model_validator

from elastictrain_checkpoint import views
from elastictrain_checkpoint.errors import InvalidMapping
from elastictrain_checkpoint.part import describe
from elastictrain_checkpoint.source import Bytes, Shape, Source, check_range
from elastictrain_checkpoint.views import View

Views = dict[str, View]


class _Rule(BaseModel):
    """Base: which names it is for, and whether it may fit none."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    match: str
    optional: bool = False

    @field_validator("match")
    @classmethod
    def _compiles(cls, value: str) -> str:
        try:
            re.compile(value)
        except re.error as error:
            raise ValueError(f"{value!r} is not a regular expression: {error}") from None
        return value

    @abstractmethod
    def apply(self, tensors: Views) -> Views:
        """What this rule makes of ``tensors``.

        Raises:
            InvalidMapping: it fits none of them, it cannot be applied, or two tensors end under one name.

        """

    def _said(self) -> str:
        return f"rule {json.dumps(self.model_dump(exclude_defaults=True) | {'op': self.op})}"  # type: ignore[attr-defined]


class _OneByOne(_Rule):
    """Base of those that look at one tensor at a time."""

    def apply(self, tensors: Views) -> Views:
        out: Views = {}
        fits = 0
        for name, view in tensors.items():
            found = re.fullmatch(self.match, name)
            fits += found is not None
            try:
                made = {name: view} if found is None else self._one(found, view)
            except (InvalidMapping, re.error, IndexError) as error:
                raise InvalidMapping(f"{self._said()}: {name}: {error}") from None
            for new, one in made.items():
                _put(out, new, one, self._said())
        if not fits and not self.optional:
            raise InvalidMapping(
                f"{self._said()} fits none of {len(tensors)} tensors ({', '.join(list(tensors)[:3])}, …); "
                f'correct "match", or say "optional": true'
            )
        return out

    @abstractmethod
    def _one(self, found: re.Match[str], view: View) -> Views: ...


class Only(_OneByOne):
    """Keep what fits, and nothing else."""

    op: Literal["only"] = "only"

    def apply(self, tensors: Views) -> Views:
        kept = super().apply(tensors)
        return {name: view for name, view in kept.items() if re.fullmatch(self.match, name)}

    def _one(self, found: re.Match[str], view: View) -> Views:
        return {found.string: view}


class Drop(_OneByOne):
    """Leave out what fits."""

    op: Literal["drop"] = "drop"

    def _one(self, found: re.Match[str], view: View) -> Views:  # noqa: ARG002
        return {}


class Rename(_OneByOne):
    r"""Another name, with groups of the match (``\1``, ``\g<layer>``)."""

    op: Literal["rename"] = "rename"
    to: str

    def _one(self, found: re.Match[str], view: View) -> Views:
        return {found.expand(self.to): view}


class Table(_Rule):
    """Other names from a table, all at once, so that two may change places; other tensors stay as they are."""

    op: Literal["table"] = "table"
    names: dict[str, str]
    match: str = "(?s:.*)"

    def apply(self, tensors: Views) -> Views:
        absent = [name for name in self.names if name not in tensors]
        if absent and not self.optional:
            raise InvalidMapping(
                f'rule {{"op": "table"}}: there is no tensor {absent[0]!r} (and {len(absent) - 1} more); '
                f'correct "names", or say "optional": true'
            )
        out: Views = {}
        for name, view in tensors.items():
            _put(out, self.names.get(name, name), view, 'rule {"op": "table"}')
        return out


class Reshape(_OneByOne):
    """Another shape; one dimension may be -1."""

    op: Literal["reshape"] = "reshape"
    shape: list[int]

    def _one(self, found: re.Match[str], view: View) -> Views:
        return {found.string: views.reshape(view, self.shape)}


class Transpose(_OneByOne):
    """Axes in another order, reversed if none is given."""

    op: Literal["transpose"] = "transpose"
    axes: list[int] | None = None

    def _one(self, found: re.Match[str], view: View) -> Views:
        return {found.string: views.transpose(view, self.axes)}


class Cast(_OneByOne):
    """Another floating-point type."""

    op: Literal["cast"] = "cast"
    dtype: str

    def _one(self, found: re.Match[str], view: View) -> Views:
        return {found.string: views.as_dtype(view, self.dtype)}


class Split(_OneByOne):
    r"""One tensor into several along an axis: equal ones, or of the given sizes."""

    op: Literal["split"] = "split"
    into: Annotated[list[str], Field(min_length=1)]
    axis: int = 0
    sizes: list[int] | None = None

    @model_validator(mode="after")
    def _fit(self) -> Split:
        if self.sizes is not None and len(self.sizes) != len(self.into):
            raise ValueError(f"{len(self.sizes)} sizes for {len(self.into)} names")
        return self

    def _one(self, found: re.Match[str], view: View) -> Views:
        sizes = self.sizes
        if sizes is None:
            axis = self.axis + (len(view.shape) if self.axis < 0 else 0)
            size, rest = divmod(view.shape[axis], len(self.into)) if 0 <= axis < len(view.shape) else (0, 1)
            if rest:
                raise InvalidMapping(
                    f"axis {self.axis} of shape {list(view.shape)} has no {len(self.into)} equal parts; give sizes"
                )
            sizes = [size] * len(self.into)
        out: Views = {}
        for name, part in zip(self.into, views.split(view, sizes, self.axis), strict=True):
            _put(out, found.expand(name), part, "its own parts")
        return out


class Concat(_Rule):
    r"""Several tensors into one along an axis: the inverse of `Split`.

    ``match`` names the first of them and ``then`` the others, with groups of the match (``\1.k.weight``).
    """

    op: Literal["concat"] = "concat"
    then: Annotated[list[str], Field(min_length=1)]
    into: str
    axis: int = 0

    def apply(self, tensors: Views) -> Views:
        taken: set[str] = set()
        made: Views = {}
        for name, view in tensors.items():
            found = re.fullmatch(self.match, name)
            if found is None:
                continue
            try:
                others = [found.expand(one) for one in self.then]
                absent = [one for one in others if one not in tensors]
                if absent:
                    raise InvalidMapping(f"there is no tensor {absent[0]!r} to join it with")
                joined = views.join([view, *(tensors[one] for one in others)], self.axis)
                again = taken.intersection({name, *others})
                if again or len({name, *others}) != 1 + len(others):
                    raise InvalidMapping(f"{min(again or {name})} would be used twice")
                taken |= {name, *others}
                _put(made, found.expand(self.into), joined, self._said())
            except (InvalidMapping, re.error, IndexError) as error:
                raise InvalidMapping(f"{self._said()}: {name}: {error}") from None
        if not made and not self.optional:
            raise InvalidMapping(f"{self._said()} fits none of {len(tensors)} tensors")
        out = {name: view for name, view in tensors.items() if name not in taken}
        for name, view in made.items():
            _put(out, name, view, self._said())
        return out


Rule = Only | Drop | Rename | Table | Reshape | Transpose | Cast | Split | Concat
_RULES: TypeAdapter[list[Rule]] = TypeAdapter(list[Annotated[Rule, Field(discriminator="op")]])


def parse_rules(text: str | bytes) -> list[Rule]:
    """Rules from JSON.

    Raises:
        InvalidMapping: not JSON, an unknown rule, an unknown key.

    """
    try:
        return _RULES.validate_json(text)
    except ValidationError as error:
        raise InvalidMapping(f"these are not rules of a mapping: {describe(error)}") from None


def dump_rules(rules: Sequence[Rule]) -> str:
    """Inverse of `parse_rules`."""
    return _RULES.dump_json(list(rules), indent=1).decode()


def apply_rules(tensors: Mapping[str, tuple[str, Shape]], rules: Sequence[Rule]) -> Views:
    """The tensors that the rules make of these, each with the way to read it.

    Raises:
        InvalidMapping: naming the rule and the tensor.

    """
    out: Views = {name: views.Stored(dtype, tuple(shape), name) for name, (dtype, shape) in tensors.items()}
    for rule in rules:
        out = rule.apply(out)
    return out


class Mapped:
    """A source seen through rules: a source again.

    Attributes:
        views: name → how it is made.

    """

    def __init__(self, source: Source, rules: Sequence[Rule]) -> None:
        self._take(source, apply_rules(source.tensors, rules))

    @classmethod
    def of(cls, source: Source, made: Views) -> Mapped:
        """A source seen through views that were made otherwise (`elastictrain_checkpoint.views`)."""
        mapped = cls.__new__(cls)
        mapped._take(source, made)
        return mapped

    def _take(self, source: Source, made: Views) -> None:
        self._source = source
        self.views = made
        self.tensors = {name: (view.dtype, view.shape) for name, view in made.items()}

    @property
    def source(self) -> Source:
        """What is seen through the rules."""
        return self._source

    @property
    def tree(self) -> Any:
        """State that is not tensors: that of the source."""
        return self._source.tree

    def read_flat(self, name: str, start: int, stop: int) -> Bytes:
        """Bytes of the elements [start, stop) of a tensor, row-major.

        Raises:
            KeyError: no such tensor.
            InvalidPiece: the range lies outside of it.

        """
        if name not in self.views:
            raise KeyError(f"the mapping makes no tensor {name!r}")
        view = self.views[name]
        check_range(name, view.shape, start, stop)
        return view.read(self._source.read_flat, start, stop)

    def unused(self) -> list[str]:
        """Tensors of the source that nothing is made from, in their order."""
        used = set().union(*(view.inputs() for view in self.views.values())) if self.views else set()
        return [name for name in self._source.tensors if name not in used]


def _put(out: Views, name: str, view: View, who: str) -> None:
    if name in out:
        raise InvalidMapping(f"{who}: two tensors would be called {name!r}")
    out[name] = view
