"""The user's functions: found by name, called on batches, and their errors put into words that name the row."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from elastictrain.errors import ConfigError, DataError
from elastictrain.user_files import NotLoaded, load_file

Function = Callable[[pa.Table], Any]


def find_function(setting: str, reference: str) -> Any:
    """Return what `module:function` or `file.py:function` names. Raises ConfigError."""
    source, _, name = reference.rpartition(":")
    module = _load_file(setting, Path(source)) if source.endswith(".py") else _import(setting, source)
    found: Any = module
    for part in name.split("."):
        if not hasattr(found, part):
            raise ConfigError(f"{setting}={reference!r}: {source} has no {name!r}")
        found = getattr(found, part)
    if not callable(found):
        raise ConfigError(f"{setting}={reference!r}: got a {type(found).__name__}; expected a function or a class")
    return found


def hash_of_file(found: Any) -> str:
    """Return the SHA-256 of the file that a function or class is written in; "" where there is none."""
    module = sys.modules.get(getattr(found, "__module__", ""))
    file = getattr(module, "__file__", None)
    return hashlib.sha256(Path(file).read_bytes()).hexdigest() if file and Path(file).is_file() else ""


def made(setting: str, found: Any) -> Function:
    """Return the function itself, or an object of the class, made once in every process. Raises ConfigError."""
    if not isinstance(found, type):
        return found  # type: ignore[no-any-return]
    try:
        return found()  # type: ignore[no-any-return]
    except Exception as error:
        raise ConfigError(f"{setting}: {found.__name__}() failed: {type(error).__name__}: {error}") from error


def call(setting: str, function: Function, rows: pa.Table, where: str, first: int) -> Any:
    """Call a user's function on rows that begin with number `first`. Raises DataError that names the row."""
    try:
        return function(rows)
    except Exception as error:
        row = _culprit(function, rows)
        place = f"row {first + row}" if row is not None else f"rows {first} to {first + rows.num_rows - 1} together"
        raise DataError(
            f"{where}, {place}: {setting} failed: {type(error).__name__}: {error}. Let the function deal with it, or "
            "take the row out"
        ) from error


def mapped(function: Function, rows: pa.Table, where: str, first: int) -> pa.Table:
    """Return what `map` makes of rows. Raises DataError."""
    found = call("map", function, rows, where, first)
    if isinstance(found, pa.RecordBatch):
        found = pa.Table.from_batches([found])
    if not isinstance(found, pa.Table):
        raise DataError(f"{where}: map returned a {type(found).__name__}; expected a pyarrow.Table")
    return found


def kept(function: Function, rows: pa.Table, where: str, first: int) -> pa.Array:
    """Return which rows stay, as `filter` says; a null is a no. Raises DataError."""
    found = call("filter", function, rows, where, first)
    if isinstance(found, pa.ChunkedArray):
        found = found.combine_chunks()
    try:
        mask = found if isinstance(found, pa.Array) else pa.array(np.asarray(found))
    except (pa.ArrowException, TypeError, ValueError) as error:
        raise DataError(f"{where}: filter returned {type(found).__name__}, which is no array ({error})") from error
    if not pa.types.is_boolean(mask.type) or len(mask) != rows.num_rows:
        raise DataError(
            f"{where}: filter returned {len(mask)} values of type {mask.type} for {rows.num_rows} rows; expected a "
            "boolean for each row"
        )
    return pc.fill_null(mask, False)


def _culprit(function: Function, rows: pa.Table) -> int | None:
    """The first row that fails alone; None if each one works."""
    for row in range(rows.num_rows):
        try:
            function(rows.slice(row, 1))
        except Exception:
            return row
    return None


def _import(setting: str, module: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except Exception as error:  # it is the user's code: it may raise anything
        raise ConfigError(
            f"{setting}: {module!r} does not import: {type(error).__name__}: {error}; expected a module on the Python "
            f"path or a file, as in {setting}: path/to/functions.py:name"
        ) from error


def _load_file(setting: str, path: Path) -> ModuleType:
    try:
        return load_file(path, "prepare")
    except NotLoaded as error:
        raise ConfigError(f"{setting}{': ' + str(path) if error.__cause__ else ''}{error}") from error.__cause__
