"""Where a run starts: at the recipe's initial state, or at a checkpoint that belongs to this job."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from elastictrain.data import AnySource, MixedSource, Segment, fingerprint_difference
from elastictrain.data.changed import Choice, as_event, changed_sources, offer, refuse_live, what_is_left
from elastictrain.data.fingerprint import identity
from elastictrain.data.kept import Kept, kept_of, whole_fingerprint, with_files
from elastictrain.data.stages import (
    Skip,
    first_stage,
    open_stage,
    take_out,
    with_lanes,
    with_mixture,
    with_other_data,
    with_other_sources,
    with_skips,
)
from elastictrain.data_settings import Mixture
from elastictrain.engine.origins import copies_of, pin
from elastictrain.engine.stored import Note, Stored, folder_of, refuse_checkpoints
from elastictrain.engine.stored import older_offer as older_offer
from elastictrain.errors import CheckpointMismatch, ConfigError, DataError
from elastictrain.job import Job
from elastictrain.origin import StartFrom
from elastictrain.protocol import Restore, Stage
from elastictrain_checkpoint import Manifest

_ABOUT_ORDER = ("lanes", "lane_batch_size", "seed")


@dataclass(frozen=True, slots=True)
class Start:
    """`restore`: the state to begin with. `checkpoints`: the whole ones that are known, ascending. `stages`: of the
    data order, the last one in force. `notes`: lines for events.jsonl. `generation`: the newest that has
    committed here. `data`: the fingerprint of the data; `kept`: what is to be kept of them beside the run.
    """

    restore: Restore
    checkpoints: tuple[tuple[int, str], ...]
    stages: tuple[Stage, ...]
    notes: tuple[Note, ...] = ()
    resumed: bool = False
    generation: int = 0
    data: Mapping[str, Any] = field(default_factory=dict)
    kept: Mapping[str, Kept] = field(default_factory=dict)
    start_from: StartFrom | None = None


def find_start(
    job: Job,
    *,
    resume: bool,
    step: int | None = None,
    skips: Sequence[Skip] = (),
    changed: Choice = "fail",
    kept: Path | None = None,
) -> Start:
    """Decide where the run starts, and check that its data can be read. `skips`: what `data skip` was asked for so far.
    `changed`: what becomes of data that are not those of the checkpoint; `kept`: the folder with what the run has kept
    of its data (see `data.kept`).

    A new run refuses a checkpoint folder that holds another run's checkpoints. A resumed one takes the newest (or
    `step`), and refuses when it is not whole (naming what, and which older one is), when the data have changed, or when
    it belongs to another job. Bytes are checked by the workers, as they restore: reading all of them here first would
    read them twice, by one process alone (see `older_offer`). Raises UserError or CorruptCheckpoint.
    """
    if job.checkpoint is None:
        if resume:
            raise ConfigError(
                "--resume: the job has no checkpoint setting, so there is nothing to go on from; set checkpoint.path"
            )
        return _new(job)
    if not resume:
        refuse_checkpoints(job.checkpoint)
        return _new(job)
    stored = Stored.of(job.checkpoint)
    steps = stored.steps
    manifest, place = stored.choose(step)
    stages, notes = _with_lanes(job, manifest)
    origin = _recorded_origin(job, manifest)
    stages, about_data, source = _check_data(job, manifest, stages, skips, changed, kept)
    stages, left_out = _with_skips(job, manifest, stages, skips)
    notes += about_data + left_out + stored.notes
    later = [s for s in steps if s > manifest.step]
    if later:
        notes.append(("given_up", {"step": manifest.step, "steps": later}))
    known = {s: folder_of(stored.place_of(s), s) for s in steps if s <= manifest.step}
    known[manifest.step] = folder_of(place, manifest.step)
    return Start(
        Restore(manifest.step, known[manifest.step], insist=True),
        tuple(sorted(known.items())),
        stages,
        tuple(notes),
        resumed=True,
        generation=stored.newest_generation,
        data=source.fingerprint,
        kept=kept_of(source),
        start_from=origin,
    )


def _new(job: Job) -> Start:
    """A run from its first step."""
    source = open_stage(job, first_stage(job))
    source.close()
    stages = with_mixture((first_stage(job),), _plan(source), 0)
    if job.start_from is None:
        return Start(Restore(0, None), (), stages, data=source.fingerprint, kept=kept_of(source))
    pinned = pin(job)
    notes = (*pinned.notes, ("started_from", pinned.said))
    return Start(
        Restore(0, None), (), stages, notes, data=source.fingerprint, kept=kept_of(source), start_from=pinned.settings
    )


def _plan(source: AnySource) -> Sequence[Segment] | None:
    """What a mixture's settings ask for, in integers."""
    return source.plan if isinstance(source, MixedSource) else None


def _recorded_origin(job: Job, manifest: Manifest) -> StartFrom | None:
    """What the run has begun with: should it go back to its start, it begins with the same again."""
    recorded = (manifest.tree or {}).get("start_from")
    if recorded is None:
        problems = ["the run was started with the recipe's initial values"] if job.start_from is not None else []
    else:
        problems = job.start_from.differences(recorded) if job.start_from is not None else []
    if problems:
        shown = "\n  ".join(problems)
        raise CheckpointMismatch(
            f"start_from is not what the run of checkpoint step {manifest.step} has begun with:\n  {shown}\n"
            "leave start_from out to go on, or start a new run (another checkpoint.path)"
        )
    if recorded is None:
        return None
    given: dict[str, Any] = {}
    if job.start_from is not None:  # what opens the places is not recorded
        given = {"storage_options": job.start_from.storage_options}
        given |= {"copies": copies} if (copies := copies_of(job.start_from)) else {}
    return StartFrom.model_validate(recorded | given)


def _with_lanes(job: Job, manifest: Manifest) -> tuple[tuple[Stage, ...], list[Note]]:
    """The stages so far; a new one when the number of lanes or the lane batch size has changed."""
    tree: Mapping[str, Any] = manifest.tree or {}
    if "stages" not in tree:
        raise CheckpointMismatch(
            f"checkpoint step {manifest.step} was not written by a run of elastictrain: it has no stages"
        )
    if tree.get("seed") != job.seed:
        raise CheckpointMismatch(
            f"seed={job.seed}, but checkpoint step {manifest.step} was made with seed={tree.get('seed')}; set seed to "
            "that"
        )
    before = tuple(Stage.from_json(stage) for stage in tree["stages"])
    stages = with_lanes(before, job.lanes, job.lane_batch_size, manifest.step)
    if stages == before:
        return stages, []
    last, new = before[-1], stages[-1]
    said = {"stage": new.index, "step": manifest.step, "lanes_before": last.lanes, "lanes": job.lanes,
            "lane_batch_size_before": last.lane_batch_size, "lane_batch_size": job.lane_batch_size}  # fmt: skip
    return stages, [("stage", said)]


def _with_skips(
    job: Job, manifest: Manifest, stages: tuple[Stage, ...], skips: Sequence[Skip]
) -> tuple[tuple[Stage, ...], list[Note]]:
    """The stages, with a new one when samples that the checkpoint does not know of are to be skipped."""
    taken = stages[-1].skips
    stages = with_skips(stages, skips, manifest.step)
    new = stages[-1]
    if new.skips == taken:
        return stages, []
    open_stage(job, new, stages[:-1]).close()  # raises if too little is left
    said = {"stage": new.index, "step": manifest.step, "what": [skip.words for skip in skips[taken:]]}
    return stages, [("data_skipped", said | {"jumps": new.jumps, "holes": new.holes})]


def _check_data(
    job: Job, manifest: Manifest, stages: tuple[Stage, ...], skips: Sequence[Skip], changed: Choice, kept: Path | None
) -> tuple[tuple[Stage, ...], list[Note], AnySource]:
    """The stages, the last one with its mixture's plan; another plan than the recorded one is a stage that continues.
    And the data, closed.

    Raises DataError when a source that was there before has changed and it is not to become a new stage.
    """
    tree: Mapping[str, Any] = manifest.tree or {}
    source = open_stage(job, replace(stages[-1], data=None, holes=()), stages[:-1])
    notes: list[Note] = []
    try:
        if fingerprint_difference(tree.get("data", {}), source.fingerprint, ignoring=_ABOUT_ORDER):
            stages, said = _with_other_data(job, manifest, stages, source, skips, changed, kept)
            notes.append(("data_changed", said))
            source.close()
            source = open_stage(job, stages[-1], stages[:-1])
        else:
            take_out(source, stages[-1])
            if source.growth is not None and tree.get("live") is not None:
                source.growth.check(tree["live"])
    finally:
        source.close()
    last, stages = stages[-1], with_mixture(stages, _plan(source), manifest.step)
    new = stages[-1]
    if new.index != last.index:
        said = {"stage": new.index, "step": manifest.step, "mixture_before": last.mixture, "mixture": new.mixture}
        notes.append(("stage", said))
    return stages, notes, source


def _with_other_data(
    job: Job,
    manifest: Manifest,
    stages: tuple[Stage, ...],
    source: AnySource,
    skips: Sequence[Skip],
    changed: Choice,
    kept: Path | None,
) -> tuple[tuple[Stage, ...], dict[str, Any]]:
    """The stages of a run that goes on on data that have changed, and what is said of it. Raises DataError that says
    what has changed and what can be chosen, unless a new stage is.
    """
    tree: Mapping[str, Any] = manifest.tree or {}
    step, before = manifest.step, tuple(Stage.from_json(stage) for stage in tree["stages"])
    old, new = with_files(tree["data"], kept), whole_fingerprint(source)
    changes = fingerprint_difference(old, new, ignoring=_ABOUT_ORDER)
    refuse_live(old, new)
    if stages == before:
        left = what_is_left(old, source, new, before, step)
    else:  # other lanes began a new order; what is left is of the one before
        then = open_stage(job, replace(before[-1], data=None, holes=()), before[:-1])
        then.close()
        left = what_is_left(old, then, new, before, step)
    if changed != "new_stage":
        new_run = "a new run (another checkpoint.path and run directory)"
        raise DataError(offer(changes, left, f"checkpoint step {step}", "--data-changed new_stage", new_run))
    names = changed_sources(old, new)
    said = {"step": step, **as_event(changes, left)}
    if names is not None:
        return with_other_sources(stages, names, job.data.sources if isinstance(job.data, Mixture) else ()), said
    now = None if isinstance(source, MixedSource) else identity(new)
    others = with_other_data(stages, identity(old), now, step, skips)
    return others, said | {"skips_left": others[-1].skips}
