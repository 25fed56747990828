"""A store on which everything can be tried and nothing is done."""

from __future__ import annotations

from collections.abc import Iterable

from elastictrain_checkpoint.store import Store


class Rehearsal(Store):
    """Reads what another store holds; removes and writes nothing, and remembers what would have gone.

    Attributes:
        removed: paths, in order.

    """

    def __init__(self, store: Store) -> None:
        super().__init__(store.url, backend=store._backend)
        self.removed: list[str] = []

    def remove(self, path: str) -> None:
        """Remember the path."""
        self.removed.append(path)

    def create(self, path: str, blocks: Iterable[memoryview]) -> int:  # noqa: ARG002
        """Refused."""
        raise _refused(path)

    def publish(self, path: str, data: bytes) -> None:  # noqa: ARG002
        """Refused."""
        raise _refused(path)

    def put(self, path: str, data: bytes) -> None:  # noqa: ARG002
        """Refused."""
        raise _refused(path)

    def replace(self, path: str, blocks: Iterable[memoryview]) -> int:  # noqa: ARG002
        """Refused."""
        raise _refused(path)


def _refused(path: str) -> PermissionError:
    return PermissionError(f"{path}: nothing is written in a rehearsal")
