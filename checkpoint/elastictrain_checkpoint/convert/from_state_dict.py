"""Checkpoints that were saved from a state dict, for those who ask for that state dict again. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from elastictrain_checkpoint.mapping import Mapped
from elastictrain_checkpoint.source import Source
from elastictrain_checkpoint.views import Cast, Stored

Place = tuple[Any, ...]


def told(source: Source) -> Mapping[str, Any] | None:
    """What `elastictrain_checkpoint.torch.save` has said in the tree; None: it has not saved this."""
    tree = source.tree
    found = tree.get("torch") if isinstance(tree, Mapping) else None
    return found if isinstance(found, Mapping) else None


def origin(source: Source, name: str) -> str:
    """The stored name of a tensor that rules have left as it was, but for its name and type; else ""."""
    while isinstance(source, Mapped):
        view = source.views[name]
        view = view.of if isinstance(view, Cast) else view
        if not isinstance(view, Stored):
            return ""
        name, source = view.name, source.source
    return name


def odd_types(source: Source) -> dict[str, str]:
    """Name → torch's name of the type, of tensors that the format holds as bytes with one more dimension."""
    said = told(source)
    if not said or not said["dtypes"]:
        return {}
    base = source
    while isinstance(base, Mapped):
        base = base.source
    manifest = getattr(base, "manifest", None)
    aliases: Mapping[str, str] = manifest.alias if manifest is not None else {}
    found = {}
    for name in source.tensors:
        stored = origin(source, name)
        odd = said["dtypes"].get(aliases.get(stored, stored))
        if odd:
            found[name] = odd
    return found


def places_in(source: Source) -> tuple[dict[str, Place], dict[Place, Any]]:
    """Name → place, and place → value of all else, as ``torch.distributed.checkpoint`` flattens that state dict. What
    rules have renamed has no place here.
    """
    said = told(source)
    if not said:
        return {}, {}
    names = {tuple(path): name for path, name in said["places"]}
    places: dict[str, Place] = {}
    values: dict[Place, Any] = {}

    def terminal(value: Any, path: Place) -> bool:
        """A list of nothing but values, and of lists of values: one value for DCP. So is every tuple."""
        for number, item in enumerate(value):
            if (*path, number) in names or (isinstance(item, dict | list) and isinstance(value, list)):
                if isinstance(item, list) and terminal(item, (*path, number)):
                    continue
                return False
        return True

    def walk(value: Any, path: Place, shown: Place) -> None:
        if path in names:
            places[names[path]] = shown
        elif isinstance(value, dict):
            for key, item in value.items():
                walk(item, (*path, key), (*shown, str(key)))
        elif isinstance(value, list | tuple) and not terminal(value, path):
            for number, item in enumerate(value):
                walk(item, (*path, number), (*shown, number))
        else:
            values[shown] = value

    walk(said["rest"], (), ())
    return {name: places[name] for name in source.tensors if name in places and origin(source, name) == name}, values
