"""The first pass: one part of the input into runs."""

from __future__ import annotations

import json
import platform
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from elastictrain.data.columns import as_pairs, show_schema
from elastictrain.data.index import NEVER_A_HOLE
from elastictrain.data.preparing.inputs import InputIndex, Inputs
from elastictrain.data.preparing.plan import Plan
from elastictrain.data.preparing.rows import Words, slot_edges, sorted_rows
from elastictrain.data.preparing.runs import run_content
from elastictrain.data.preparing.transform import KEY, PLACE, TWIN, Transform
from elastictrain.errors import ClusterError, DataError
from elastictrain.prepare_settings import Preparation
from elastictrain_checkpoint.store import Store

WORK = "_work"
TRIES = 4
"""How often a unit is begun before it is given up. Ray begins anew whatever died, and what takes more memory than there
is dies every time.
"""
HELPERS = (KEY, TWIN, PLACE)


@dataclass(frozen=True)
class Work:
    """All that a task needs, whichever part or file it makes. `functions`: what `map` and `filter` name."""

    settings: Preparation
    plan: Plan
    index: InputIndex
    functions: Mapping[str, Any]

    def check(self) -> None:
        """Raise ClusterError where this process would write other bytes than the one that has made the plan."""
        if pa.__version__ != self.plan.pyarrow:
            raise ClusterError(
                f"{platform.node()} has pyarrow {pa.__version__}, and the preparation was begun with "
                f"{self.plan.pyarrow}, so its files might have other bytes. Install the same version on all nodes, and "
                "go on with --resume"
            )

    def store(self) -> Store:
        """The folder that is written."""
        return Store(self.settings.out, storage_options=self.settings.out_options)


class PartMaker:
    """Makes parts, one after the other; opens the input and loads tokenizer and functions once."""

    def __init__(self, work: Work) -> None:
        work.check()
        self._work, self._store = work, work.store()
        self._inputs = Inputs(work.settings, work.index)
        self._transform = Transform(work.settings, work.functions, work.plan.blocks)

    def make(self, number: int) -> dict[str, Any]:
        """Write a part's runs and its record, and return the record. Raises DataError that names file and row.

        The record is created once, and names the runs that it belongs to; so a part that is made twice, even by two
        tasks at the same time, is there once.
        """
        begin_unit(self._store, "part", number)
        collected = _Collected(self._work, self._store, number)
        for block in range(*self._work.plan.parts[number]):
            try:
                rows = self._inputs.read(block)
            except NEVER_A_HOLE:
                raise
            except DataError as error:
                if self._work.settings.on_corrupt != "skip":
                    raise
                name, within = self._inputs.name(block)
                collected.holes.append([name, within, str(error)])
                continue
            where = self._inputs.where(block)
            for batch in self._transform.batches(block, rows, where):
                collected.read += batch.read
                collected.filtered += batch.filtered
                collected.add(batch.table, where)
                if batch.near is not None:
                    collected.add_bands(*batch.near)
        collected.flush()
        collected.flush_bands()
        return published(self._store, record_path("part", number), collected.record())

    def close(self) -> None:
        """Close all files."""
        self._inputs.close()


class _Collected:
    """The rows of a part, in memory until they are worth a run."""

    def __init__(self, work: Work, store: Store, number: int) -> None:
        self._work, self._store, self._number = work, store, number
        self._tables: list[pa.Table] = []
        self._bytes = 0
        self._schema: pa.Schema | None = None
        self._slot_bytes = np.zeros(work.plan.slots, dtype=np.int64)
        self._runs: list[str] = []
        self._bands: list[tuple[Words, Words]] = []
        self._band_bytes = 0
        self._near_runs: list[str] = []
        self.read = self.filtered = self._duplicates = 0
        self.holes: list[list[Any]] = []

    def add(self, table: pa.Table, where: str) -> None:
        table = table.replace_schema_metadata()
        if self._schema is None:
            self._schema = table.schema
        table = _as_before(table, self._schema, where)
        if table.num_rows:
            self._tables.append(table)
            self._bytes += table.nbytes
        if self._bytes >= self._work.settings.part_bytes:
            self.flush()

    def flush(self) -> None:
        if not self._tables:
            return
        table = pa.concat_tables(self._tables).combine_chunks()
        self._tables, self._bytes = [], 0
        keys, places = (np.asarray(table.column(name)) for name in (KEY, PLACE))
        twins = np.asarray(table.column(TWIN)) if TWIN in table.column_names else None
        order, duplicates = sorted_rows(keys, twins, places)
        self._duplicates += duplicates
        edges = slot_edges(keys[order], self._work.plan.slots)
        blocks, slot_bytes = run_content(table, order, edges, without=HELPERS)
        path = f"{WORK}/part-{self._number:06d}-{uuid.uuid4().hex}.run"
        self._store.create(path, blocks)
        self._runs.append(path)
        self._slot_bytes += slot_bytes

    def add_bands(self, keys: Words, places: Words) -> None:
        """`keys`: of the bands of documents, shape [documents, bands]."""
        self._bands.append((keys.ravel(), np.repeat(places, keys.shape[1])))
        self._band_bytes += 2 * keys.nbytes
        if self._band_bytes >= self._work.settings.part_bytes:
            self.flush_bands()

    def flush_bands(self) -> None:
        if not self._bands:
            return
        keys, places = (np.concatenate(arrays) for arrays in zip(*self._bands, strict=True))
        self._bands, self._band_bytes = [], 0
        order = np.lexsort((places, keys)).astype(np.int64)
        edges = slot_edges(keys[order], self._work.plan.slots)
        blocks, _ = run_content(pa.table({KEY: keys, PLACE: places}), order, edges)
        path = f"{WORK}/part-{self._number:06d}-{uuid.uuid4().hex}.near"
        self._store.create(path, blocks)
        self._near_runs.append(path)

    def record(self) -> dict[str, Any]:
        near = {"near_runs": self._near_runs} if self._work.settings.near_duplicates else {}
        schema = self._schema.serialize().to_pybytes().hex() if self._schema is not None else None
        counts = {"read": self.read, "filtered": self.filtered, "duplicates": self._duplicates}
        return {"part": self._number, "schema": schema, "runs": self._runs, "holes": self.holes, **counts, **near,
                "slot_bytes": self._slot_bytes.tolist()}  # fmt: skip


def _as_before(table: pa.Table, schema: pa.Schema, where: str) -> pa.Table:
    """The table with the columns of the rows before; a column of nulls alone takes any type. Raises DataError."""
    same = table.column_names == schema.names and all(
        kind in (expected, pa.null()) for kind, expected in zip(table.schema.types, schema.types, strict=True)
    )
    if not same:
        raise types_differ(where, table.schema, schema)
    return table.cast(schema)


def types_differ(where: str, got: pa.Schema, expected: pa.Schema) -> DataError:
    """Of what `map` returned here and before."""
    before, now = (show_schema(pair for pair in as_pairs(one) if pair[0] not in HELPERS) for one in (expected, got))
    return DataError(
        f"{where}: the columns are not those of the rows before: got {now}; expected {before}. map must "
        "return the same columns and types for all rows"
    )


def begin_unit(store: Store, what: str, number: int) -> None:
    """Take note that a unit is begun. Raises ClusterError if it was begun too often, and never ended."""
    for attempt in range(TRIES):
        try:
            return store.publish(f"{WORK}/try-{what}-{number:06d}-{attempt}", b"begun")
        except FileExistsError:
            continue
    raise ClusterError(
        f"{what} {number} was begun {TRIES} times, and each time its process died. If memory ran out, lower "
        "part_bytes, file_bytes or workers in a new folder; else look at the node's logs. Go on with --resume"
    )


def record_path(what: str, number: int) -> str:
    """Return where the record of a part or file lies."""
    return f"{WORK}/{what}-{number:06d}.json"


def published(store: Store, path: str, record: dict[str, Any]) -> dict[str, Any]:
    """Create a record once; return the one that counts, which may be another task's."""
    try:
        store.publish(path, json.dumps(record, separators=(",", ":")).encode())
    except FileExistsError:
        found: dict[str, Any] = json.loads(store.read_all(path))
        return found
    return record
