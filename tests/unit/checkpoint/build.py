"""States, worlds and stores for the checkpoint tests."""

from __future__ import annotations

import itertools
import json
import math
import uuid
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import xxhash
from fsspec.implementations.memory import MemoryFileSystem

from elastictrain_checkpoint import (
    DIGEST_BLOCK_ELEMENTS,
    ITEM_BYTES,
    Manifest,
    PackWriter,
    Part,
    Piece,
    Store,
    block_hashes,
    combine_digest,
    commit,
)

State = dict[str, tuple[str, tuple[int, ...], bytes]]
"""name → (dtype, shape, bytes of the whole tensor)."""

SPECS: dict[str, tuple[str, tuple[int, ...]]] = {
    "model/embed.weight": ("F32", (300, 100)),
    "model/half": ("BF16", (3, 50, 70)),
    "model/scalar": ("F64", ()),
    "model/empty": ("F32", (0, 5)),
    "model/flags": ("BOOL", (9000,)),
    "optim/step": ("I64", (7,)),
}


MOST_STORES = 64
_made: deque[str] = deque()


def memory_store(*, lasts: bool = False) -> Store:
    """A store of its own. All of a process share one file system, and every look into it goes through all that is in
    it: where very many are made, the oldest are emptied, but for those that must last.
    """
    name = uuid.uuid4().hex
    if not lasts:
        _made.append(name)
    if len(_made) > MOST_STORES:
        root = f"/{_made.popleft()}"
        for path in [path for path in MemoryFileSystem.store if path.startswith(f"{root}/")]:
            del MemoryFileSystem.store[path]
        MemoryFileSystem.pseudo_dirs[:] = [path for path in MemoryFileSystem.pseudo_dirs if not path.startswith(root)]
    return Store(f"memory://{name}")


def make_state(specs: Mapping[str, tuple[str, tuple[int, ...]]] = SPECS, seed: int = 0) -> State:
    rng = np.random.default_rng(seed)
    return {
        name: (dtype, shape, rng.bytes(math.prod(shape) * ITEM_BYTES[dtype])) for name, (dtype, shape) in specs.items()
    }


def cut(state: State, cuts: Sequence[float], breaks: Sequence[float] = ()) -> list[list[Piece]]:
    """Pieces of each writer: tensor by tensor, cut at these fractions (moved to the digest grid).

    Each piece lies in one buffer, or is broken into several at these fractions of its own length.
    """
    writers: list[list[Piece]] = [[] for _ in range(len(cuts) + 1)]
    for name, (dtype, shape, data) in state.items():
        count, item = math.prod(shape), ITEM_BYTES[dtype]
        edges = [int(c * count) // DIGEST_BLOCK_ELEMENTS * DIGEST_BLOCK_ELEMENTS for c in sorted(cuts)]
        borders = [0, *edges, count]
        for writer, (start, stop) in enumerate(itertools.pairwise(borders)):
            if start < stop or (count == 0 and writer == 0):
                run = (
                    broken(data[start * item : stop * item], item, breaks)
                    if breaks
                    else data[start * item : stop * item]
                )
                writers[writer].append(Piece(name, dtype, shape, start, run))
    return writers


def broken(data: bytes, item: int, breaks: Sequence[float]) -> list[bytes]:
    """A run in several buffers, each in memory of its own, broken on the digest grid; some may be empty."""
    step = DIGEST_BLOCK_ELEMENTS * item
    edges = [0, *sorted(int(at * len(data)) // step * step for at in breaks), len(data)]
    return [bytes(bytearray(data[a:b])) for a, b in itertools.pairwise(edges)]


def write_parts(
    store: Store,
    state: State,
    cuts: Sequence[float] = (0.5,),
    *,
    step: int,
    attempt: str,
    breaks: Sequence[float] = (),
    **writer: Any,
) -> list[Part]:
    return [
        PackWriter(store, step=step, attempt=attempt, writer=f"w{i:04d}", **writer).write(pieces)
        for i, pieces in enumerate(cut(state, cuts, breaks))
    ]


def save(
    store: Store,
    state: State,
    cuts: Sequence[float] = (0.5,),
    *,
    step: int = 1000,
    attempt: str = "a1",
    generation: int = 1,
    pack_bytes: int = 1 << 30,
    breaks: Sequence[float] = (),
    base: Any = None,
    **rest: Any,
) -> Manifest:
    parts = write_parts(store, state, cuts, step=step, attempt=attempt, pack_bytes=pack_bytes, breaks=breaks, base=base)
    return commit(store, step=step, attempt=attempt, generation=generation, parts=parts, **rest)


def live_digest(state: State, aliases: Mapping[str, str] | None = None) -> str:
    """Digest without any storage, as the engine takes it from its memory."""
    return combine_digest({n: (d, s, block_hashes(data, ITEM_BYTES[d])) for n, (d, s, data) in state.items()}, aliases)


def sign(document: dict[str, Any]) -> bytes:
    """A manifest's text with a right hash of itself, whatever lies it tells."""
    document = {key: value for key, value in document.items() if key != "self"}
    body = json.dumps(document, separators=(",", ":")).encode()
    hashed = xxhash.xxh3_128_hexdigest(body)
    return json.dumps({**document, "self": hashed}, separators=(",", ":")).encode()


def flip(store: Store, path: str, at: int, mask: int = 1) -> None:
    """Flip bits of one byte of a file, behind the library's back."""
    data = bytearray(store.read_all(path))
    data[at] ^= mask
    store.put(path, bytes(data))


def changed(state: State, seed: int, *spans: tuple[str, float, float]) -> State:
    """The state with new bytes in these fractions [low, high) of these tensors."""
    rng, out = np.random.default_rng(seed), dict(state)
    for name, low, high in spans:
        dtype, shape, data = out[name]
        start, stop = int(low * len(data)), int(high * len(data))
        out[name] = (dtype, shape, data[:start] + rng.bytes(stop - start) + data[stop:])
    return out
