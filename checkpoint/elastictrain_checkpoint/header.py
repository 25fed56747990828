"""The header of a pack, and JSON written from templates: a state has thousands of small tensors of a few shapes."""

from __future__ import annotations

import struct
from collections.abc import Container, Sequence
from typing import TYPE_CHECKING

from pydantic_core import to_json

from elastictrain_checkpoint.boxes import Box
from elastictrain_checkpoint.collector import no_collections

if TYPE_CHECKING:
    from elastictrain_checkpoint.pack import BoxData

HEADER_ALIGN_BYTES = 4096


def json_text(text: str) -> str:
    """A string in JSON, characters beyond ASCII as they are."""
    if text.isprintable() and '"' not in text and "\\" not in text:
        return f'"{text}"'
    return to_json(text).decode()


def commas(numbers: Sequence[int]) -> str:
    """Numbers in JSON, without brackets."""
    return ",".join(map(str, numbers))


@no_collections()
def pack_header(boxes: Sequence[BoxData], *, rest_elsewhere: bool = False) -> bytes:
    """Safetensors header for these boxes in this order, padded with spaces up to the next 4 KiB.

    A box has the name of its tensor; further ones of a tensor have their offsets after it. `rest_elsewhere`: what
    these tensors have beside their boxes may lie in another step's packs, where stock torch.distributed.checkpoint
    does not look: it would leave that as it was, and say nothing. So a box that is not the whole tensor is said to lie
    beyond the tensor's end, and whoever loads it there is told that the sizes differ.
    """
    known: dict[tuple[str, Box, tuple[int, ...]], tuple[str, str]] = {}  # most boxes have a shape of many
    sharding: dict[str, str] = {}
    tensors: list[str] = []
    at = 0
    for box in boxes:
        name, stop = box.name, at + box.size_bytes
        if name in sharding:
            name = _further_key(box, sharding)
        whole = box.shape if rest_elsewhere else ()
        kind = known.get((box.dtype, box.box, whole))
        if kind is None:
            offsets, sizes = box.box
            if rest_elsewhere and tuple(sizes) != tuple(whole):
                offsets = tuple(offset + size for offset, size in zip(offsets, whole, strict=True))
            kind = f"[{commas(offsets)}]", f'"dtype":"{box.dtype}","shape":[{commas(sizes)}]'
            known[box.dtype, box.box, whole] = kind
        key = json_text(name)
        sharding[name] = f'{key}:{{"saved_offsets":{kind[0]}}}'
        tensors.append(f'{key}:{{{kind[1]},"data_offsets":[{at},{stop}]}}')
        at = stop
    info = to_json(f"{{{','.join(sharding.values())}}}").decode()
    metadata = f'"__metadata__":{{"format":"pt","DCP_VERSION":"1.0","DCP_SHARDING_INFO":{info}}}'
    text = f"{{{','.join([metadata, *tensors])}}}".encode()
    text += b" " * (-(len(text) + 8) % HEADER_ALIGN_BYTES)
    return struct.pack("<Q", len(text)) + text


def _further_key(box: BoxData, taken: Container[str]) -> str:
    key = f"{box.name}@{commas(box.box[0])}"
    while key in taken:
        key += "'"
    return key
