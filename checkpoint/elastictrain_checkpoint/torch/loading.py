"""From a checkpoint into a state dict, in place: every process reads what it holds, in whatever world it was saved."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass, field
from pathlib import Path as FilePath
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from elastictrain_checkpoint.commit import load as load_manifest
from elastictrain_checkpoint.commit import newest
from elastictrain_checkpoint.dtypes import num_elements
from elastictrain_checkpoint.errors import InvalidPiece, NoCheckpoint, StateMismatch
from elastictrain_checkpoint.layouts import Held, boxes_of, runs_of
from elastictrain_checkpoint.reader import Reader, Request
from elastictrain_checkpoint.reshard import Want
from elastictrain_checkpoint.store import Store
from elastictrain_checkpoint.together import read_boxes
from elastictrain_checkpoint.torch.saving import before_mutation
from elastictrain_checkpoint.torch.sharded import local_held
from elastictrain_checkpoint.torch.tree import AS_BYTES, NATIVE, Path, as_buffer, leaves, stored_facts

FEW_RUNS = 16
"""So many flat ranges of a tensor, at most, are read one by one; more are read as boxes, with the bytes in between."""
_DTYPES = {name: dtype for dtype, name in NATIVE.items()}


@dataclass(slots=True)
class LoadReport:
    """What was loaded from which step, and, without `strict`, what did not match. Keys are joined by "/"."""

    step: int
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)


class _Loading:
    """One load: first decided as a whole (`fill`), then done (`run`)."""

    def __init__(self, reader: Reader, aliases: Mapping[str, str], report: LoadReport) -> None:
        tree = reader.tree["torch"]
        self.reader, self.aliases, self.report = reader, aliases, report
        self.rest, self.odd = tree["rest"], tree["dtypes"]
        self.names = {tuple(path): name for path, name in tree["places"]}
        self.problems: list[str] = []
        self.reads: list[tuple[str, torch.Tensor, Held | None]] = []
        self.made: dict[str, torch.Tensor] = {}
        self.sets: list[tuple[Any, Any, Any]] = []

    def fill(self, target: Any, stored: Any, path: Path) -> Any:
        """What is to stand at `path`: the target itself, filled later on, or a new value."""
        name = self.names.get(path)
        if isinstance(target, torch.Tensor) or name is not None:
            return self._tensor(target, name, path)
        if isinstance(target, MutableMapping) and isinstance(stored, dict):
            self._mapping(target, stored, path)
            return target
        if isinstance(target, list | tuple) and isinstance(stored, list | tuple) and len(target) == len(stored):
            filled = [self.fill(t, s, (*path, n)) for n, (t, s) in enumerate(zip(target, stored, strict=True))]
            if isinstance(target, tuple):
                return target if all(a is b for a, b in zip(filled, target, strict=True)) else type(target)(filled)
            self.sets.append((target, slice(None), filled))
            return target
        return self.new(stored, path)

    def _mapping(self, target: MutableMapping[Any, Any], stored: dict[Any, Any], path: Path) -> None:
        fresh = not target  # for example the state of an optimizer that has not made a step: takes all there is
        for key, value in stored.items():
            if key in target:
                self.sets.append((target, key, self.fill(target[key], value, (*path, key))))
            elif fresh:
                self.sets.append((target, key, self.new(value, (*path, key))))
            else:
                self.report.unexpected += [_shown(p) for p, _ in leaves(value, (*path, key))]
        self.report.missing += [
            _shown(p) for key in target if key not in stored for p, _ in leaves(target[key], (*path, key))
        ]

    def _tensor(self, target: Any, name: str | None, path: Path) -> Any:
        if name is None or (isinstance(target, torch.Tensor) and target.is_meta):
            kind = "is on the meta device" if name is not None else "is a tensor, and none in the checkpoint"
            self.problems.append(f"{_shown(path)} {kind}")
            return target
        if not isinstance(target, torch.Tensor):
            return self._new_tensor(name)
        wanted, found = stored_facts(target), self.reader.tensors[name]
        odd = self.odd.get(self.aliases.get(name, name))
        same = wanted == found and (odd is None or AS_BYTES.get(odd) is target.dtype)
        if not same or (odd is None and target.dtype not in NATIVE):
            self.problems.append(
                f"{_shown(path)} is {target.dtype} {list(target.shape)}, in the checkpoint {odd or found[0]} "
                f"{list(found[1])}"
            )
            return target
        try:
            self.reads.append((name, target, _held_of(target, name)))
        except InvalidPiece as error:
            self.problems.append(str(error))
        return target

    def new(self, stored: Any, path: Path) -> Any:
        """A value that the target does not have: tensors are made, on the CPU."""
        name = self.names.get(path)
        if name is not None:
            return self._new_tensor(name)
        if isinstance(stored, dict):
            return {key: self.new(value, (*path, key)) for key, value in stored.items()}
        if isinstance(stored, list | tuple):
            items = [self.new(value, (*path, number)) for number, value in enumerate(stored)]
            return items if isinstance(stored, list) else tuple(items)
        return stored

    def _new_tensor(self, name: str) -> torch.Tensor:
        name = self.aliases.get(name, name)
        if name not in self.made:
            dtype, shape = self.reader.tensors[name]
            odd = self.odd.get(name)
            made = torch.empty(shape[:-1] if odd else shape, dtype=AS_BYTES[odd] if odd else _DTYPES[dtype])
            self.made[name] = made
            self.reads.append((name, made, None))
        return self.made[name]

    def run(self) -> None:
        """Read everything that `fill` has planned, and put it into its places."""
        requests: list[Request] = []
        wants: list[tuple[Want, torch.Tensor]] = []
        copies: list[tuple[torch.Tensor, torch.Tensor]] = []
        for name, target, held in self.reads:
            local = (target.to_local() if isinstance(target, DTensor) else target).detach()
            direct = local.device.type == "cpu" and local.is_contiguous() and not local.is_conj() and not local.is_neg()
            out = local if direct else torch.empty(local.shape, dtype=local.dtype)
            if not direct:
                copies.append((local, out))
            if not out.numel():
                continue
            shape = self.reader.tensors[name][1]
            if held is None:
                requests.append(Request(name, 0, num_elements(shape), as_buffer(out)))
                continue
            held = (*held, *(((0, size),) for size in shape[len(held) :]))  # the bytes of an item, where it has them
            found = _requests(name, shape, held, out)
            requests += found
            if not found:
                for want, part, place in _wants(name, held, out):
                    wants.append((want, part))
                    if part is not place:
                        copies.append((place, part))
        self.reader.read_many(requests)
        if wants:
            read_boxes(self.reader, [want for want, _ in wants], [as_buffer(part) for _, part in wants])
        with torch.no_grad():
            for local, out in reversed(copies):  # parts before the whole that they are parts of
                local.copy_(out)
        for _, target, _ in self.reads:
            torch.autograd.graph.increment_version(target)
        for container, key, value in self.sets:
            container[key] = value


def _held_of(target: torch.Tensor, name: str) -> Held | None:
    """What this process holds of a DTensor; None for a tensor that is whole, or of which nothing is here."""
    return local_held(target, name) if isinstance(target, DTensor) else None


def _requests(name: str, shape: tuple[int, ...], held: Held, out: torch.Tensor) -> list[Request]:
    """What this process needs of a tensor as flat ranges, where these are few; else nothing."""
    runs = runs_of(shape, held)
    if len(runs.starts) > FEW_RUNS:
        return []
    buffer = as_buffer(out)
    item = len(buffer) // int(runs.bounds[-1])
    bounds = runs.bounds.tolist()
    return [
        Request(name, start, start + last - first, buffer[first * item : last * item])
        for start, first, last in zip(runs.starts.tolist(), bounds[:-1], bounds[1:], strict=True)
    ]


def _wants(name: str, held: Held, out: torch.Tensor) -> list[tuple[Want, torch.Tensor, torch.Tensor]]:
    """The same as boxes: each with the tensor that it is read into, and its place in ``out``."""
    found = []
    for box, place in boxes_of(held):
        part = out[place[: out.dim()]]
        found.append((Want(name, *box), part if part.is_contiguous() else torch.empty_like(part).contiguous(), part))
    return found


def load(
    state_dict: MutableMapping[str, Any],
    path: str | FilePath | Store,
    *,
    step: int | None = None,
    strict: bool = True,
) -> LoadReport:
    """Load a checkpoint into a state dict, in place: tensors are filled where they are, other values replaced.

    A mapping that is empty (the state of an optimizer that is new) takes all that the checkpoint has there. In several
    processes each calls it by itself; a DTensor reads its own shard, whatever the world was that saved it.

    Args:
        state_dict: nested mappings, lists and tuples; give `optimizer.load_state_dict` what was loaded for it.
        path: where `save` has written to.
        step: which step; the newest if not given.
        strict: refuse a checkpoint that has other keys, before anything is changed. False: load what both have.

    Raises:
        StateMismatch: keys, shapes or types differ; all are named, and nothing was changed.
        NoCheckpoint: there is none, or not at that step.
        CorruptData: stored bytes are not those that were written; tensors may be partly filled.

    """
    store = path if isinstance(path, Store) else Store(path)
    manifest = newest(store) if step is None else load_manifest(store, step)
    if manifest is None:
        raise NoCheckpoint(f"{store.url} has no checkpoint")
    reader = Reader(store, manifest)
    if not isinstance(reader.tree, dict) or "torch" not in reader.tree:
        raise StateMismatch(f"step {manifest.step} of {store.url} was not saved from a state dict: its tree is another")
    report = LoadReport(manifest.step)
    loading = _Loading(reader, manifest.alias, report)
    loading.fill(state_dict, loading.rest, ())
    problems = list(loading.problems)
    if strict:
        problems += [f"{key} is not in the checkpoint" for key in report.missing]
        problems += [f"{key} is only in the checkpoint" for key in report.unexpected]
    if problems:
        shown = "\n  ".join(problems[:20]) + (f"\n  and {len(problems) - 20} more" if len(problems) > 20 else "")
        raise StateMismatch(f"step {manifest.step} of {store.url} does not fit:\n  {shown}\n(strict={strict})")
    before_mutation()
    loading.run()
    return report


def _shown(path: Path) -> str:
    return "/".join(str(key) for key in path)
