"""From a checkpoint into a state dict, in place: every process reads what it holds, in whatever world it was saved."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path as FilePath
from typing import Any

from elastictrain_checkpoint.errors import CorruptData, StateMismatch
from elastictrain_checkpoint.healing import Healed
from elastictrain_checkpoint.reader import Reader
from elastictrain_checkpoint.store import Store
from elastictrain_checkpoint.torch.by_name import ByName
from elastictrain_checkpoint.torch.filling import fill
from elastictrain_checkpoint.torch.fitting import ByTree, Fit, Tensors, all_of
from elastictrain_checkpoint.torch.places import choose, place_of, with_older
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
        passed_over: newer step → why it is none: cut short, or its manifest damaged.
        healed: blocks that were damaged, and came from one of `others`.

    """

    step: int
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    different: dict[str, str] = field(default_factory=dict)
    passed_over: dict[int, str] = field(default_factory=dict)
    healed: list[Healed] = field(default_factory=list)


def load(
    state_dict: Any,
    path: str | FilePath | Store | None = None,
    *,
    checkpoint_id: str | FilePath | Store | None = None,
    step: int | None = None,
    strict: bool = True,
    others: Sequence[str | FilePath | Store] = (),
) -> LoadReport:
    """Load a checkpoint into a state dict, in place: tensors are filled where they are, other values replaced.

    A mapping or list that is empty (the state of an optimizer that is new) takes all that the checkpoint has there. A
    list of nothing but numbers, strings and the like counts as a value: it is replaced, whatever its length. In several
    processes each calls it by itself; a DTensor reads its own shard, whatever the world was that saved it.

    One that was not saved from a state dict (by a run, an import, packs of one's own) is matched by its tensors' names
    (`by_name.names_of`); values that are not tensors it has at most where it was imported.

    Args:
        state_dict: nested mappings, lists and tuples. Objects in it that keep a state dict (modules, optimizers,
            schedulers, DCP's `Stateful`) load it, when all is read. Give `optimizer.load_state_dict` what was loaded
            for an `optimizer.state_dict()`.
        path: where `save` has written to.
        checkpoint_id: the same, as `torch.distributed.checkpoint` calls it.
        step: which step; the newest that is whole if not given (the report says which newer ones were passed over).
        strict: refuse a checkpoint that has other keys, lengths, kinds, shapes or types, before anything is changed.
            False: load what fits; the rest is left as it is, and said in the report.
        others: further places that may hold the same checkpoints, nearest first: what is damaged or missing in `path`
            is read from there.

    Raises:
        StateMismatch: keys, lengths, kinds, shapes or types differ; all are named, and nothing was changed.
        NoCheckpoint: there is none, or not at that step.
        CorruptData: stored bytes are not those that were written, in any of the places; tensors may be partly filled.
            The newest older step that is whole is named.

    """
    places = place_of(path, checkpoint_id), *others
    stores = [place if isinstance(place, Store) else Store(place) for place in places]
    passed_over: dict[int, str] = {}
    found = choose(stores, step, passed_over)
    reader = found.reader()
    fit = _fit(reader, state_dict)
    _check(fit, f"step {found.manifest.step} of {found.stores[0].url}", strict=strict)
    before_mutation()
    try:
        fill(reader, fit)
    except CorruptData as error:
        raise with_older(error, stores, found.manifest) from error
    return LoadReport(
        found.manifest.step, fit.missing, fit.unexpected, fit.different, passed_over=passed_over, healed=reader.healed
    )


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
