"""Which units of a preparation are to be done, in which order, and what is written when all are. Knows no Ray.

A preparation is whatever its records say. `_work/plan.json` is created first; `_work/part-N.json` when a part's runs
are there, `_work/file-N.json` when a file is, and `_index.json` last; each exactly once. Whoever takes it up looks
which records there are and does the rest.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from elastictrain.data.index import Progress
from elastictrain.data.preparing.announce import Announcer
from elastictrain.data.preparing.functions import find_function, hash_of_file
from elastictrain.data.preparing.inputs import open_input
from elastictrain.data.preparing.near import cut_slots
from elastictrain.data.preparing.output import FileMaker
from elastictrain.data.preparing.pairs import GONE, PairMaker, is_whole, read_words, settle
from elastictrain.data.preparing.part import WORK, PartMaker, Work, published, record_path, types_differ
from elastictrain.data.preparing.plan import Plan, Range, count_slots, cut_parts, group_slots, plan_differences
from elastictrain.data.preparing.summary import index_of
from elastictrain.data.tokenizers import Tokenizer, load_tokenizer, tokens_record
from elastictrain.errors import ConfigError, DataError
from elastictrain.prepare_settings import Preparation
from elastictrain_checkpoint.store import Store

INDEX, TOKENIZER, PLAN = "_index.json", "_tokenizer.json", f"{WORK}/plan.json"


class Maker(Protocol):
    """Makes units of one kind."""

    def make(self, number: int) -> dict[str, Any]: ...

    def close(self) -> None: ...


Execute = Callable[[Callable[[], Maker], Sequence[int]], Iterable[dict[str, Any]]]
"""Carries out units: `execute(new_maker, numbers)` yields the record of each, in any order. `new_maker` may be called
in other processes; what a unit raises is raised.
"""


def in_this_process(new_maker: Callable[[], Maker], numbers: Sequence[int]) -> Iterator[dict[str, Any]]:
    """The plainest `Execute`: one unit after the other, here."""
    maker = new_maker()
    try:
        for number in numbers:
            yield maker.make(number)
    finally:
        maker.close()


class NewPartMaker:
    """Opens a maker of parts; travels between processes."""

    def __init__(self, work: Work) -> None:
        self.work = work

    def __call__(self) -> Maker:
        return PartMaker(self.work)


class NewFileMaker:
    """Opens a maker of files; travels between processes."""

    def __init__(
        self, work: Work, runs: Sequence[str], files: Sequence[Range], schema: pa.Schema, gone: dict[str, Any] | None
    ) -> None:
        """`gone`: the record of the places that are left out."""
        self.work, self.runs, self.files, self.schema, self.gone = work, tuple(runs), tuple(files), schema, gone

    def __call__(self) -> Maker:
        gone = None if self.gone is None else read_words(self.work.store(), self.gone)
        return FileMaker(self.work, self.runs, self.files, self.schema, gone)


class NewPairMaker:
    """Opens a maker of pairs; travels between processes."""

    def __init__(self, work: Work, runs: Sequence[str], ranges: Sequence[Range]) -> None:
        self.work, self.runs, self.ranges = work, tuple(runs), tuple(ranges)

    def __call__(self) -> Maker:
        return PairMaker(self.work, self.runs, self.ranges)


def prepare_data(
    settings: Preparation,
    execute: Execute = in_this_process,
    *,
    resume: bool = False,
    progress: Progress | None = None,
    finished: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Prepare data and return the index, which is also written as `_index.json`.

    `resume`: go on with what was begun in `settings.out` (or begin, if nothing was); what is there must be of the same
    plan. `finished` is called with the record of every file, in their order, as soon as all before it are there too.

    Raises ConfigError (settings, functions, `out` is in use) and DataError (what is read, what functions do with it).
    """
    store = Store(settings.out, storage_options=settings.out_options)
    names = {name: getattr(settings, name) for name in ("map", "filter")}
    functions = {name: find_function(name, reference) for name, reference in names.items() if reference is not None}
    tokenizer = None if settings.tokenizer is None else load_tokenizer(settings.tokenizer, settings.storage_options)
    index = open_input(settings, progress)
    plan = make_plan(settings, index.files, index, functions, tokenizer)
    done = _begin(store, plan, resume=resume)
    if done is not None:
        if settings.segments:  # it may have been finished without
            late = Announcer(settings)
            for record in done["files"]:
                late.file(record)
            late.close()
        _remove_work(store)
        return done
    if tokenizer is not None:
        published(store, TOKENIZER, tokens_record(tokenizer))
    for name in store.list(WORK):  # who takes it up tries again
        if name.startswith("try-"):
            store.remove(f"{WORK}/{name}")
    work = Work(settings, plan, index, functions)
    parts = _parts(store, work, execute, progress)
    schema = _schema_of(parts)
    slot_bytes = sum((np.asarray(part["slot_bytes"], dtype=np.int64) for part in parts), np.zeros(plan.slots, np.int64))
    files = group_slots(slot_bytes, settings.file_bytes)
    if schema is None or not files:
        raise DataError(
            f"no row is left of the {sum(part['read'] for part in parts)} that were read; look at map and filter, or "
            "at path"
        )
    runs = [run for part in parts for run in part["runs"]]
    gone = _gone(store, work, parts, execute, progress) if settings.near_duplicates else None
    maker = NewFileMaker(work, runs, files, schema, gone)
    announcer = Announcer(settings) if settings.segments else None

    def tell(record: dict[str, Any]) -> None:
        if not record["rows"]:
            return
        if announcer is not None:
            announcer.file(record)
        if finished is not None:
            finished(record)

    written = _files(store, maker, execute, progress, tell)
    if announcer is not None:
        announcer.close()
    found = index_of(plan, index, parts, written, tokenizer)
    found = published(store, INDEX, found)
    _remove_work(store)
    return found


def make_plan(
    settings: Preparation, files: Any, index: Any, functions: dict[str, Any], tokenizer: Tokenizer | None
) -> Plan:
    """Make the plan of a preparation."""
    return Plan(
        settings=settings.identity,
        functions={name: hash_of_file(function) for name, function in functions.items()},
        tokenizer=tokenizer.fingerprint if tokenizer else None,
        files=tuple((file.name, file.size_bytes, file.version) for file in files.files),
        schema=tuple((field.name, str(field.type)) for field in index.schema),
        blocks=len(index.table),
        parts=cut_parts(index.block_bytes, settings.part_bytes),
        slots=count_slots(int(index.block_bytes.sum()), settings.file_bytes),
        pyarrow=pa.__version__,
    )


def _begin(store: Store, plan: Plan, *, resume: bool) -> dict[str, Any] | None:
    """Write the plan, or compare it with the one that is there; the index if all is done already."""
    wanted = plan.as_json()
    there = store.list()
    old = _read(store, PLAN)
    finished = _read(store, INDEX)
    if old is None and finished is None:
        strangers = [name for name in there if not name.startswith(("_", "."))]
        if strangers:
            raise ConfigError(
                f"out={store.url!r}: the folder holds something else ({', '.join(strangers[:3])}), which would be "
                "trained on too. Name a folder that is empty or new"
            )
        old = published(store, PLAN, wanted)
    elif not resume:
        what = "a finished" if finished is not None else "an unfinished"
        hint = "choose another folder" if finished is not None else "finish it with --resume, or choose another folder"
        raise ConfigError(f"out={store.url!r}: there is {what} preparation in it; {hint}")
    begun = finished["plan"] if finished is not None else old or {}
    differences = plan_differences(begun, wanted, is_done=finished is not None)
    if differences:
        raise ConfigError(
            f"out={store.url!r}: what is there was prepared in another way, so it cannot be gone on with:\n  "
            + "\n  ".join(differences)
            + "\nPut that back, or choose another folder"
        )
    return finished


def _parts(store: Store, work: Work, execute: Execute, progress: Progress | None) -> list[dict[str, Any]]:
    count = len(work.plan.parts)
    there = set(store.list(WORK))
    records: dict[int, dict[str, Any]] = {}
    for number in range(count):
        record = _record(store, there, "part", number)
        if record is None:
            continue
        if all(run.rpartition("/")[2] in there for run in [*record["runs"], *record.get("near_runs", ())]):
            records[number] = record
        else:
            store.remove(record_path("part", number))
    todo = [number for number in range(count) if number not in records]
    for record in _executed(execute, NewPartMaker(work), todo, count, "preparing parts", progress):
        records[record["part"]] = record
    return [records[number] for number in range(count)]


def _gone(
    store: Store, work: Work, parts: list[dict[str, Any]], execute: Execute, progress: Progress | None
) -> dict[str, Any]:
    """The record of the documents that go because one before them is nearly the same."""
    done = _read(store, GONE)
    if done is not None and is_whole(store, done):
        return done
    if done is not None:
        store.remove(GONE)
    ranges = cut_slots(work.plan.slots, len(parts))
    there = set(store.list(WORK))
    records: dict[int, dict[str, Any]] = {}
    for number in range(len(ranges)):
        record = _record(store, there, "pairs", number)
        if record is not None and is_whole(store, record):
            records[number] = record
        elif record is not None:
            store.remove(record_path("pairs", number))
    todo = [number for number in range(len(ranges)) if number not in records]
    maker = NewPairMaker(work, [run for part in parts for run in part["near_runs"]], ranges)
    for record in _executed(execute, maker, todo, len(ranges), "finding near-duplicates", progress):
        records[record["pairs"]] = record
    return settle(store, [records[number] for number in range(len(ranges))])


def _files(
    store: Store,
    maker: NewFileMaker,
    execute: Execute,
    progress: Progress | None,
    finished: Callable[[dict[str, Any]], None],
) -> list[dict[str, Any]]:
    count = len(maker.files)
    there = set(store.list(WORK))
    records: dict[int, dict[str, Any]] = {}
    for number in range(count):
        record = _record(store, there, "file", number)
        if record is not None and (store.size(record["name"]) or 0) == record["bytes"]:
            records[number] = record
        elif record is not None:
            store.remove(record_path("file", number))
    todo = [number for number in range(count) if number not in records]
    told = 0
    made = _executed(execute, maker, todo, count, "writing files", progress)
    while True:
        while told in records:
            finished(records[told])
            told += 1
        record = next(made, None)
        if record is None:
            return [records[number] for number in range(count)]
        records[record["file"]] = record


def _executed(
    execute: Execute, maker: Callable[[], Maker], todo: list[int], count: int, what: str, progress: Progress | None
) -> Iterator[dict[str, Any]]:
    done = count - len(todo)
    if progress:
        progress(what, done, count)
    for record in execute(maker, todo) if todo else ():
        done += 1
        if progress:
            progress(what, done, count)
        yield record


def _schema_of(parts: list[dict[str, Any]]) -> pa.Schema | None:
    """The columns of all runs. Raises DataError if parts differ: only `map` can do that."""
    schema: pa.Schema | None = None
    for part in parts:
        if part["schema"] is None:
            continue
        found = pa.ipc.read_schema(pa.py_buffer(bytes.fromhex(part["schema"])))
        if schema is not None and found != schema:
            raise types_differ(f"part {part['part']} of the input", found, schema)
        schema = schema or found
    return schema


def _record(store: Store, there: set[str], what: str, number: int) -> dict[str, Any] | None:
    path = record_path(what, number)
    return _read(store, path) if path.rpartition("/")[2] in there else None


def _read(store: Store, path: str) -> dict[str, Any] | None:
    try:
        found = json.loads(store.read_all(path))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise DataError(f"{store.url}/{path}: damaged ({error}); remove it and go on with --resume") from error
    if not isinstance(found, dict):
        raise DataError(f"{store.url}/{path}: damaged (no object); remove it and go on with --resume")
    return found


def _remove_work(store: Store) -> None:
    for name in store.list(WORK):
        if name != PLAN.rpartition("/")[2]:
            store.remove(f"{WORK}/{name}")
    store.remove(PLAN)  # last: what is left of a removal that is interrupted belongs to this plan
    store.remove(WORK)
