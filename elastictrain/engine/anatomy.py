"""A decoder found in a model on device `meta`: its blocks, widths, vocabulary, heads and sequence length.

Blocks are the children of the `nn.ModuleList` or `nn.Sequential` that holds most parameters in children that are alike;
embedding and head are told by their shapes, the rest by the block's matrices. What does not look like a decoder is
refused with a reason, rather than described wrongly.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from elastictrain.planner.model import Transformer

HEAD_NAMES = ("heads", "n_heads", "num_heads", "n_head", "num_attention_heads", "nhead", "n_q_heads")
USUAL_HEAD = 64
"""Width of a head where the model does not show how many it has."""
FEWER, MORE = 0.75, 1.05
"""A block may have this share of the parameters that the cost model counts for its widths (fewer: shared keys)."""

MOST = 0.9
"""Blocks, embedding and head must hold this share of all parameters (positions and norms are the rest)."""


@dataclass(frozen=True, slots=True)
class Anatomy:
    """`model`: None when it does not look like a decoder; `said`: what was found or assumed, or why not."""

    model: Transformer | None
    said: str


class _Seen(TorchFunctionMode):
    """Which functions were called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(getattr(func, "__name__", ""))
        return func(*args, **(kwargs or {}))


def anatomy(model: nn.Module, forward: Callable[[], object]) -> Anatomy:
    """The decoder in `model`. `forward` computes the loss of one lane's samples, on device `meta`."""
    blocks = _blocks(model)
    if blocks is None:
        return _none("no nn.ModuleList or nn.Sequential with two or more blocks that are alike")
    embedding = max(
        (m for m in model.modules() if isinstance(m, nn.Embedding)), key=lambda m: m.num_embeddings, default=None
    )
    if embedding is None:
        return _none("no nn.Embedding that tokens go through")
    hidden, vocab = embedding.embedding_dim, embedding.num_embeddings
    heads_of = [m for m in model.modules() if isinstance(m, nn.Linear) and m.in_features == hidden
                and m.out_features >= vocab and not any(m is part for b in blocks for part in b.modules())]  # fmt: skip
    if not heads_of:
        return _none(f"no nn.Linear from {hidden} to the {vocab:,} rows of the largest embedding: no head over tokens")
    widths = _widths(blocks[0], hidden)
    if isinstance(widths, str):
        return _none(widths)
    ffn, gated = widths
    length, names = _watched(embedding, forward)
    if length is None:
        return _none("the largest embedding sees no sequences of tokens")
    heads = _heads(blocks[0], hidden)
    fused_norm = not {"layer_norm", "rms_norm"}.isdisjoint(names)
    found = Transformer(
        layers=len(blocks), hidden=hidden, heads=heads or max(1, hidden // USUAL_HEAD), sequence=length, vocab=vocab,
        ffn=ffn, gated=gated, fused_norm=fused_norm, tied=heads_of[-1].weight is embedding.weight,
        attention="flash2" if "scaled_dot_product_attention" in names else "plain",
    )  # fmt: skip
    held = sum(p.numel() for p in blocks[0].parameters() if p.dim() == 2)
    share = held / found.layer_params
    if not FEWER <= share <= MORE:
        return _none(
            f"a block has {held:,} parameters in matrices, where attention and an MLP of these widths have "
            f"{found.layer_params:,} (experts, or more than one kind of layer?)"
        )
    parts = [*blocks, embedding, heads_of[-1]]
    known = sum(p.numel() for p in {p for part in parts for p in part.parameters()})
    whole = sum(p.numel() for p in model.parameters())
    if known < MOST * whole:
        return _none(
            f"blocks, embedding and head hold {known / whole:.0%} of its parameters, and all else would not be planned"
        )
    return Anatomy(found, _told(found, heads, share))


def _none(why: str) -> Anatomy:
    return Anatomy(None, f"the recipe's model was not recognised as a decoder: {why}")


def _told(found: Transformer, heads: int | None, share: float) -> str:
    kind = "gated " if found.gated else ""
    said = f"found in the recipe's model: {found.layers} layers of width {found.hidden}, {kind}MLP {found.ffn}, "
    said += f"{found.vocab:,} tokens, sequences of {found.sequence}, {found.attention} attention"
    said += f", {heads} heads" if heads else f"; heads are not visible, {found.heads} assumed"
    if share < 0.99:
        said += f"; a block has {share:.0%} of the parameters that are counted (fewer keys than queries)"
    return said


def _blocks(model: nn.Module) -> list[nn.Module] | None:
    """The children that are alike of the list that holds most parameters in such ones."""
    best: list[nn.Module] | None = None
    most = 0
    for module in model.modules():
        if not isinstance(module, nn.ModuleList | nn.Sequential):
            continue
        kinds: dict[object, list[nn.Module]] = {}
        for child in module:
            shapes = tuple((name, tuple(p.shape)) for name, p in child.named_parameters())
            kinds.setdefault((type(child), shapes), []).append(child)
        for alike in kinds.values():
            held = sum(p.numel() for p in alike[0].parameters()) * len(alike)
            if len(alike) > 1 and held > most:
                best, most = alike, held
    return best


def _widths(block: nn.Module, hidden: int) -> tuple[int, bool] | str:
    """Of the MLP, and whether it is gated; or why that is not known."""
    matrices = [tuple(p.shape) for p in block.parameters() if p.dim() == 2]
    if any(hidden not in shape for shape in matrices) or len(matrices) < 3:
        return f"a block has matrices that do not begin or end at the embedding's width {hidden}"
    into = [rows for rows, columns in matrices if columns == hidden and rows != hidden]
    back = [columns for rows, columns in matrices if rows == hidden and columns != hidden]
    for width in sorted(set(back), reverse=True):
        if into.count(width) >= 2:
            return width, True
        if 2 * width in into and width not in into:
            return width, True  # gate and value in one matrix
        if width in into:
            return width, False
    return "a block has no two matrices that lead to a wider layer and back: no MLP"


def _heads(block: nn.Module, hidden: int) -> int | None:
    """As an attribute of the block or one of its parts says."""
    for part in block.modules():
        for name in HEAD_NAMES:
            value = getattr(part, name, None)
            if isinstance(value, int) and not isinstance(value, bool) and value > 0 and hidden % value == 0:
                return value
    return None


def _watched(embedding: nn.Embedding, forward: Callable[[], object]) -> tuple[int | None, set[str]]:
    """How long the sequences are that go through the embedding, and which functions are called."""
    lengths: list[int] = []

    def note(module: nn.Module, args: tuple[Any, ...]) -> None:
        del module
        if args and isinstance(args[0], torch.Tensor) and args[0].dim() > 1:
            lengths.append(args[0].shape[-1])

    handle = embedding.register_forward_pre_hook(note)
    try:
        with _Seen() as seen:
            forward()
    finally:
        handle.remove()
    return max(lengths, default=None), seen.names
