"""From a checkpoint into a state dict, in place: every process reads what it holds, in whatever world it was saved."""

from __future__ import annotations

from collections.abc import MutableMapping
from dataclasses import dataclass, field
from pathlib import Path as FilePath
from typing import Any

from elastictrain_checkpoint.commit import load as load_manifest
from elastictrain_checkpoint.commit import newest
from elastictrain_checkpoint.errors import NoCheckpoint, StateMismatch
from elastictrain_checkpoint.reader import Reader
from elastictrain_checkpoint.store import Store
from elastictrain_checkpoint.torch.by_name import ByName
from elastictrain_checkpoint.torch.filling import fill
from elastictrain_checkpoint.torch.fitting import ByTree, Fit, Tensors, all_of
from elastictrain_checkpoint.torch.saving import before_mutation

SHOWN = 20


@dataclass(slots=True)
class LoadReport:
    """What was loaded from which step, and, without `strict`, what did not match. Keys are joined by "/".

    Attributes:
        step: which one.
        missing: keys that the checkpoint does not have; what stands there was left as it was.
        unexpected: keys that only the checkpoint has.
        different: key → sentence, for what is of another kind, shape or type there; left as it was.

    """

    step: int
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    different: dict[str, str] = field(default_factory=dict)


def load(
    state_dict: MutableMapping[str, Any],
    path: str | FilePath | Store,
    *,
    step: int | None = None,
    strict: bool = True,
) -> LoadReport:
    """Load a checkpoint into a state dict, in place: tensors are filled where they are, other values replaced.

    A mapping or list that is empty (the state of an optimizer that is new) takes all that the checkpoint has there. A
    list of nothing but numbers, strings and the like counts as a value: it is replaced, whatever its length. In several
    processes each calls it by itself; a DTensor reads its own shard, whatever the world was that saved it.

    One that was not saved from a state dict (by a run, an import, packs of one's own) is matched by its tensors' names
    (`by_name.names_of`); values that are not tensors it has at most where it was imported.

    Args:
        state_dict: nested mappings, lists and tuples; give `optimizer.load_state_dict` what was loaded for it.
        path: where `save` has written to.
        step: which step; the newest if not given.
        strict: refuse a checkpoint that has other keys, lengths, kinds, shapes or types, before anything is changed.
            False: load what fits; the rest is left as it is, and said in the report.

    Raises:
        StateMismatch: keys, lengths, kinds, shapes or types differ; all are named, and nothing was changed.
        NoCheckpoint: there is none, or not at that step.
        CorruptData: stored bytes are not those that were written; tensors may be partly filled.

    """
    store = path if isinstance(path, Store) else Store(path)
    manifest = newest(store) if step is None else load_manifest(store, step)
    if manifest is None:
        raise NoCheckpoint(f"{store.url} has no checkpoint")
    reader = Reader(store, manifest)
    fit = _fit(reader, state_dict)
    _check(fit, f"step {manifest.step} of {store.url}", strict=strict)
    before_mutation()
    fill(reader, fit)
    return LoadReport(manifest.step, fit.missing, fit.unexpected, fit.different)


def _fit(reader: Reader, target: Any) -> Fit:
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


def _check(fit: Fit, what: str, *, strict: bool) -> None:
    """Refuse what does not fit; `strict`: all of it, else only what can never be filled."""
    problems = [*fit.problems, *(all_of(fit) if strict else ())]
    if problems:
        told = "\n  ".join(problems[:SHOWN]) + (f"\n  and {len(problems) - SHOWN} more" if problems[SHOWN:] else "")
        raise StateMismatch(
            f"{what} does not fit:\n  {told}\n(strict={strict})",
            missing=tuple(fit.missing),
            extra=tuple(fit.unexpected),
            different=tuple(fit.different.values()),
        )
