"""What network libraries raise past fsspec, as errors of the operating system: callers know of no others.

An fsspec file system translates the answers of its store, but not all failures to get one: botocore's
EndpointConnectionError and NoCredentialsError, for instance, derive from Exception alone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

_PACKAGES = frozenset({"aiobotocore", "aiohttp", "azure", "botocore", "gcsfs", "google", "requests", "urllib3"})
"""Top packages whose exceptions come from asking a store."""
_REFUSALS = frozenset({"CredentialRetrievalError", "NoCredentialsError", "PartialCredentialsError"})
_BY_STATUS: dict[Any, type[OSError]] = {
    401: PermissionError, 403: PermissionError, 404: FileNotFoundError, 410: FileNotFoundError,
}  # fmt: skip


def os_error_of(error: Exception) -> OSError | None:
    """`error`, raised while a store was asked, as an OSError; None where it is one, or is about something else."""
    kind = type(error)
    if isinstance(error, OSError) or kind.__module__.partition(".")[0] not in _PACKAGES:
        return None
    said, status = f"{kind.__name__}: {error}", getattr(error, "status", None)
    if kind.__name__ in _REFUSALS:
        return PermissionError(said)
    return _BY_STATUS.get(status, OSError)(said)


@contextlib.contextmanager
def errors_of_the_system() -> Iterator[None]:
    """Whatever a network library raises in here is raised as an OSError, with the cause chained. Also a decorator."""
    try:
        yield
    except Exception as error:
        translated = os_error_of(error)
        if translated is None:
            raise
        raise translated from error
