"""Opening checkpoints of other formats, and telling which format a folder is of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from elastictrain_checkpoint.convert import names
from elastictrain_checkpoint.convert.in_safetensors import SafetensorsSource
from elastictrain_checkpoint.errors import ForeignFormat, MissingExtra
from elastictrain_checkpoint.mapping import Rule
from elastictrain_checkpoint.source import Source
from elastictrain_checkpoint.store import Store

FORMATS = {
    "safetensors": "Hugging Face safetensors: one file, or shards with model.safetensors.index.json",
    "dcp": "torch.distributed.checkpoint: .metadata and .distcp files",
    "universal": "DeepSpeed universal checkpoint: zero/<parameter>/fp32.pt and its neighbours",
    "megatron": "Megatron-Core dist_checkpointing (torch_dist): metadata.json, common.pt and DCP files",
}


class ForeignSource(Source, Protocol):
    """A source of another format.

    Attributes:
        format: one of `FORMATS`.
        skipped: what is in it and cannot be taken along, as sentences.

    """

    format: str
    skipped: list[str]


def open_source(
    url: str, kind: str = "auto", *, storage_options: Mapping[str, Any] | None = None, check_crc: bool = True
) -> ForeignSource:
    """Open a checkpoint of another format; reads names, types and shapes, no data.

    Args:
        url: folder, or a single ``.safetensors`` file; any fsspec URL.
        kind: one of `FORMATS`, or "auto".
        storage_options: for fsspec.
        check_crc: check the CRC-32 that ``torch.save`` writes (torch itself does not); to be turned off for files
            that were written without (``torch.serialization.set_crc32_options(False)``).

    Raises:
        ForeignFormat: not a checkpoint of that format, or not one that can be read.
        MissingExtra: the format needs torch.
        CorruptData: it is damaged.

    """
    folder, _, file = url.rpartition("/") if url.endswith(".safetensors") else (url, "", "")
    store = Store(folder or ".", storage_options=storage_options)
    if file:
        if kind not in ("auto", "safetensors"):
            raise ForeignFormat(f"{url} is one safetensors file, not a folder of format {kind!r}")
        return SafetensorsSource(store, file)
    chosen = detect(store) if kind == "auto" else kind
    if chosen == "safetensors":
        return SafetensorsSource(store)
    if chosen not in FORMATS:
        raise ForeignFormat(f"format {kind!r} is not one of auto, {', '.join(FORMATS)}")
    try:
        from elastictrain_checkpoint.convert import in_dcp, in_universal
    except ImportError as error:
        raise MissingExtra(
            f"format {chosen!r} is made of torch's own files and needs torch: pip install torch ({error})"
        ) from None
    if chosen == "universal":
        return in_universal.UniversalSource(store, check_crc=check_crc)
    return (in_dcp.MegatronSource if chosen == "megatron" else in_dcp.DcpSource)(store, check_crc=check_crc)


def detect(store: Store) -> str:
    """The format of a folder, from the names in it.

    Raises:
        ForeignFormat: it is of none that is known; the message says what is there.

    """
    there = store.list()
    if ".metadata" in there:
        return "megatron" if "metadata.json" in there and "common.pt" in there else "dcp"
    if "zero" in there:
        return "universal"
    if any(name.endswith((".safetensors", ".safetensors.index.json")) for name in there):
        return "safetensors"
    shown = ", ".join(there[:5]) + (", …" if len(there) > 5 else "") if there else "nothing"
    raise ForeignFormat(
        f"{store.url} holds {shown}: none of .metadata (dcp, megatron), zero/ (universal), *.safetensors"
    )


def default_rules(source: ForeignSource) -> list[Rule]:
    """Rules from the names of that format to those of a run."""
    match source.format:
        case "dcp":
            return names.dcp_rules(source.tensors)
        case "universal":
            return names.universal_rules()
        case "megatron":
            return names.megatron_rules(source.tensors)
    return names.safetensors_rules(source.tensors)
