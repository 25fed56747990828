"""Nested state dicts as tensors with names and a tree of everything else, and back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from elastictrain_checkpoint.errors import InvalidPiece
from elastictrain_checkpoint.tagged import MAX_DEPTH, encode

_STRIDED = torch.strided
_LEAVES = {int, float, bool, str}
_DENSE = {torch.Tensor, torch.nn.Parameter, torch.nn.Buffer, DTensor}
_PLAIN = {torch.float32, torch.float64, torch.int64, torch.int32, torch.uint8, torch.bool}

DEEPEST = MAX_DEPTH - 2
"""Levels of a state dict: it lies two deep in the manifest's tree."""
Path = tuple[Any, ...]
"""Keys from the root: strings and whole numbers of mappings, places in lists and tuples."""

NATIVE = {
    torch.bool: "BOOL", torch.uint8: "U8", torch.int8: "I8", torch.int16: "I16", torch.uint16: "U16",
    torch.float16: "F16", torch.bfloat16: "BF16", torch.int32: "I32", torch.uint32: "U32", torch.float32: "F32",
    torch.int64: "I64", torch.uint64: "U64", torch.float64: "F64", torch.complex64: "C64",
    torch.float8_e5m2: "F8_E5M2", torch.float8_e4m3fn: "F8_E4M3",
}  # fmt: skip
"""Types that safetensors knows."""
AS_BYTES = {
    name: getattr(torch, name)
    for name in ("complex128", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu")
    if hasattr(torch, name)
}
"""Types that it does not: stored as bytes, with one more dimension of the item's size, and named in the tree."""


@dataclass(slots=True)
class Flat:
    """A state dict, taken apart.

    Attributes:
        tensors: name → tensor, each storage once.
        places: (path, name) of every tensor and every alias.
        aliases: further name → name of the tensor that has the same memory.
        rest: the state dict, mappings as plain dicts, None in the place of tensors.
        spread: whether there are DTensors.
        optimizers: those that stand in the state dict themselves.

    """

    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    places: list[tuple[Path, str]] = field(default_factory=list)
    aliases: dict[str, str] = field(default_factory=dict)
    rest: Any = None
    spread: bool = False
    optimizers: list[torch.optim.Optimizer] = field(default_factory=list)


def flatten(state: Any) -> Flat:
    """Take a state dict apart; nothing is copied.

    Raises:
        InvalidPiece: a tensor that is neither dense nor a DTensor, or of a class of its own, or anything else that
            the tree of a manifest cannot hold; with its place.

    """
    flat = Flat()
    tensors, aliases, places = flat.tensors, flat.aliases, flat.places
    seen: dict[int, str] = {}
    others: dict[int, list[str]] = {}

    def walk_tensor(value: torch.Tensor, path: Path, name: str) -> None:
        if name in tensors or name in aliases or not _is_name(name):
            name = unique_name(path, flat)
        places.append((path, name))
        if type(value) not in _DENSE or value.layout is not _STRIDED or value.dtype not in NATIVE:
            _checked(value, name)
        local = value
        if type(value) is DTensor:
            local, flat.spread = value.to_local(), True
        address = local.data_ptr()
        if not address:
            _checked(value, name)  # a meta tensor has none, nor has an empty one
        first = seen.setdefault(address, name)
        if first != name and local.numel():
            mine = identity(value)
            for other in (first, *others.get(address, ())):
                if identity(tensors[other]) == mine:
                    aliases[name] = other
                    return
            others.setdefault(address, []).append(name)
        tensors[name] = value

    def walk(value: Any, path: Path, name: str) -> Any:
        kind = type(value)
        if kind in _LEAVES:
            return value
        if kind in _DENSE or isinstance(value, torch.Tensor):
            walk_tensor(value, path, name)
            return None
        before = f"{name}/" if path else ""
        if len(path) > DEEPEST:
            raise InvalidPiece(f"{_where(path[:8])}…: nested deeper than {DEEPEST} levels (a cycle?)")
        if kind is dict or isinstance(value, Mapping):
            for key in value:
                if type(key) is not str and type(key) is not int:
                    encode(key, _where(path))
            return {key: walk(item, (*path, key), f"{before}{key}") for key, item in value.items()}
        if kind in (list, tuple, torch.Size) or (isinstance(value, tuple) and hasattr(value, "_fields")):
            items = [walk(item, (*path, number), f"{before}{number}") for number, item in enumerate(value)]
            return items if kind is list else tuple(items)
        if is_stateful(value):
            if isinstance(value, torch.optim.Optimizer):
                flat.optimizers.append(value)
            return walk(state_of(value, path), path, name)
        encode(value, _where(path))
        return value

    flat.rest = walk(state, (), "")
    return flat


def is_stateful(value: Any) -> bool:
    """Whether it keeps a state dict, as modules, optimizers, schedulers and `Stateful` of DCP do."""
    return callable(getattr(value, "state_dict", None)) and callable(getattr(value, "load_state_dict", None))


def state_of(value: Any, path: Path) -> Any:
    """The state dict of what `is_stateful`.

    Raises:
        InvalidPiece: it raises, whatever it is; with its place.

    """
    try:
        return value.state_dict()
    except Exception as error:
        where = f"{_where(path)} ({type(value).__name__}): state_dict() raised"
        raise InvalidPiece(f"{where} {type(error).__name__}: {error}") from error


def _where(path: Path) -> str:
    return "state_dict" + "".join(f"[{key!r}]" for key in path)


def _is_name(name: str) -> bool:
    return bool(name) and name.isprintable() and len(name) <= 1000 and name != "__metadata__"


def unique_name(path: Path, flat: Flat) -> str:
    """The keys joined by "/"; numbered where that name is taken, or is none that the format can hold."""
    name = "/".join(str(key) for key in path)
    if not _is_name(name):
        name = f"tensor-{len(flat.places)}"
    wanted, number = name, 2
    while name in flat.tensors or name in flat.aliases:
        name, number = f"{wanted}~{number}", number + 1
    return name


def _checked(value: torch.Tensor, name: str) -> torch.Tensor:
    if type(value) not in _DENSE:
        raise InvalidPiece(f"{name} is a {type(value).__name__}; pass its plain tensors, or a DTensor")
    if value.layout is not torch.strided or value.is_quantized or value.is_meta:
        kind = "meta" if value.is_meta else "quantized" if value.is_quantized else str(value.layout)
        raise InvalidPiece(f"{name} is a tensor of kind {kind}; only dense tensors with data can be stored")
    if value.dtype not in NATIVE and value.dtype not in AS_BYTES.values():
        raise InvalidPiece(f"{name} has dtype {value.dtype}, which cannot be stored; convert it first")
    return value


def identity(value: torch.Tensor) -> Any:
    """What two tensors share that are the same memory; None for a tensor without memory."""
    local = value.to_local() if isinstance(value, DTensor) else value
    if not local.numel():
        return None
    return (
        local.device, local.data_ptr(), local.dtype, tuple(local.shape), local.stride(), tuple(value.shape),
        local.is_conj(), local.is_neg(),
    )  # fmt: skip


def stored_facts(value: torch.Tensor) -> tuple[str, tuple[int, ...]]:
    """Type and shape under which a tensor is stored."""
    shape = tuple(value.shape)
    if value.dtype in NATIVE:
        return NATIVE[value.dtype], shape
    return "U8", (*shape, value.dtype.itemsize)


def as_buffer(value: torch.Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, writable, without a copy."""
    if not value.numel():
        return memoryview(b"")
    if value.requires_grad:
        value = value.detach()
    if value.dtype in _PLAIN:  # a state may have thousands of small tensors: this is three times as fast
        return memoryview(value.numpy()).cast("B")  # type: ignore[arg-type]
    return memoryview(value.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


def describe(flat: Flat) -> dict[str, Any]:
    """The manifest's tree: what `restore` needs beside the tensors."""
    odd = {name: str(t.dtype).removeprefix("torch.") for name, t in flat.tensors.items() if t.dtype not in NATIVE}
    return {"torch": {"version": 1, "rest": flat.rest, "places": [list(p) for p in flat.places], "dtypes": odd}}


def leaves(tree: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Everything that is neither mapping, list nor tuple, and those that are empty."""
    if isinstance(tree, Mapping) and tree:
        for key, value in tree.items():
            yield from leaves(value, (*path, key))
    elif isinstance(tree, list | tuple) and len(tree):
        for number, value in enumerate(tree):
            yield from leaves(value, (*path, number))
    else:
        yield path, tree
