"""The record of a live source's order: which segments are part of it from which step on, written down once.

    <record>/order.json        what the order depends on besides: manifest, seed, lanes, format
    <record>/eras/0000000000.json … one `Era` each (see `data.live_order`)

Eras are created exactly once, so of all processes that want to say what comes next one is heard, and all read the same:
that is the agreement between workers, and nobody leads. An era is durable before anybody uses a step of it, and never
changes. So whoever comes back to a step, after a kill or from an older checkpoint, finds the same samples.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from elastictrain.data.live_order import Era
from elastictrain.data.retry import Retry
from elastictrain.data.segments import check_exclusive, count_records, open_folder
from elastictrain.errors import DataError, StoreFailed


class OrderRecord:
    """`header`: what the order depends on; one that was made with another is refused.

    Raises DataError: it is of another order, or the store fails for longer than `retry` allows.
    """

    def __init__(
        self, url: str, header: Mapping[str, Any], *, storage_options: Mapping[str, Any] | None, retry: Retry
    ) -> None:
        self.url, self._retry = url.rstrip("/"), retry
        self._store = open_folder(self.url, storage_options or {}, "data.live.record")
        self._header = _dump({"v": 1, **header})
        self._is_ours = self._has_our_header()  # looking alone writes nothing
        self._is_checked = False

    def get(self, number: int) -> Era | None:
        """The era with this number; None when it is not decided yet. One request."""
        data = self._read(_path(number))
        if data is None:
            return None
        self._is_ours = self._is_ours or self._has_our_header()  # somebody has begun an order since we looked
        try:
            era = Era.from_json(json.loads(data))
        except (ValueError, AttributeError, DataError) as error:
            raise DataError(
                f"{self.url}/{_path(number)}: {error}. It cannot be made again: restore the file"
            ) from error
        if era.number != number:
            raise DataError(f"{self.url}/{_path(number)}: holds era {era.number}. Restore the file")
        return era

    def decide(self, era: Era) -> Era:
        """Make `era` what comes next, unless somebody has been quicker; returns what is recorded."""
        if not self._is_checked:
            self._check_store()
        if not self._is_ours:
            self._is_ours = self._publish("order.json", self._header) or self._has_our_header()
        data = _dump(era.as_json())
        if self._publish(_path(era.number), data):
            return era
        there = self.get(era.number)
        if there is None:
            raise DataError(f"{self.url}/{_path(era.number)}: exists and cannot be read. Look at the store")
        return there

    def _check_store(self) -> None:
        try:
            check_exclusive(self._store, "eras", self._retry, "data.live.record (or checkpoint.path)")
        except OSError as error:
            raise self._not_written("eras", error) from error
        self._is_checked = True

    def _has_our_header(self) -> bool:
        """False when there is none. Raises DataError when it is that of another order."""
        there = self._read("order.json")
        if there is not None and there != self._header:
            raise DataError(f"{self.url}: {_difference(there, self._header)}")
        return there is not None

    def last(self) -> Era | None:
        """The newest era. Takes a number of requests that grows with the logarithm of theirs."""
        count = count_records(self._is_there)
        return self.get(count - 1) if count else None

    def _is_there(self, number: int) -> bool:
        path = _path(number)
        try:
            return self._retry.call(lambda: self._store.size(path), f"{self.url}/{path}") is not None
        except OSError as error:
            raise self._not_read(path, error) from error

    def _read(self, path: str) -> bytes | None:
        try:
            return self._retry.call(lambda: self._store.read_all(path), f"{self.url}/{path}")
        except FileNotFoundError:
            return None
        except OSError as error:
            raise self._not_read(path, error) from error

    def _not_read(self, path: str, error: OSError) -> StoreFailed:
        return StoreFailed(f"{self.url}/{path}: cannot be read ({error}). Look at the store behind data.live.record")

    def _publish(self, path: str, data: bytes) -> bool:
        """False when there is one already."""
        try:
            self._retry.call(lambda: self._store.publish(path, data), f"{self.url}/{path}")
        except FileExistsError:
            return False
        except OSError as error:
            raise self._not_written(path, error) from error
        return True

    def _not_written(self, path: str, error: OSError) -> DataError:
        return DataError(
            f"{self.url}/{path}: cannot be written ({error}). Set data.live.record to a folder that all workers can "
            "write to"
        )


def _path(number: int) -> str:
    return f"eras/{number:010d}.json"


def _dump(record: Mapping[str, Any]) -> bytes:
    return (json.dumps(record, sort_keys=True, separators=(",", ":")) + "\n").encode()


def _difference(there: bytes, wanted: bytes) -> str:
    try:
        old, new = json.loads(there), json.loads(wanted)
    except ValueError as error:
        return f"not the record of an order ({error})"
    differing = [f"{name} was {old.get(name)} and is now {new.get(name)}" for name in sorted({*old, *new})
                 if old.get(name) != new.get(name)]  # fmt: skip
    return (
        f"the order that is recorded here belongs to another run: {'; '.join(differing)}. Go on with that run as it "
        "was, or set data.live.record (or checkpoint.path) to an empty folder"
    )
