"""The weights that a new run begins with, out of any checkpoint that can be read (the setting `start_from`).

Before anything starts only names, types and shapes are looked at: all that does not fit is listed at once. Then the
setting is *pinned*: the step, the rules and a fingerprint are written into the job, so that every worker, whenever the
run begins anew, takes the same (`engine.starting`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash

from elastictrain.engine.optimizers import optimizer_template, state_keys
from elastictrain.engine.saving import NAMES, stored_aliases, weight_name
from elastictrain.engine.space import Space
from elastictrain.engine.stored import Note, newest_anywhere
from elastictrain.engine.worker_model import bare_model
from elastictrain.errors import CheckpointMismatch, ClusterError, ConfigError, CorruptCheckpoint
from elastictrain.job import Checkpoint, Copy, Job, load_job, place_of
from elastictrain.origin import Place, StartFrom
from elastictrain.recipe import load_recipe
from elastictrain_checkpoint import (
    CheckpointError,
    CorruptData,
    Found,
    Store,
    convert,
    find,
    list_steps,
    load,
    newest,
)
from elastictrain_checkpoint.mapping import Mapped, dump_rules, parse_rules
from elastictrain_checkpoint.source import Source, read_blocks

_FLOATS = ("F32", "BF16", "F16")
"""What becomes fp32 without a rounding."""
_SHOWN = 10
Tensors = Mapping[str, tuple[str, tuple[int, ...]]]


@dataclass(frozen=True)
class Origin:
    """What a run can begin with. `source`: tensors under the names of a run; `aliases`: tied names that it knows;
    `step`: of another run's checkpoint; `fingerprint`: the digest of that, else of names, types and shapes; `notes`:
    for events.jsonl, about places that do not answer.
    """

    source: Source
    aliases: Mapping[str, str]
    step: int | None
    fingerprint: str
    notes: tuple[Note, ...] = ()


def open_origin(settings: StartFrom) -> Origin:
    """Open what a run shall begin with; reads names, types and shapes. Raises UserError, CorruptCheckpoint (not whole)
    or ClusterError (storage).
    """
    where = f"start_from.checkpoint={settings.checkpoint!r}"
    try:
        origin = _open(settings)
    except CorruptData as error:
        raise CorruptCheckpoint(f"{where}: {error}") from error
    except CheckpointError as error:
        raise ConfigError(f"{where}: {error}") from error
    except OSError as error:
        raise ClusterError(f"{where} cannot be read: {type(error).__name__}: {error}") from error
    if settings.fingerprint is not None and origin.fingerprint != settings.fingerprint:
        raise CheckpointMismatch(
            f"{where} is not what start_from.fingerprint names: it is {origin.fingerprint}, expected "
            f"{settings.fingerprint}"
        )
    return origin


def _open(settings: StartFrom) -> Origin:
    url, options = settings.checkpoint, settings.storage_options
    source: Source | None = None
    aliases: Mapping[str, str] = {}
    step: int | None = None
    notes: tuple[Note, ...] = ()
    rules = _rules(settings)
    if settings.format in ("auto", "elastictrain") and not url.endswith(".safetensors"):
        found, notes = _of_a_run(settings)
        if found is not None:
            source, aliases, step = found.reader(), found.manifest.alias, found.manifest.step
            fingerprint = found.manifest.digest
    if source is None:
        foreign = convert.open_source(url, settings.format, storage_options=options)
        facts = [foreign.format, sorted((name, d, list(s)) for name, (d, s) in foreign.tensors.items())]
        fingerprint = xxhash.xxh3_128_hexdigest(json.dumps(facts).encode())
        source = Mapped(foreign, convert.default_rules(foreign))
    if rules:  # tied names are other ones then
        return Origin(Mapped(source, parse_rules(json.dumps(rules))), {}, step, fingerprint, notes)
    return Origin(source, aliases, step, fingerprint, notes)


def _of_a_run(settings: StartFrom) -> tuple[Found | None, tuple[Note, ...]]:
    """The checkpoint of another run, and the stores to read it from: of every block from the first that has it whole.
    None where the place may be of another format.
    """
    url, step, silent = settings.checkpoint, settings.step, dict[str, str]()
    first, copies = Store(url, storage_options=settings.storage_options), copies_of(settings)
    stores = (first, *(Store(one.path, storage_options=one.storage_options) for one in copies))
    found: Found | None = None
    if step is not None:
        found = find(stores, step) if copies else Found(load(first, step), stores)
    elif copies:
        found, silent = newest_anywhere(stores)
    elif manifest := newest(first):
        found = Found(manifest, stores)
    if found is None and (copies or settings.format == "elastictrain" or list_steps(first)):
        where = "".join(f", nor does {place.path!r}" for place in copies)
        raise ConfigError(f"start_from.checkpoint={url!r} holds no whole checkpoint of a run{where}{_unasked(silent)}")
    return found, tuple(("place_silent", {"path": place, "error": why}) for place, why in silent.items())


def _unasked(silent: Mapping[str, str]) -> str:
    return "".join(f"; {url} does not answer: {why}" for url, why in silent.items())


def copies_of(settings: StartFrom) -> tuple[Place, ...]:
    """The further places of the checkpoints to begin with: those of the setting; of a run directory all that its job
    names. Raises ConfigError when that run stores none.
    """
    if settings.copies or not (Path(settings.checkpoint).expanduser() / "job.yaml").is_file():
        return tuple(one for one in settings.copies if place_of(one.path) != place_of(settings.checkpoint))
    stored = load_job(Path(settings.checkpoint).expanduser() / "job.yaml").checkpoint
    if stored is None:
        raise ConfigError(f"start_from.checkpoint={settings.checkpoint!r} is a run that has stored no checkpoints")
    places: list[Checkpoint | Copy] = [stored, *stored.copy_to]
    return tuple(Place(path=one.path, storage_options=one.storage_options) for one in places)


def _rules(settings: StartFrom) -> list[Any]:
    """The rules of the setting as data."""
    if settings.mapping is None or isinstance(settings.mapping, tuple):
        return list(settings.mapping or ())
    try:
        text = Path(settings.mapping).expanduser().read_bytes()
    except OSError as error:
        raise ConfigError(f"start_from.mapping={settings.mapping!r} cannot be read: {error}") from error
    rules: list[Any] = json.loads(dump_rules(parse_rules(text)))
    return rules


# --- what fits ---


@dataclass(frozen=True)
class Fit:
    """`names`: what the run takes, under which name it lies there. The others are sentences."""

    names: dict[str, str]
    missing: tuple[str, ...]
    extra: tuple[str, ...]
    different: tuple[str, ...]

    @property
    def problems(self) -> list[str]:
        return [*self.missing, *self.extra, *self.different]


def fit(
    wanted: Tensors, ties: Mapping[str, str], there: Tensors, aliases: Mapping[str, str], *, optimizer: bool
) -> Fit:
    """What of a checkpoint (`there`) is the model's (`wanted`). Pure.

    Of tied weights (`ties`: second name → first) one name is enough. Buffers may be called like parameters, since other
    formats do not tell them apart. Weights of fewer bits become fp32 as they are.
    """
    names: dict[str, str] = {}
    missing: list[str] = []
    different: list[str] = []
    roots: set[str] = set()

    def root(name: str) -> str:
        """One name for all that are tied to each other, there or here."""
        name = aliases.get(name, name)
        return ties.get(name, name)

    for name, (dtype, shape) in wanted.items():
        others = [second for second, first in ties.items() if first == name]
        found = next((n for n in (name, *others, f"model/{name.partition('/')[2]}") if n in there), None)
        if found is None:
            missing.append(f"{name} {list(shape)} is in the model but not in the checkpoint")
            continue
        roots.add(root(found))
        have_dtype, have = there[found]
        if tuple(have) != tuple(shape):
            different.append(
                f"{name} has shape {list(shape)} in the model and {list(have)} in the checkpoint ({found})"
            )
        elif have_dtype != dtype and not (dtype == "F32" and have_dtype in _FLOATS):
            different.append(f"{name} is {dtype} in the model and {have_dtype} in the checkpoint ({found})")
        else:
            names[name] = found
    state = [name for name in there if name.startswith(("optim/", "ema/"))]
    if optimizer:
        names |= {name: name for name in state}
    extra = [name for name in there if root(name) not in roots and name not in state]
    said = tuple(f"{name} {list(there[name][1])} is in the checkpoint but not in the model" for name in extra)
    return Fit(names, tuple(missing), said, tuple(different))


def _check_ties(origin: Origin, ties: Mapping[str, str]) -> list[str]:
    """Weights that are tied in the model and are there under both names must be equal; sentences."""
    source, found = origin.source, []
    for second, first in ties.items():
        if second not in source.tensors or first not in source.tensors or origin.aliases.get(second) == first:
            continue
        same = source.tensors[second] == source.tensors[first] and all(
            np.array_equal(a, b) for a, b in zip(read_blocks(source, second), read_blocks(source, first), strict=True)
        )
        if not same:
            found.append(f"{second} and {first} are tied in the model and differ in the checkpoint")
    return found


@dataclass(frozen=True)
class Pinned:
    """`settings`: with all that makes it the same every time. `said`: for events.jsonl, as `notes` are."""

    settings: StartFrom
    said: dict[str, Any]
    notes: tuple[Note, ...] = ()


def pin(job: Job) -> Pinned:
    """Check that the job can begin with what `start_from` names. Raises CheckpointMismatch that lists all that does not
    fit, with both sides, and what `open_origin` raises.
    """
    settings = job.start_from
    assert settings is not None, "only a job with the setting start_from has an origin"
    origin = open_origin(settings)
    recipe = load_recipe(job.recipe, job.recipe_args)
    model = bare_model(recipe, job.seed)
    space = Space(model, block_elements=job.block_elements, whole_parameters=job.ownership == "whole")
    buffers = dict(model.named_buffers())
    wanted = wanted_of(space, {name: buffers[name] for name in space.counters})
    ties = stored_aliases(space.aliases)
    found = fit(wanted, ties, origin.source.tensors, origin.aliases, optimizer=settings.optimizer)
    never = _check_ties(origin, ties)
    if settings.optimizer:
        never += _optimizer_problems(recipe, model, origin.source)
    nothing = not any(name.startswith("model/") for name in found.names)
    groups = [found.missing, found.extra, found.different] if settings.strict or nothing else []
    if any((*groups, never)):
        raise CheckpointMismatch(_words(settings, [*groups, never]))
    said = {"checkpoint": settings.checkpoint, "step": origin.step, "tensors": len(found.names),
            "kept": [*found.missing, *found.different], "skipped": list(found.extra)}  # fmt: skip
    changes = {"step": origin.step, "fingerprint": origin.fingerprint, "mapping": tuple(_rules(settings)) or None,
               "copies": () if origin.step is None else copies_of(settings)}  # fmt: skip
    return Pinned(settings.model_copy(update=changes), said, origin.notes)


def wanted_of(space: Space, counters: Mapping[str, torch.Tensor]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Type and shape of all weights and buffers of a model, by the names of a run."""
    found: dict[str, tuple[str, tuple[int, ...]]] = {
        weight_name(e.kind, e.name): ("F32", e.shape) for e in space.entries
    }
    return found | {f"counter/{n}": (NAMES[c.dtype], tuple(c.shape)) for n, c in counters.items()}


def _words(settings: StartFrom, groups: Sequence[Sequence[str]]) -> str:
    """All that does not fit; of each kind so much that a rule can be written for it."""
    lines = [f"start_from.checkpoint={settings.checkpoint!r} does not fit the model:"]
    for group in groups:
        lines += [f"  {problem}" for problem in group[:_SHOWN]]
        lines += [f"  and {len(group) - _SHOWN} more like that"] if len(group) > _SHOWN else []
    lines.append(
        "map names and shapes with start_from.mapping, or take what fits with start_from.strict: false"
        if settings.strict
        else "map names and shapes with start_from.mapping"
    )
    return "\n".join(lines)


def _optimizer_problems(recipe: Any, model: torch.nn.Module, source: Source) -> list[str]:
    template, params = optimizer_template(recipe, model)
    names = {id(parameter): name for name, parameter in params.items()}
    there = {*source.tensors, *numbers_in(source)}
    lacking = [
        f"optim/{names[id(parameter)]}/{key}"
        for index, group in enumerate(template.param_groups)
        for parameter in group["params"]
        for key in sorted(state_keys(template, index))
        if f"optim/{names[id(parameter)]}/{key}" not in there
    ]
    return [f"{name} is state of {type(template).__name__} and not in the checkpoint" for name in lacking]


def numbers_in(source: Source) -> Mapping[str, Any]:
    """What an optimizer keeps outside of tensors, of another run."""
    found = source.tree.get("numbers", {}) if isinstance(source.tree, Mapping) else {}
    return found if isinstance(found, Mapping) else {}
