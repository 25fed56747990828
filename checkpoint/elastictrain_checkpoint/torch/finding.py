"""What a load is asked for, and what of the checkpoint goes where."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from elastictrain_checkpoint.errors import InvalidMapping
from elastictrain_checkpoint.reader import Reader
from elastictrain_checkpoint.store import Store
from elastictrain_checkpoint.torch.by_name import ByName
from elastictrain_checkpoint.torch.choosing import Choice
from elastictrain_checkpoint.torch.fitting import ByTree, Fit, Tensors
from elastictrain_checkpoint.torch.places import place_of

Place = str | Path | Store


@dataclass(frozen=True, slots=True)
class Asked:
    """The arguments of a load, but for the state dict; see `loading.load`."""

    path: Place | None
    checkpoint_id: Place | None
    others: tuple[Place, ...]
    step: int | None
    strict: bool
    only: Sequence[str] | None = None
    renamed: Mapping[str, str] | None = None

    def choice(self) -> Choice:
        """What is loaded, and under which keys. Raises InvalidMapping, TypeError as `Choice`."""
        return Choice(self.only, self.renamed)

    def stores(self) -> list[Store]:
        """The places, nearest first.

        Raises:
            TypeError: as `place_of`.

        """
        places = place_of(self.path, self.checkpoint_id), *self.others
        return [place if isinstance(place, Store) else Store(place) for place in places]

    def said(self, step: int, store: Store) -> str:
        """What is loaded, for people."""
        return f"step {step} of {store.url}"


def fit_of(reader: Reader, target: Any, choice: Choice) -> Fit:
    """What of a checkpoint goes where in a state dict.

    Raises:
        InvalidMapping: the choice renames what is not there, or two things to one key.

    """
    tree = reader.tree if isinstance(reader.tree, dict) else {}
    if "torch" in tree:
        told = tree["torch"]
        rest, places = told["rest"], {tuple(place): name for place, name in told["places"]}
        keys: list[str] = []
        if not choice.is_all:
            rest, places, keys = choice.tree(rest, places)
        tensors = Tensors(reader.tensors, told["dtypes"], reader.manifest.alias)
        ByTree(tensors, places).fill(target, rest, ())
        return _chosen(tensors.fit, choice, keys)
    foreign = tree.get("foreign")
    return _by_name(reader, target, foreign if isinstance(foreign, dict) else {}, choice)


def _by_name(reader: Reader, target: Any, values: dict[str, Any], choice: Choice) -> Fit:
    """The same for a checkpoint that has nothing but names: these are renamed."""
    stored, aliases = reader.tensors, reader.manifest.alias
    called = {name: name for name in stored}
    if not choice.is_all:
        choice.check_renamed([*stored, *values])
        called = {name: choice.called(name) for name in stored}
        again = [name for name, count in Counter(called.values()).items() if count > 1]
        if again:
            raise InvalidMapping(f"renamed: two tensors would be called {again[0]!r}")
        stored = {called[name]: facts for name, facts in stored.items()}
        aliases = {called[alias]: called[name] for alias, name in aliases.items()}
        values = {choice.called(name): value for name, value in values.items()}
    by_name = ByName(Tensors(stored, {}, aliases), values, choice.takes)
    by_name.fill(target)
    fit = by_name.finish()
    names = {new: old for old, new in called.items()}
    fit.reads = [(names[name], tensor, held) for name, tensor, held in fit.reads]
    return _chosen(fit, choice, [*stored, *values])


def _chosen(fit: Fit, choice: Choice, keys: list[str]) -> Fit:
    """The same fit, silent of what is not to be loaded."""
    if choice.only is not None:
        fit.said.problems += choice.unused([*keys, *fit.said.missing])
        fit.said.missing = [key for key in fit.said.missing if choice.takes(key)]
    return fit
