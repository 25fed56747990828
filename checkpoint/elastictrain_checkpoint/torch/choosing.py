"""Which part of a checkpoint is loaded, and under which keys: `only` and `renamed` of a load. Pure, no torch.

Keys are those of nested state dicts joined by "/". A name stands for what is called so and for everything below it,
whether that is joined by "/" or, as in a module's state dict, by "."; ``*`` stands for any characters.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from elastictrain_checkpoint.errors import InvalidMapping

Keys = tuple[Any, ...]
_POOL = 5000
"""Near names are looked for among so many: a checkpoint may have very many."""
_STAR = "*"


@dataclass(frozen=True, slots=True)
class Named:
    """A tensor in a tree, by the name under which it is stored."""

    name: str


class Left:
    """Stands for what is not loaded, where a list needs something in its place."""


LEFT = Left()


def near(name: str, names: Iterable[str]) -> str:
    """Names like this one, for people: a sentence's end, or nothing."""
    pool = [one for one, _ in zip(names, range(_POOL), strict=False)]
    found = get_close_matches(name, pool, 3, 0.7)
    return f" (near: {', '.join(found)})" if found else ""


class Choice:
    """What a load takes.

    Args:
        only: names and patterns of the keys that are loaded; None: all.
        renamed: name or pattern in the checkpoint → in the state dict, with as many ``*``; the first that fits a key
            counts, for everything below it as well.

    Raises:
        InvalidMapping: a pattern and what it becomes have not the same number of ``*``.
        TypeError: `only` is a string.

    """

    def __init__(self, only: Sequence[str] | None, renamed: Mapping[str, str] | None) -> None:
        if isinstance(only, str):
            raise TypeError(f"only={only!r}: give a list of names, such as [{only!r}]")
        self.only = None if only is None else tuple(only)
        self.renamed = dict(renamed or {})
        for old, new in self.renamed.items():
            if old.count(_STAR) != new.count(_STAR) or not old or not new:
                raise InvalidMapping(f"renamed={{{old!r}: {new!r}}}: both need a name, and as many '*' as the other")
        self._terms = [(term, _pattern(term)) for term in self.only or ()]
        self._renames = [(_pattern(old), new) for old, new in self.renamed.items()]

    def __str__(self) -> str:
        return f"only={self.only}, renamed={self.renamed}"

    @property
    def is_all(self) -> bool:
        """Whether everything is loaded, as it is called."""
        return self.only is None and not self.renamed

    def takes(self, key: str) -> bool:
        """Whether what has this key is loaded."""
        return self.only is None or any(pattern.fullmatch(key) for _, pattern in self._terms)

    def called(self, key: str) -> str:
        """The key in the state dict of what has this one in the checkpoint."""
        for pattern, new in self._renames:
            found = pattern.fullmatch(key)
            if found is not None:
                *stars, below = found.groups()
                parts = new.split(_STAR)
                return parts[0] + "".join(a + b for a, b in zip(stars, parts[1:], strict=True)) + (below or "")
        return key

    def unused(self, keys: Sequence[str]) -> list[str]:
        """Names of `only` that fit none of these keys: a sentence for each."""
        return [
            f"only={term!r} fits nothing{near(term, _above(keys))}"
            for term, pattern in self._terms
            if not any(map(pattern.fullmatch, keys))
        ]

    def check_renamed(self, keys: Sequence[str]) -> None:
        """Refuse a renaming of what the checkpoint has not.

        Raises:
            InvalidMapping: naming it, and what is called like it.

        """
        for (pattern, _), old in zip(self._renames, self.renamed, strict=True):
            if not any(map(pattern.fullmatch, keys)):
                raise InvalidMapping(f"renamed: the checkpoint has nothing called {old!r}{near(old, _above(keys))}")

    def tree(self, rest: Any, places: Mapping[Keys, str]) -> tuple[Any, dict[Keys, str], list[str]]:
        """A stored tree with other keys, and without what is not taken.

        Args:
            rest: the tree of everything that is no tensor, None in the place of tensors.
            places: keys → name, of all tensors.

        Returns:
            both, as they are to be loaded, and the keys of all that the checkpoint has, as they are now.

        Raises:
            InvalidMapping: as `check_renamed`; something that is renamed is an item of a list, or gets the key of
                something else.

        """
        whole = _joined(rest, places, ())
        self.check_renamed([shown(path) for path, _ in _leaves(whole, ())])
        moved: list[tuple[str, str, Any]] = []
        whole = self._without_moved(whole, (), moved, in_list=False)
        for old, new, node in moved:
            _put(whole, old, new, node)
        keys = [shown(path) for path, _ in _leaves(whole, ())]
        if self.only is not None:
            whole = self._pruned(whole, ())
        names: dict[Keys, str] = {}
        parted = _parted({} if whole is LEFT else whole, (), names)
        return parted, names, keys

    def _without_moved(self, node: Any, path: Keys, moved: list[tuple[str, str, Any]], *, in_list: bool) -> Any:
        if path:
            key = shown(path)
            new = self.called(key)
            if new != key:
                if in_list:
                    raise InvalidMapping(f"renamed: {key} is an item of a list; rename the list")
                moved.append((key, new, node))
                return LEFT
        if isinstance(node, dict):
            kept = {k: self._without_moved(item, (*path, k), moved, in_list=False) for k, item in node.items()}
            return {k: item for k, item in kept.items() if item is not LEFT}
        if isinstance(node, list | tuple):
            return type(node)(self._without_moved(item, (*path, n), moved, in_list=True) for n, item in enumerate(node))
        return node

    def _pruned(self, node: Any, path: Keys) -> Any:
        if path and self.takes(shown(path)):
            return node
        if isinstance(node, dict):
            kept = {k: self._pruned(item, (*path, k)) for k, item in node.items()}
            kept = {k: item for k, item in kept.items() if item is not LEFT}
            return kept or LEFT
        if isinstance(node, list | tuple) and any(isinstance(item, dict | list | tuple | Named) for item in node):
            items = [self._pruned(item, (*path, n)) for n, item in enumerate(node)]
            return LEFT if all(item is LEFT for item in items) else type(node)(items)
        return LEFT


def shown(path: Keys) -> str:
    """Keys, as one."""
    return "/".join(str(key) for key in path)


def _pattern(term: str) -> re.Pattern[str]:
    parts = map(re.escape, term.split(_STAR))
    return re.compile("(?s:" + "(.*)".join(parts) + "([/.].*)?)")


def _above(keys: Sequence[str]) -> list[str]:
    """Keys, and what they lie below, so that a part of the tree can be near too."""
    found: dict[str, None] = {}
    for key in keys[:_POOL]:
        parts = key.split("/")
        for count in range(1, len(parts) + 1):
            found["/".join(parts[:count])] = None
    return list(found)


def _joined(rest: Any, places: Mapping[Keys, str], path: Keys) -> Any:
    name = places.get(path)
    if name is not None:
        return Named(name)
    if isinstance(rest, dict):
        return {key: _joined(item, places, (*path, key)) for key, item in rest.items()}
    if isinstance(rest, list | tuple):
        return type(rest)(_joined(item, places, (*path, number)) for number, item in enumerate(rest))
    return rest


def _parted(node: Any, path: Keys, names: dict[Keys, str]) -> Any:
    """Inverse of `_joined`."""
    if isinstance(node, Named):
        names[path] = node.name
        return None
    if isinstance(node, dict):
        return {key: _parted(item, (*path, key), names) for key, item in node.items()}
    if isinstance(node, list | tuple):
        return type(node)(_parted(item, (*path, number), names) for number, item in enumerate(node))
    return node


def _leaves(node: Any, path: Keys) -> Iterable[tuple[Keys, Any]]:
    if isinstance(node, dict) and node:
        for key, item in node.items():
            yield from _leaves(item, (*path, key))
    elif isinstance(node, list | tuple) and node:
        for number, item in enumerate(node):
            yield from _leaves(item, (*path, number))
    else:
        yield path, node


def _put(whole: Any, old: str, new: str, node: Any) -> None:
    at = whole
    *above, last = new.split("/")
    for key in above:
        at = at.setdefault(key, {}) if isinstance(at, dict) else at
    if not isinstance(at, dict):
        raise InvalidMapping(f"renamed: {old} cannot be called {new}: what is above it is no mapping")
    if last in at:
        raise InvalidMapping(f"renamed: {old} cannot be called {new}, as something else is")
    at[last] = node
