"""What an export that fails has written so far goes again, so that it can be made anew, of another step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

from elastictrain_checkpoint.store import Store


@contextmanager
def removing(store: Store, made: Sequence[str]) -> Iterator[None]:
    """Remove these files, all of the caller's own making, if what is done in here fails."""
    try:
        yield
    except BaseException:
        for file in made:
            with suppress(OSError):
                store.remove(file)
        raise
