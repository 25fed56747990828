"""Ray calls that are under way, and what is to be done with their results. Nobody waits for a single one of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import ray

from elastictrain_actors.driver import Heard

Then = Callable[[Any], Sequence[Heard] | None]
Failed = Callable[[Exception], Sequence[Heard] | None]


@dataclass(frozen=True, slots=True)
class _Call:
    key: object
    then: Then
    failed: Failed


class Calls:
    """Used from one thread. `key`: whose call it is; `forget` drops all of that key."""

    def __init__(self) -> None:
        self._pending: dict[Any, _Call] = {}

    def add(self, reference: Any, key: object, then: Then, failed: Failed) -> None:
        """When `reference` is there, call `then` with its result, or `failed` with its error."""
        self._pending[reference] = _Call(key, then, failed)

    def forget(self, key: object) -> None:
        self._pending = {reference: call for reference, call in self._pending.items() if call.key != key}

    def take(self, timeout_s: float) -> list[Heard]:
        """Wait up to `timeout_s` for the first result and act on all that are there."""
        if not self._pending:
            time.sleep(timeout_s)  # nobody is there whom we could wait for
            return []
        ready, _ = ray.wait(list(self._pending), num_returns=1, timeout=timeout_s)
        if ready:  # whatever else is there, in one turn
            ready, _ = ray.wait(list(self._pending), num_returns=len(self._pending), timeout=0)
        found: list[Heard] = []
        for reference in ready:
            call = self._pending.pop(reference, None)
            if call is not None:  # else forgotten by what another result led to
                found += self._act(reference, call)
        return found

    def _act(self, reference: Any, call: _Call) -> Sequence[Heard]:
        try:
            result = ray.get(reference)
        except Exception as error:
            return call.failed(error) or ()
        return call.then(result) or ()
