"""The ranks that load together: what one of them says all hear, and what goes wrong on one of them is raised on all."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
import torch.distributed as dist
from numpy.typing import NDArray

from elastictrain_checkpoint import errors
from elastictrain_checkpoint.errors import CheckpointError, CorruptData, InvalidPiece, LoadFailed, StateMismatch
from elastictrain_checkpoint.host_exchange import HostExchange
from elastictrain_checkpoint.rounds import STATE_BYTES
from elastictrain_checkpoint.torch.exchange import gather_bytes, gather_objects, gather_pickled

Group = dist.ProcessGroup | Literal["world"] | None
WAITS_S = 30.0
"""A rank that waits so long for the others at the begin of a load warns: most likely they do not load."""
_ATTRIBUTES = {
    CorruptData: ("file", "block", "tensors"),
    StateMismatch: ("missing", "extra", "different"),
}


def group_of(group: Group) -> dist.ProcessGroup | None:
    """The group that is meant; None where it would be of one process only."""
    if group == "world":
        group = dist.group.WORLD if dist.is_available() and dist.is_initialized() else None
    return group if group is not None and dist.get_world_size(group) > 1 else None


class Ranks:
    """All ranks of a group, seen from one. Every method is a collective of the group.

    Attributes:
        through: memory that they share, if they do: what they say goes through it, and the group is left in peace.

    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)
        self.through: HostExchange | None = None

    def agree(self, value: Any, problem: Exception | None) -> list[Any]:
        """Everybody's value, in the order of the ranks.

        Raises:
            Exception: the problem of this rank, as it is; else that of the first rank that has one: of the same kind if
                it is an error of this library or of storage, else `LoadFailed`. The message names that rank.
            LoadFailed: a rank is gone, or has not come within the group's timeout.

        """
        try:
            said = self._gather((None if problem is not None else value, _packed(problem)))
        except (RuntimeError, ConnectionError, TimeoutError) as error:
            raise LoadFailed(f"the ranks cannot go on loading: {error}") from (problem or error)
        if problem is not None:
            raise problem
        for rank, (_, there) in enumerate(said):
            if there is not None:
                raise _unpacked(rank, there)
        return [value for value, _ in said]

    def _gather(self, value: Any) -> list[Any]:
        through = self.through
        if through is None or through.broken:
            return gather_objects(self.group, value)

        def gather(data: NDArray[np.uint8]) -> list[NDArray[np.uint8]]:
            if data.nbytes * self.size > through.room_bytes:  # equally long everywhere
                return gather_bytes(self.group, data)
            came = through([[data]] * self.size, [data.nbytes] * self.size)
            return [np.frombuffer(one, dtype=np.uint8) for one in came]

        return gather_pickled(value, gather, STATE_BYTES)

    def same(self, called: str, value: Any, problem: Exception | None) -> list[Any]:
        """As `agree`; how a function was called must be equal everywhere.

        Raises:
            InvalidPiece: on every rank, where it is not.

        """
        said = self.agree((called, value), problem)
        first = said[0][0]
        for rank, (there, _) in enumerate(said):
            if there != first:
                raise InvalidPiece(f"rank {rank} loads with {there}, rank 0 with {first}; expected the same everywhere")
        return [value for _, value in said]

    def from_first(self, value: Any) -> Any:
        """What rank 0 has."""
        told = [value]
        try:
            dist.broadcast_object_list(told, group=self.group, group_src=0)
        except RuntimeError as error:
            raise LoadFailed(f"the ranks cannot go on loading: {error}") from error
        return told[0]

    @contextmanager
    def patient(self, who: str) -> Iterator[None]:
        """Warn if the others do not come for long."""
        words = (
            f"rank {self.rank} has waited {WAITS_S:g} s for the other ranks in {who}, which is a collective of its "
            "group; where not all ranks call it, pass group=None"
        )
        timer = threading.Timer(WAITS_S, lambda: warnings.warn(words, RuntimeWarning, stacklevel=1))
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()


def _packed(problem: Exception | None) -> tuple[str, str, dict[str, Any]] | None:
    """An error for others: only text and plain facts, because not every exception survives its way."""
    if problem is None:
        return None
    more = {
        name: getattr(problem, name) for kind in _ATTRIBUTES if isinstance(problem, kind) for name in _ATTRIBUTES[kind]
    }
    if isinstance(problem, CheckpointError):
        return type(problem).__name__, str(problem), more
    return ("OSError" if isinstance(problem, OSError) else ""), f"{type(problem).__name__}: {problem}", more


def _unpacked(rank: int, packed: tuple[str, str, dict[str, Any]]) -> Exception:
    name, text, more = packed
    text = f"rank {rank}: {text}"
    if name == "OSError":
        return OSError(text)
    kind = getattr(errors, name, None) if name else None
    return LoadFailed(text) if kind is None else kind(text, **more)
