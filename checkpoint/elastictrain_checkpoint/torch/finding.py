"""What a load is asked for, and what of the checkpoint goes where."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from elastictrain_checkpoint.reader import Reader
from elastictrain_checkpoint.store import Store
from elastictrain_checkpoint.torch.by_name import ByName
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


def fit_of(reader: Reader, target: Any) -> Fit:
    """What of a checkpoint goes where in a state dict."""
    tree = reader.tree if isinstance(reader.tree, dict) else {}
    aliases = reader.manifest.alias
    if "torch" in tree:
        told = tree["torch"]
        tensors = Tensors(reader.tensors, told["dtypes"], aliases)
        ByTree(tensors, {tuple(place): name for place, name in told["places"]}).fill(target, told["rest"], ())
        return tensors.fit
    foreign = tree.get("foreign")
    by_name = ByName(Tensors(reader.tensors, {}, aliases), foreign if isinstance(foreign, dict) else {})
    by_name.fill(target)
    return by_name.finish()
