"""A manifest on its way from the one that has read it to those that need it too: they believe it no more than storage.

Of a job that restores together one worker reads the manifest, and what lies beside it, and hands both on: so storage is
asked once, and all plan from the same text even while a step is being replaced.
"""

from __future__ import annotations

from elastictrain_checkpoint.errors import InvalidManifest
from elastictrain_checkpoint.manifest import Manifest, parse_manifest
from elastictrain_checkpoint.sidecar import CHUNKS, check_sidecar, sidecar_path
from elastictrain_checkpoint.store import Store

_SIZE_BYTES = 8


def pack_documents(store: Store, manifest: Manifest) -> bytes:
    """The manifest's text and its chunk table, if that lies in a file of its own, as one message.

    Raises:
        FileNotFoundError, OSError: the table cannot be read.
        InvalidManifest: it is damaged in this store.

    """
    table = b""
    if manifest.chunks:
        path = sidecar_path(CHUNKS, manifest.step, manifest.chunks)
        try:
            table = check_sidecar(manifest.chunks, store.read_all(path))
        except ValueError as error:
            raise InvalidManifest(f"{store.url}/{path}: {error}") from None
    return len(manifest.raw).to_bytes(_SIZE_BYTES, "little") + manifest.raw + table


def unpack_documents(message: bytes, step: int) -> Manifest:
    """The manifest of a message that `pack_documents` has made, checked like one from storage.

    Raises:
        InvalidManifest: it is not the manifest of that step, or not whole.

    """
    end = _SIZE_BYTES + int.from_bytes(message[:_SIZE_BYTES], "little")
    if end > len(message):
        raise InvalidManifest(f"{len(message)} bytes of documents came, expected {end} or more")
    return parse_manifest(message[_SIZE_BYTES:end], step, lambda _: message[end:])
