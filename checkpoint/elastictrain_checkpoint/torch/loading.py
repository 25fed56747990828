"""From a checkpoint into a state dict, in place, in whatever world it was saved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path as FilePath
from typing import Any

import torch.distributed as dist

from elastictrain_checkpoint.errors import CorruptData
from elastictrain_checkpoint.store import Store
from elastictrain_checkpoint.torch.company import load_together
from elastictrain_checkpoint.torch.dropin import group_meant
from elastictrain_checkpoint.torch.filling import prepare, put, read_alone
from elastictrain_checkpoint.torch.finding import Asked, fit_of
from elastictrain_checkpoint.torch.places import choose, with_older
from elastictrain_checkpoint.torch.ranks import Group, Ranks, group_of
from elastictrain_checkpoint.torch.report import LoadReport, check
from elastictrain_checkpoint.torch.saving import before_mutation


def load(
    state_dict: Any,
    path: str | FilePath | Store | None = None,
    *,
    checkpoint_id: str | FilePath | Store | None = None,
    group: Group = "world",
    process_group: dist.ProcessGroup | None = None,
    no_dist: bool = False,
    step: int | None = None,
    strict: bool = True,
    only: Sequence[str] | None = None,
    renamed: Mapping[str, str] | None = None,
    others: Sequence[str | FilePath | Store] = (),
    **more: Any,
) -> LoadReport:
    """Load a checkpoint into a state dict, in place: tensors are filled where they are, other values replaced.

    A mapping or list that is empty (the state of an optimizer that is new) takes all that the checkpoint has there. A
    list of nothing but numbers, strings and the like counts as a value: it is replaced, whatever its length.

    With a process group this is a collective: every rank calls it with its own state dict (a DTensor gets its shard,
    whatever the world was that saved it; ranks may hold different keys), every stored byte is read, and checked, by one
    of them and handed on, through shared memory where all are on one host. What goes wrong on one rank is raised on
    all, and all get the same report.

    One that was not saved from a state dict (by a run, an import, packs of one's own) is matched by its tensors' names
    (`by_name.names_of`); values that are not tensors it has at most where it was imported.

    Args:
        state_dict: nested mappings, lists and tuples. Objects in it that keep a state dict (modules, optimizers,
            schedulers, DCP's `Stateful`) load it, when all is read. Give `optimizer.load_state_dict` what was loaded
            for an `optimizer.state_dict()`.
        path: where `save` has written to.
        checkpoint_id: the same, as `torch.distributed.checkpoint` calls it.
        group: the ranks that load together. "world": the default group, if there is one. None: this process loads by
            itself, and nobody is waited for: for a load that not all ranks call, or places that not all of them see.
        process_group: the same, as DCP calls it; None is the default group.
        no_dist: as DCP has it: this process by itself, as with ``group=None``.
        step: which step; the newest that is whole if not given (the report says which newer ones were passed over).
        strict: refuse a checkpoint that has other keys, lengths, kinds, shapes or types, before anything is changed.
            False: load what fits; the rest is left as it is, and said in the report.
        only: keys that are loaded, all others being left alone on both sides, also if `strict`: ``["model"]``, or
            ``["model/decoder", "*.bias"]``. A name stands for everything below it, joined by "/" or ".", too.
        renamed: key in the checkpoint → key in the state dict, for whole parts (``{"model/old": "model/new"}``) or with
            patterns (``{"model/*.gamma": "model/*.weight"}``). `only` and the report are of the new keys.
        others: further places that may hold the same checkpoints, nearest first: what is damaged or missing in `path`
            is read from there.
        more: nothing; DCP's ``storage_reader`` and ``planner`` are refused in words.

    Raises:
        TypeError: a keyword that DCP knows and that has no meaning here; the message says what to use.
        StateMismatch: keys, lengths, kinds, shapes or types differ; all are named, and nothing was changed.
        NoCheckpoint: there is none, or not at that step.
        CorruptData: stored bytes are not those that were written, in any of the places; tensors may be partly filled.
            The newest older step that is whole is named.
        InvalidPiece: ranks ask for different things.
        InvalidMapping: `renamed` names what is not there, or gives two things one key.
        LoadFailed: another rank could not take part, for a reason that is neither of these nor of storage.

    """
    asked = Asked(path, checkpoint_id, tuple(others), step, strict, only, renamed)
    together = group_of(group_meant("load", group, process_group, no_dist, more))
    if together is not None:
        return load_together(state_dict, asked, Ranks(together))
    choice, stores, passed_over = asked.choice(), asked.stores(), dict[int, str]()
    found = choose(stores, step, passed_over)
    reader = found.reader()
    fit = fit_of(reader, state_dict, choice)
    check(fit.said, asked.said(found.manifest.step, found.stores[0]), strict=strict)
    before_mutation()
    try:
        filling = prepare(reader, fit, boxes=False)
        read_alone(reader, filling)
    except CorruptData as error:
        raise with_older(error, stores, found.manifest) from error
    put(fit, filling)
    said = fit.said
    return LoadReport(
        found.manifest.step,
        said.missing,
        said.unexpected,
        said.different,
        passed_over=passed_over,
        healed=reader.healed,
    )
