"""Writing what stock ``torch.distributed.checkpoint.load`` reads, for FSDP and its relatives; no process group."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from elastictrain_checkpoint.convert.from_state_dict import odd_types, places_in
from elastictrain_checkpoint.errors import ForeignFormat, MissingExtra
from elastictrain_checkpoint.source import Source
from elastictrain_checkpoint.store import Store

Progress = Callable[[int, int], None]
Path = tuple[Any, ...]
DEFAULT_FILE_BYTES = 1 << 30


def nested_path(name: str, model: str = "model", optimizer: str = "optim") -> Path:
    """Where a tensor goes in the nested state dict that trainers hand to ``dcp.load``. Pure.

    ``model/a.b`` → (model, "a.b"), so are buffers and counters; ``optim/a.b/exp_avg`` → (optimizer, "state", "a.b",
    "exp_avg"); all else is one key at the top.
    """
    kind, _, rest = name.partition("/")
    if kind in ("model", "buffer", "counter") and rest:
        return (model, rest)
    parameter, _, key = rest.rpartition("/")
    if kind == "optim" and parameter and key:
        return (optimizer, "state", parameter, key)
    return (name,)


def export_dcp(
    source: Source,
    store: Store,
    *,
    model: str = "model",
    optimizer: str = "optim",
    extras: Mapping[Path, Any] | None = None,
    file_bytes: int = DEFAULT_FILE_BYTES,
    progress: Progress | None = None,
) -> int:
    """Write a source as DCP: ``.distcp`` files, then ``.metadata``, which makes it a checkpoint; gives the bytes.

    A trainer loads it with ``dcp.load({"model": ..., "optim": {"state": ...}}, ...)``, in any world. Tied tensors are
    written under each of their names, since that is what a module's state dict asks for. Memory: one tensor.

    What `elastictrain_checkpoint.torch.save` has saved comes with the keys, values and types of that state dict, but
    for tensors that rules have given other names; these, and all others, go where `nested_path` says.

    Args:
        source: what to write, with our names (``model/``, ``optim/``).
        store: an empty folder; nothing is overwritten.
        model: key of the model at the top of the nested state dict.
        optimizer: key of the optimizer there.
        extras: plain values beside the tensors, by their place: ``{("optim", "param_groups"): [...]}``.
        file_bytes: a new file begins when one is as large as this.
        progress: called with (bytes done, bytes in all).

    Raises:
        FileExistsError: the folder holds such a checkpoint.
        ForeignFormat: two tensors in one place, or a type that torch has not.
        MissingExtra: torch is not installed.
        CorruptData: stored bytes are not those that were written; the files that were written are removed.

    """
    try:
        from elastictrain_checkpoint.convert import dcp_writer
    except ImportError as error:
        raise MissingExtra(
            f"torch.distributed.checkpoint is torch's and needs torch: pip install torch ({error})"
        ) from None
    known, values = places_in(source)
    places = {name: known.get(name) or nested_path(name, model, optimizer) for name in source.tensors}
    extras = values | dict(extras or {})
    taken: dict[str, str] = {}
    for name, place in [*places.items(), *((".".join(map(str, p)), p) for p in extras)]:
        other = taken.setdefault(".".join(map(str, place)), name)
        if other != name:
            raise ForeignFormat(f"{other} and {name} would both be {'.'.join(map(str, place))}; rename one with a rule")
    there = [name for name in store.list() if name == ".metadata" or name.endswith(".distcp")]
    if there:
        raise FileExistsError(f"{store.url} already holds {there[0]}; export into an empty folder")
    return dcp_writer.write(source, store, places, extras, odd_types(source), file_bytes, progress)
