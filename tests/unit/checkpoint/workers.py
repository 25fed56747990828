"""Workers of a job as threads of the test, which meet as processes would."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from elastictrain_checkpoint.errors import CorruptData


class Workers:
    """So many threads, a barrier and a gathering between them."""

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self.barrier = threading.Barrier(workers, timeout=30)
        self._values: list[Any] = [None] * workers

    def gather(self, worker: int) -> Callable[[Any], list[Any]]:
        """Everybody's object for everybody, as one worker calls for it."""

        def call(value: Any) -> list[Any]:
            self._values[worker] = value
            self.barrier.wait()
            found = list(self._values)
            self.barrier.wait()
            return found

        return call

    def run(self, work: Callable[[int], Any]) -> list[Any]:
        """What each worker's call has given, or raised. An error ends the waiting of the others, unless it is damage,
        which all of them are to learn of at the end.
        """
        found: list[Any] = [None] * self.workers

        def one(worker: int) -> None:
            try:
                found[worker] = work(worker)
            except BaseException as error:
                found[worker] = error
                if not isinstance(error, CorruptData):
                    self.barrier.abort()

        threads = [threading.Thread(target=one, args=(worker,)) for worker in range(self.workers)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return found
