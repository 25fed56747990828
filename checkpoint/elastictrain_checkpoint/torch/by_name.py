"""A checkpoint that no state dict was saved to (an import, a run's, packs of one's own): matched by names."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping
from typing import Any

import torch

from elastictrain_checkpoint.torch.choosing import shown
from elastictrain_checkpoint.torch.fitting import Fit, Tensors
from elastictrain_checkpoint.torch.tree import Path, is_stateful, state_of

_ABSENT = object()


def names_of(path: Path) -> Iterator[str]:
    """Under which a tensor at this place of a state dict may be stored: its keys joined by "/", as `save` does it; as a
    run and imports name it; with dots, as `torch.distributed.checkpoint` does. Pure.
    """
    keys = [str(key) for key in path]
    yield "/".join(keys)
    if keys[0] == "model" and len(keys) > 1:  # a state dict does not tell a buffer from a parameter
        yield from (f"{kind}/{'/'.join(keys[1:])}" for kind in ("buffer", "counter"))
    if keys[0] in ("optim", "optimizer") and keys[1:2] == ["state"] and len(keys) > 3:
        yield f"optim/{'/'.join(keys[2:])}"
    yield ".".join(keys)


class ByName:
    """See above.

    Args:
        tensors: of the checkpoint.
        values: plain values, by their keys joined by dots.
        takes: whether what has a key is to be loaded.

    """

    def __init__(
        self, tensors: Tensors, values: Mapping[str, Any], takes: Callable[[str], bool] = lambda _: True
    ) -> None:
        self._tensors, self._values, self._takes = tensors, values, takes
        self._fit = tensors.fit
        self._used: set[str] = set()

    def fill(self, target: Any, path: Path = ()) -> Any:
        """What is to stand at `path`: the target itself, filled later on, or a new value."""
        if isinstance(target, torch.Tensor):
            self._tensor(target, path)
            return target
        if not isinstance(target, Mapping) and is_stateful(target):
            self._fit.states.append((target, self.fill(state_of(target, path), path)))
            return target
        value = self._values.get(".".join(map(str, path)), _ABSENT) if path else _ABSENT
        if value is not _ABSENT and self._takes(shown(path)):
            return value
        if isinstance(target, MutableMapping):
            self._mapping(target, path)
        elif isinstance(target, list | tuple) and target:
            for number, item in enumerate(target):
                filled = self.fill(item, (*path, number))
                if filled is not item and isinstance(target, list):
                    self._fit.sets.append((target, number, filled))
        elif not isinstance(target, list | tuple):
            self._fit.said.missing.append(shown(path))
        return target

    def finish(self) -> Fit:
        """The fit, when all is filled. What nobody has asked for is unexpected, unless tied to what somebody has."""
        taken = {self._tensors.resolved(name) for name in self._used}
        self._fit.said.unexpected += [
            name for name in self._tensors.stored if self._tensors.resolved(name) not in taken and self._takes(name)
        ]
        return self._fit

    def _tensor(self, target: torch.Tensor, path: Path) -> None:
        if not self._takes(shown(path)):
            return
        name = next((name for name in names_of(path) if name in self._tensors.stored), None)
        if name is None:
            self._fit.said.missing.append(shown(path))
        else:
            self._used.add(name)
            self._tensors.fill(target, name, path)

    def _mapping(self, target: MutableMapping[Any, Any], path: Path) -> None:
        if target:
            for key, value in target.items():
                filled = self.fill(value, (*path, key))
                if filled is not value:
                    self._fit.sets.append((target, key, filled))
            return
        before = "".join(f"{key}/" for key in path)
        made: dict[str, Any] = {}
        for name in self._tensors.stored:
            if name.startswith(before) and self._takes(name):
                self._used.add(name)
                _put(made, name.removeprefix(before), self._tensors.new(name))
        self._fit.sets += [(target, key, value) for key, value in made.items()]


def _put(made: dict[str, Any], name: str, value: torch.Tensor) -> None:
    """Nested by the name's parts, as far as none of them is a tensor itself."""
    first, slash, rest = name.partition("/")
    inner = made.setdefault(first, {}) if slash and rest else None
    if isinstance(inner, dict):
        _put(inner, rest, value)
    elif isinstance(made.get(name), dict):  # others have gone below this name
        made[f"{name}/"] = value
    else:
        made[name] = value
