"""What of a checkpoint goes where in a state dict: decided as a whole, before anything is read or changed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from elastictrain_checkpoint.errors import InvalidPiece
from elastictrain_checkpoint.layouts import Held
from elastictrain_checkpoint.source import Shape
from elastictrain_checkpoint.torch.choosing import LEFT, near, shown
from elastictrain_checkpoint.torch.sharded import local_held
from elastictrain_checkpoint.torch.tree import AS_BYTES, NATIVE, Path, is_stateful, leaves, state_of, stored_facts

DTYPES = {name: dtype for dtype, name in NATIVE.items()}


@dataclass(slots=True)
class Said:
    """What of a load does not fit.

    Attributes:
        missing: keys that the checkpoint does not have.
        unexpected: keys that only the checkpoint has.
        different: key → sentence, for what is of another kind, shape or type there.
        problems: sentences: tensors that cannot be filled, whatever the checkpoint has.

    """

    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    different: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


@dataclass(slots=True)
class Fit:
    """What a load is going to do, and what it will not.

    Attributes:
        reads: (name in the checkpoint, tensor to be filled, what of it is here; None: all).
        sets: (container, key, value) of everything that is put into its place afterwards.
        states: (object, its state dict) of everything that is to load it, when all else is done.
        said: what does not fit.

    """

    reads: list[tuple[str, torch.Tensor, Held | None]] = field(default_factory=list)
    sets: list[tuple[Any, Any, Any]] = field(default_factory=list)
    states: list[tuple[Any, Any]] = field(default_factory=list)
    said: Said = field(default_factory=Said)


class Tensors:
    """The tensors of a checkpoint, as torch has them.

    Args:
        stored: name → (dtype, shape), aliases included.
        odd: name → torch's name of the type, for those that are stored as bytes.
        aliases: further name → name.

    """

    def __init__(
        self, stored: Mapping[str, tuple[str, Shape]], odd: Mapping[str, str], aliases: Mapping[str, str]
    ) -> None:
        self.stored, self._odd, self._aliases = stored, odd, aliases
        self._made: dict[str, torch.Tensor] = {}
        self.fit = Fit()

    def said(self, name: str) -> str:
        """Type and shape, for people."""
        dtype, shape = self.stored[name]
        odd = self._odd_of(name)
        return f"{odd or dtype} {list(shape[:-1] if odd else shape)}"

    def fill(self, target: torch.Tensor, name: str, path: Path) -> None:
        """Have a tensor filled, or say why not."""
        odd = self._odd_of(name)
        if target.is_meta:
            self.fit.said.problems.append(f"{shown(path)} is on the meta device")
            return
        same = stored_facts(target) == self.stored[name] and (odd is None or AS_BYTES.get(odd) is target.dtype)
        if not same or (odd is None and target.dtype not in NATIVE):
            self.fit.said.different[shown(path)] = (
                f"{shown(path)} is {target.dtype} {list(target.shape)}, in the checkpoint {self.said(name)}"
            )
            return
        try:
            self.fit.reads.append((name, target, _held_of(target, name)))
        except InvalidPiece as error:
            self.fit.said.problems.append(str(error))

    def new(self, name: str) -> torch.Tensor:
        """A tensor that the target does not have, made on the CPU; names that are tied give the same one."""
        name = self.resolved(name)
        if name not in self._made:
            dtype, shape = self.stored[name]
            odd = self._odd_of(name)
            made = torch.empty(shape[:-1] if odd else shape, dtype=AS_BYTES[odd] if odd else DTYPES[dtype])
            self._made[name] = made
            self.fit.reads.append((name, made, None))
        return self._made[name]

    def resolved(self, name: str) -> str:
        """The name under which a tensor is stored once."""
        return self._aliases.get(name, name)

    def _odd_of(self, name: str) -> str | None:
        return self._odd.get(self.resolved(name))


def _held_of(target: torch.Tensor, name: str) -> Held | None:
    """What this process holds of a DTensor; None for a tensor that is whole, or of which nothing is here."""
    return local_held(target, name) if isinstance(target, DTensor) else None


class ByTree:
    """A checkpoint that was saved from a state dict: compared with the tree of that one, place by place."""

    def __init__(self, tensors: Tensors, places: Mapping[Path, str]) -> None:
        self._tensors, self._names = tensors, places
        self._fit = tensors.fit

    def fill(self, target: Any, stored: Any, path: Path) -> Any:
        """What is to stand at `path`: the target itself, filled later on, or a new value."""
        if stored is LEFT:
            return target
        if _kind(target) == "stateful":
            self._fit.states.append((target, self.fill(state_of(target, path), stored, path)))
            return target
        name = self._names.get(path)
        kinds = _kind(target), "tensor" if name is not None else self._kind_of(stored, path)
        if kinds == ("tensor", "tensor"):
            self._tensors.fill(target, str(name), path)
        elif kinds == ("mapping", "mapping"):
            self._mapping(target, stored, path)
        elif kinds in (("list", "list"), ("value", "list"), ("list", "value")) and _are_lists(target, stored):
            return self._list(target, stored, path)
        elif kinds == ("value", "value"):
            return self._value(target, stored, path)
        else:
            self._differ(target, stored, path)
        return target

    def _mapping(self, target: MutableMapping[Any, Any], stored: dict[Any, Any], path: Path) -> None:
        fresh = not target  # for example the state of an optimizer that has not made a step: takes all there is
        for key, value in stored.items():
            if key in target:
                self._fit.sets.append((target, key, self.fill(target[key], value, (*path, key))))
            elif fresh:
                self._fit.sets.append((target, key, self._new(value, (*path, key))))
            else:
                self._only_there(value, (*path, key))
        for key in target:
            if key not in stored:
                self._only_here(target[key], (*path, key))

    def _list(self, target: Any, stored: Any, path: Path) -> Any:
        """Tensors among the items of one of them at least."""
        if not target:  # as an empty mapping does
            return self._value(target, self._new(stored, path), path)
        filled = [self.fill(t, s, (*path, n)) for n, (t, s) in enumerate(zip(target, stored, strict=False))]
        for number in range(len(filled), len(stored)):
            self._only_there(stored[number], (*path, number))
        for number in range(len(filled), len(target)):
            self._only_here(target[number], (*path, number))
        filled += target[len(filled) :]
        if isinstance(target, list):
            self._fit.sets.append((target, slice(None), filled))
            return target
        return target if all(a is b for a, b in zip(filled, target, strict=True)) else _tuple(type(target), filled)

    def _value(self, target: Any, stored: Any, path: Path) -> Any:
        """Values are replaced, and so are lists of nothing but values, of whatever length."""
        if isinstance(target, list) and isinstance(stored, list | tuple):
            self._fit.sets.append((target, slice(None), list(stored)))
            return target
        if isinstance(target, tuple) and isinstance(stored, list | tuple):
            if hasattr(target, "_fields") and len(target) != len(stored):
                self._differ(target, stored, path)
                return target
            return _tuple(type(target), stored)
        return stored

    def _new(self, stored: Any, path: Path) -> Any:
        """A value that the target does not have."""
        name = self._names.get(path)
        if name is not None:
            return self._tensors.new(name)
        if isinstance(stored, dict):
            return {key: self._new(value, (*path, key)) for key, value in stored.items()}
        if stored is LEFT:
            return None
        if isinstance(stored, list | tuple):
            items = [self._new(value, (*path, number)) for number, value in enumerate(stored)]
            return items if isinstance(stored, list) else tuple(items)
        return stored

    def _kind_of(self, stored: Any, path: Path) -> str:
        if isinstance(stored, dict):
            return "mapping"
        if isinstance(stored, list | tuple):
            for number, item in enumerate(stored):
                at = (*path, number)
                if at in self._names or self._kind_of(item, at) != "value":
                    return "list"
        return "value"

    def _only_there(self, stored: Any, path: Path) -> None:
        self._fit.said.unexpected += [shown(p) for p, value in leaves(stored, path) if value is not LEFT]

    def _only_here(self, target: Any, path: Path) -> None:
        self._fit.said.missing += [shown(p) for p, _ in leaves(target, path)]

    def _differ(self, target: Any, stored: Any, path: Path) -> None:
        name = self._names.get(path)
        there = f"a tensor, {self._tensors.said(name)}" if name is not None else _said(stored)
        self._fit.said.different[shown(path)] = f"{shown(path)} is {_said(target)}, in the checkpoint {there}"


def _are_lists(*values: Any) -> bool:
    return all(isinstance(value, list | tuple) for value in values)


def _kind(target: Any) -> str:
    """tensor, mapping, stateful, list (with any of these somewhere in it) or value; lists of values are values."""
    if isinstance(target, torch.Tensor):
        return "tensor"
    if isinstance(target, MutableMapping):
        return "mapping"
    if isinstance(target, Mapping):
        return "fixed"
    if is_stateful(target):
        return "stateful"
    return "list" if isinstance(target, list | tuple) and any(_kind(item) != "value" for item in target) else "value"


def _said(value: Any) -> str:
    """A value that is not what it should be, for people."""
    if isinstance(value, torch.Tensor):
        return f"a tensor, {value.dtype} {list(value.shape)}"
    if isinstance(value, list | tuple | Mapping):
        fixed = (
            " that cannot be changed" if isinstance(value, Mapping) and not isinstance(value, MutableMapping) else ""
        )
        return f"a {type(value).__name__} of {len(value)}{fixed}"
    text = repr(value)
    return text if len(text) <= 40 else f"a {type(value).__name__}"


def _tuple(kind: type[tuple[Any, ...]], items: Any) -> Any:
    """A tuple of that type, as far as it can be made of its items."""
    if hasattr(kind, "_make"):
        return kind._make(items)
    return kind(items) if kind is torch.Size else tuple(items)


def all_of(said: Said) -> Iterator[str]:
    """What does not fit, a sentence for each."""
    yield from said.different.values()
    yield from (f"{key} is not in the checkpoint{near(key, said.unexpected)}" for key in said.missing)
    yield from (f"{key} is only in the checkpoint" for key in said.unexpected)
