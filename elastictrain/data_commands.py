"""Commands about the data of a run or a job: what it used, where a sample comes from, what is to be left out."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from elastictrain.data_inspect import bars, inspect, telling
from elastictrain.data_prepare import prepare
from elastictrain.errors import ConfigError, DataError
from elastictrain.terminal import AsJson, Commands, Run

if TYPE_CHECKING:
    from elastictrain.data.audit import AuditedStep, Auditor
    from elastictrain.data.sources import AnySource
    from elastictrain.data.stages import Skip
    from elastictrain.job import Job
    from elastictrain.observe import RunDirectory
    from elastictrain.protocol import Stage

app = typer.Typer(
    name="data",
    cls=Commands,
    help="Look at the data of a job, and at what a run has used of them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(inspect)
app.command()(prepare)
Steps = Annotated[
    str | None, typer.Option("--steps", metavar="A:B", help="Steps A up to, but not including, B; or one step A.")
]
NOT_COUNTED = " (did not count: the lane was dropped)"
RunOrJob = Annotated[str, typer.Argument(metavar="RUN", help="A run (path, name, latest), or a JOB.yaml.")]


@app.command()
def audit(
    run: Run,
    steps: Steps = None,
    samples: Annotated[bool, typer.Option("--samples", help="Show file, row group, row and tokens of each.")] = False,
    as_json: AsJson = False,
) -> None:
    """Compute again which samples each committed step used, and compare with what the workers recorded."""
    from elastictrain.data.audit import Verdict
    from elastictrain.observe import find_run
    from elastictrain.observe.dropped import drops_of

    found = find_run(run)
    rows = found.metrics()
    if not rows:
        raise ConfigError(f"RUN {str(found.path)!r}: nothing to audit: no step has been published yet")
    chosen = _range(steps, rows[0].step, rows[-1].step + 1)
    recorded = [(row.step, row.samples_hash) for row in rows if chosen[0] <= row.step < chosen[1]]
    verdict = Verdict()
    with _auditor(found) as auditor, bars(quiet=as_json) as shown:
        task = shown.add_task("computing samples", total=len(recorded)) if shown else None
        for at in auditor.audit(recorded, drops_of(rows)):
            verdict.add(at)
            if shown and task is not None:
                shown.advance(task)
            if as_json:
                places = {"lanes": _places(auditor, at.step)} if samples else {}
                typer.echo(json.dumps(asdict(at) | {"agrees": at.agrees} | places))
            elif samples:
                _print_places(auditor, at)
        if as_json:
            typer.echo(json.dumps({"verdict": asdict(verdict) | {"agrees": verdict.agrees}}))
    if not as_json:
        _print_verdict(verdict, recorded)
    if not verdict.agrees:
        raise DataError(
            f"RUN {str(found.path)!r}: steps {_some(verdict.differing)} used other samples than the order says, "
            f"{verdict.repeated} sample(s) were used twice in an epoch"
        )


@app.command()
def explain(
    run: RunOrJob,
    step: Annotated[int, typer.Option("--step", min=1, help="A step of the run, past or to come.")],
    lane: Annotated[int | None, typer.Option("--lane", min=0, help="One lane; default all.")] = None,
    rows: Annotated[bool, typer.Option("--rows", help="Read the row groups and name the documents, too.")] = False,
    as_json: AsJson = False,
) -> None:
    """Say where the samples of a step come from: file, row group, rows, tokens."""
    dropped = _dropped(run, step)
    with _auditor_of(run) as auditor:
        source, stage = auditor.source(step)
        if lane is not None and lane >= source.lanes:
            raise ConfigError(f"--lane {lane}: the step has lanes 0 to {source.lanes - 1}")
        lanes = range(source.lanes) if lane is None else [lane]
        if as_json:
            typer.echo(json.dumps({"step": step, "stage": stage.index, "order_step": stage.position(step),
                                   "lanes": {str(one): _lane(auditor, step, one, rows) for one in lanes},
                                   "dropped": [one for one in lanes if one in dropped]}))  # fmt: skip
            return
        typer.echo(f"step {step}: step {stage.position(step)} of the order of stage {stage.index}")
        for one in lanes:
            _print_lane(auditor, step, one, rows, counts=one not in dropped)


@app.command()
def skip(
    run: Run,
    steps: Annotated[
        str | None, typer.Option("--steps", metavar="A:B", help="Pass over what steps A up to, not including, B use.")
    ] = None,
    lane: Annotated[int | None, typer.Option("--lane", min=0, help="With one step: only this lane's samples.")] = None,
    file: Annotated[str | None, typer.Option("--file", help="A file of the data, as `data explain` names it.")] = None,
    row_group: Annotated[int | None, typer.Option("--row-group", min=0, help="Its row group, from 0.")] = None,
    rows: Annotated[
        str | None, typer.Option("--rows", metavar="A:B", help="Its rows A up to, not including, B; default all.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Leave samples out of the rest of a run that stands still; holds from where it is taken up (run --resume)."""
    from elastictrain.data_settings import Mixture
    from elastictrain.observe import find_run

    found = find_run(run)
    job, stages, _ = _record(found)
    if job.checkpoint is None:
        raise ConfigError(f"RUN {str(found.path)!r} stores no checkpoints (checkpoint.path), so it cannot be taken up")
    if (steps is None) == (file is None) or (file is None) != (row_group is None) or (lane is not None and not steps):
        raise ConfigError(
            "say what to skip: --steps A:B, --steps A --lane L, or --file NAME --row-group N [--rows A:B]"
        )
    if file is None and rows is not None:
        raise ConfigError("--rows needs --file and --row-group")
    if isinstance(job.data, Mixture) and (file is not None or lane is not None):
        raise ConfigError(
            "the data are a mixture, of which only whole steps can be skipped (--steps A:B), or a file left out by "
            "another path in data.sources; single samples cannot"
        )
    if job.data.is_live and (file is not None or lane is not None):
        raise ConfigError("the data are a live source, of which only whole steps can be skipped (--steps A:B)")
    if steps is not None:
        wanted = _skip_steps(found, stages, _range(steps, 1, 1 << 62), lane)
    else:
        wanted = _skip_rows(job, stages, str(file), int(row_group or 0), None if rows is None else _range(rows, 0, 0))
    _try_out(job, stages, wanted)
    for one in wanted:
        found.add_skip(asdict(one))
    hint = _hint(found, _range(steps, 1, 1 << 62)[0]) if steps is not None and lane is None else ""
    words = list(dict.fromkeys(one.words for one in wanted))
    if as_json:
        typer.echo(json.dumps({"skips": [asdict(one) for one in wanted], "words": words}))
    else:
        typer.echo(
            f"will be left out: {'; '.join(words)}. It holds from where the run is taken up (run --resume){hint}"
        )


def _skip_steps(found: RunDirectory, stages: tuple[Stage, ...], steps: tuple[int, int], lane: int | None) -> list[Skip]:
    from elastictrain.data.ids import split_ids
    from elastictrain.data.stages import Skip, stage_of

    first, end = steps
    words = f"steps {first} to {end - 1}" if end - first > 1 else f"step {first}"
    if lane is None:
        stage = stage_of(stages, first)
        if stage_of(stages, end - 1) != stage:
            raise ConfigError(
                f"--steps {first}:{end}: a new stage begins in between; skip what is before and after apart"
            )
        start, stop = stage.position(first), stage.position(end - 1) + 1
        return [Skip(words, start, stop, order=stage.order, data=stages[-1].data)]
    if end - first != 1:
        raise ConfigError(f"--lane {lane}: expected one step, as --steps {first}; got {words}")
    if stage_of(stages, first).data != stages[-1].data:
        raise ConfigError(f"{words}: the data have changed since, so these samples do not come again; nothing to skip")
    with _auditor(found) as auditor:
        lanes = auditor.source(first)[0].lanes
        if lane >= lanes:
            raise ConfigError(f"--lane {lane}: the step has lanes 0 to {lanes - 1}")
        blocks, rows = split_ids(auditor.ids(first, lane))
    return [
        Skip(f"{words}, lane {lane}", row, row + 1, block=block, data=stages[-1].data)
        for block, row in sorted(zip(blocks.tolist(), rows.tolist(), strict=True))
    ]


def _skip_rows(
    job: Job, stages: tuple[Stage, ...], file: str, row_group: int, rows: tuple[int, int] | None
) -> list[Skip]:
    from elastictrain.data.places import find_block, samples_with
    from elastictrain.data.source import Source
    from elastictrain.data.stages import Skip

    words = f"{file}, row group {row_group}" + ("" if rows is None else f", rows {rows[0]} to {rows[1] - 1}")
    with _opened(job, stages) as source:
        assert isinstance(source, Source), "others were refused before"
        found = samples_with(source, find_block(source, file, row_group), rows)
    return [Skip(words, start, stop, block=block, data=stages[-1].data) for block, start, stop in found]


def _try_out(job: Job, stages: tuple[Stage, ...], wanted: list[Skip]) -> None:
    """Raise DataError now, and not when the run is taken up, where too little would be left."""
    from elastictrain.data.stages import with_skips

    last = stages[-1]
    padded = [wanted[0]] * last.skips + wanted  # those that the stages know already are not looked at
    with _opened(job, with_skips(stages, padded, last.from_step)):
        pass


def _hint(found: RunDirectory, first: int) -> str:
    rows = found.metrics()
    if not rows or rows[-1].step < first:
        return ""
    stored = [int(event.data["step"]) for event in found.events() if event.kind == "checkpoint"]
    before = [step for step in stored if step < first]
    newest = f", such as --resume-step {before[-1]}" if before else "; it has stored none"
    return f". Step {first} has been trained already: to pass over it, go on from a checkpoint before it{newest}"


def _range(text: str | None, low: int, high: int) -> tuple[int, int]:
    """Read `A:B` or `A`; an open end is `low` or `high`."""
    if text is None:
        return low, high
    match = re.fullmatch(r"(\d*):(\d*)|(\d+)", text.strip())
    if match is None:
        raise ConfigError(f"{text!r}: expected A:B (from A up to, not including, B), or a single number")
    if match[3] is not None:
        return int(match[3]), int(match[3]) + 1
    first, end = int(match[1] or low), int(match[2] or high)
    if first >= end:
        raise ConfigError(f"{text!r}: expected A:B with A below B")
    return first, end


def _record(found: RunDirectory) -> tuple[Job, tuple[Stage, ...], dict[str, Any] | None]:
    """The job of a run, its stages, and the fingerprint of its data (None where the run has written none)."""
    from elastictrain.data.stages import first_stage
    from elastictrain.job import load_job
    from elastictrain.protocol import Stage

    job, record = load_job(found.path / "job.yaml"), found.read_data()
    if record is None:
        return job, (first_stage(job),), None
    return job, tuple(Stage.from_json(stage) for stage in record["stages"]), record["fingerprint"]


def _dropped(run: str, step: int) -> tuple[int, ...]:
    """The lanes of a step that did not count; none of a job, or a step to come."""
    if _is_job(run):
        return ()
    from elastictrain.observe import find_run
    from elastictrain.observe.dropped import drops_of

    return drops_of(find_run(run).metrics()).get(step, ())


def _is_job(run: str) -> bool:
    return run.endswith((".yaml", ".yml")) and Path(run).is_file()


@contextmanager
def _auditor_of(run: str) -> Iterator[Auditor]:
    if not _is_job(run):
        from elastictrain.observe import find_run

        with _auditor(find_run(run)) as auditor:
            yield auditor
        return
    from elastictrain.data.audit import Auditor
    from elastictrain.data.stages import first_stage, open_stage
    from elastictrain.job import load_job

    job = load_job(run)
    with bars(quiet=False) as shown:
        auditor = Auditor([first_stage(job)], lambda stage: open_stage(job, stage, progress=telling(shown)))
        try:
            auditor.source(1)
        finally:
            if shown:
                shown.stop()
        yield auditor
    auditor.close()


@contextmanager
def _auditor(found: RunDirectory) -> Iterator[Auditor]:
    """An auditor of a run. Raises DataError when the data are not those that the run used."""
    from elastictrain.data import fingerprint_difference
    from elastictrain.data.audit import Auditor
    from elastictrain.data.kept import Beside
    from elastictrain.data.stages import open_stage

    job, stages, fingerprint = _record(found)
    sources = (found.read_data() or {}).get("sources", {})
    beside = Beside(found.data_folder, sources, stages[-1].data)

    def opened(stage: Stage) -> AnySource:
        source = open_stage(job, stage, [one for one in stages if one.index < stage.index], beside=beside)
        in_force = stage.data == stages[-1].data  # else it was compared with what the stage says
        changes = [] if fingerprint is None or not in_force else fingerprint_difference(
            fingerprint, source.fingerprint, ignoring=("lanes", "lane_batch_size")
        )  # fmt: skip
        if changes:
            source.close()
            raise DataError("the data are not those that the run has used:\n  " + "\n  ".join(changes[:10]))
        return source

    auditor = Auditor(stages, opened)
    try:
        yield auditor
    finally:
        auditor.close()


@contextmanager
def _opened(job: Job, stages: tuple[Stage, ...]) -> Iterator[AnySource]:
    from elastictrain.data.stages import open_stage

    source = open_stage(job, stages[-1], stages[:-1])
    try:
        yield source
    finally:
        source.close()


def _places(auditor: Auditor, step: int) -> dict[str, Any]:
    lanes = auditor.source(step)[0].lanes
    return {str(lane): _lane(auditor, step, lane, rows=False) for lane in range(lanes)}


def _lane(auditor: Auditor, step: int, lane: int, rows: bool) -> list[dict[str, Any]]:
    source, _ = auditor.source(step)
    found = []
    for place in auditor.locations(step, lane):
        record = asdict(place)
        if rows:
            for part, entry in zip(place.parts, record["parts"], strict=True):
                entry["rows"] = source.rows_of(part)
        for entry in record["parts"]:
            del entry["source"]  # that of the sample
        found.append(record)
    return found


def _print_lane(auditor: Auditor, step: int, lane: int, rows: bool, *, counts: bool) -> None:
    from elastictrain.data.audit import describe_location

    source, _ = auditor.source(step)
    for number, place in enumerate(auditor.locations(step, lane)):
        where = describe_location(place, source.rows_of if rows else None)
        typer.echo(f"  lane {lane}, sample {number}: epoch {place.epoch}, {where}{'' if counts else NOT_COUNTED}")


def _print_places(auditor: Auditor, at: AuditedStep) -> None:
    typer.echo(f"step {at.step}: {at.samples} samples, {'agrees' if at.agrees else 'DIFFERS'}")
    for lane in range(auditor.source(at.step)[0].lanes):
        _print_lane(auditor, at.step, lane, rows=False, counts=lane not in at.dropped)


def _print_verdict(verdict: Any, recorded: list[tuple[int, str | None]]) -> None:
    first, last = recorded[0][0], recorded[-1][0]
    typer.echo(f"steps {first} to {last}: {verdict.samples} samples, {verdict.repeated} of them twice in an epoch")
    agree = verdict.steps - len(verdict.differing) - verdict.unrecorded
    typer.echo(f"recorded and computed agree at {agree} of {verdict.steps} steps", nl=False)
    typer.echo(f"; {verdict.unrecorded} have no record" if verdict.unrecorded else "")
    if verdict.dropped:
        typer.echo(
            f"{verdict.dropped} lane(s) did not count (redundancy.lanes: drop_slowest), in steps "
            f"{_some(verdict.dropped_in)}: their samples were not used"
        )
    typer.echo(f"running hash of the sample ids after step {last}: {verdict.running}")


def _some(steps: Iterable[int]) -> str:
    listed = list(steps)
    return ", ".join(map(str, listed[:5])) + (f" and {len(listed) - 5} more" if len(listed) > 5 else "") or "none"
