"""A decoder is recognised in a recipe's model on device `meta`, and what is none is refused with a reason."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - torch's own custom

from elastictrain.engine.anatomy import Anatomy, anatomy

EXAMPLES = Path(__file__).parents[3] / "examples"
LENGTH = 48


class LlamaBlock(nn.Module):
    def __init__(self, width: int, ffn: int, keys: int, experts: int = 1) -> None:
        super().__init__()
        self.num_heads = 8
        self.q, self.k = nn.Linear(width, width, bias=False), nn.Linear(width, keys, bias=False)
        self.v, self.o = nn.Linear(width, keys, bias=False), nn.Linear(width, width, bias=False)
        self.gate = nn.ModuleList(nn.Linear(width, ffn, bias=False) for _ in range(experts))
        self.up, self.down = nn.Linear(width, ffn, bias=False), nn.Linear(ffn, width, bias=False)
        self.scale = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * self.scale
        q, k, v = self.q(y), self.k(y), self.v(y)
        k, v = (t.repeat(1, 1, q.shape[-1] // t.shape[-1]) for t in (k, v))
        x = x + self.o(torch.softmax(q @ k.transpose(1, 2), -1) @ v)
        gates: Any = sum(gate(x) for gate in self.gate)
        return x + self.down(F.silu(gates) * self.up(x))


class Llama(nn.Module):
    def __init__(self, width: int = 256, ffn: int = 704, keys: int = 256, **more: Any) -> None:
        super().__init__()
        self.tokens = nn.Embedding(1000, width)
        self.layers = nn.ModuleList(LlamaBlock(width, ffn, keys, **more) for _ in range(5))
        self.output = nn.Linear(width, 1000, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens)
        for layer in self.layers:
            x = layer(x)
        out: Tensor = self.output(x)
        return out


def found_in(make: Any, **inputs: Any) -> Anatomy:
    with torch.device("meta"):
        model = make()
        tokens = torch.zeros((2, LENGTH), dtype=torch.int64)
        return anatomy(model, lambda: model(inputs.get("given", tokens)))


def test_the_gpt_of_the_examples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES / "gpt"))
    from model import GPT, GPTConfig  # type: ignore[import-not-found]

    found = found_in(lambda: GPT(GPTConfig(layers=4, heads=6, width=192)))
    shape = found.model
    assert shape is not None, found.said
    assert (shape.layers, shape.hidden, shape.heads, shape.sequence) == (4, 192, 6, LENGTH)
    assert (shape.vocab, shape.ffn, shape.gated, shape.tied) == (320, 768, False, True)
    assert (shape.attention, shape.fused_norm) == ("flash2", True)
    assert "4 layers of width 192, MLP 768" in found.said
    sys.modules.pop("model")


def test_a_llama() -> None:
    found = found_in(Llama)
    shape = found.model
    assert shape is not None, found.said
    assert (shape.layers, shape.hidden, shape.heads, shape.vocab) == (5, 256, 8, 1000)
    assert (shape.ffn, shape.gated, shape.tied, shape.attention, shape.fused_norm) == (704, True, False, "plain", False)
    with torch.device("meta"):
        held = sum(p.numel() for p in Llama().parameters() if p.dim() == 2)
    assert shape.params == held


def test_shared_keys_are_said_and_experts_are_refused() -> None:
    shared = found_in(lambda: Llama(keys=64))
    assert shared.model is not None
    assert "of the parameters that are counted (fewer keys than queries)" in shared.said
    experts = found_in(lambda: Llama(experts=8))
    assert experts.model is None
    assert "experts, or more than one kind of layer?" in experts.said


def test_a_decoder_beside_something_large_is_refused() -> None:
    def beside() -> nn.Module:
        model = Llama()
        model.image = nn.Linear(4096, 2048)
        return model

    found = found_in(beside)
    assert found.model is None
    assert "blocks, embedding and head hold 35% of its parameters, and all else would not be planned" in found.said


def test_heads_that_are_not_visible_are_assumed_and_said() -> None:
    def hidden_heads() -> nn.Module:
        model = Llama()
        for layer in model.layers:
            del layer.num_heads
        return model

    found = found_in(hidden_heads)
    assert found.model is not None
    assert found.model.heads == 4
    assert "heads are not visible, 4 assumed" in found.said


def images() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8, 10))


def layers_of_numbers() -> nn.Module:
    return nn.Sequential(*(nn.Linear(16, 16) for _ in range(4)))


def no_head() -> nn.Module:
    return nn.Sequential(nn.Embedding(50, 16), *(nn.Linear(16, 16) for _ in range(4)))


def no_mlp() -> nn.Module:
    return nn.Sequential(nn.Embedding(50, 16), *(nn.Linear(16, 16) for _ in range(4)), nn.Linear(16, 50))


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (images, "no nn.ModuleList or nn.Sequential with two or more blocks that are alike"),
        (layers_of_numbers, "no nn.Embedding that tokens go through"),
        (no_head, "no nn.Linear from 16 to the 50 rows of the largest embedding: no head over tokens"),
        (no_mlp, "a block has matrices that do not begin or end at the embedding's width 16"),
    ],
)
def test_what_is_no_decoder_is_refused_with_a_reason(make: Any, why: str) -> None:
    found = found_in(make)
    assert found.model is None
    assert found.said == f"the recipe's model was not recognised as a decoder: {why}"
