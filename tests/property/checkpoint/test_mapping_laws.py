"""Views against NumPy: any chain of rules gives what NumPy gives, and any range of it is that range of the whole."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from elastictrain_checkpoint import views
from elastictrain_checkpoint.cast import cast, values
from elastictrain_checkpoint.mapping import Concat, Mapped, Split
from elastictrain_checkpoint.source import Arrays
from elastictrain_checkpoint.views import Stored, View

Array = np.ndarray[Any, np.dtype[np.int32]]


@st.composite
def chains(draw: st.DrawFn) -> tuple[View, Array, Array]:
    """A view, the array that it must equal, and the array it is made from."""
    shape = tuple(draw(st.lists(st.integers(0, 5), max_size=4)))
    base = np.arange(int(np.prod(shape)), dtype="<i4").reshape(shape)
    view: View = Stored("I32", shape, "t")
    want = base
    for _ in range(draw(st.integers(0, 4))):
        ndim = want.ndim
        match draw(st.sampled_from(["reshape", "transpose", "slice", "join"])):
            case "reshape":
                new = draw(st.sampled_from([(-1,), (want.size,), (1, *want.shape), (*want.shape, 1)]))
                if new == (-1,) and not want.size:
                    new = (0,)
                view, want = views.reshape(view, new), want.reshape(new)
            case "transpose":
                axes = draw(st.permutations(range(ndim)))
                view, want = views.transpose(view, axes), want.transpose(axes)
            case "slice" if ndim:
                axis = draw(st.integers(-ndim, ndim - 1))
                a, b = sorted(draw(st.tuples(*[st.integers(0, want.shape[axis])] * 2)))
                view = views.split(view, [a, b - a, want.shape[axis] - b], axis)[1]
                want = np.split(want, [a, b], axis=axis)[1]
            case "join" if ndim:
                axis = draw(st.integers(-ndim, ndim - 1))
                times = draw(st.integers(1, 3))
                view, want = views.join([view] * times, axis), np.concatenate([want] * times, axis=axis)
    return view, want, base


@settings(deadline=None)
@given(chains(), st.data())
def test_any_chain_and_any_range(chain: tuple[View, Array, Array], data: st.DataObject) -> None:
    view, want, base = chain
    assert view.shape == want.shape
    source = Arrays({"t": ("I32", base.shape, base)})
    flat = np.ascontiguousarray(want).reshape(-1)
    start, stop = sorted(data.draw(st.tuples(*[st.integers(0, flat.size)] * 2)))
    assert view.read(source.read_flat, start, stop).view("<i4").tolist() == flat[start:stop].tolist()
    assert view.inputs() == {"t"}


@settings(deadline=None)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=4), st.integers(1, 4), st.data())
def test_split_and_concat_are_inverse(sizes: list[int], other: int, data: st.DataObject) -> None:
    axis = data.draw(st.integers(0, 2))
    shape = [other, other, other]
    shape[axis] = sum(sizes)
    array = np.random.default_rng(0).integers(0, 99, shape, dtype=np.int32)
    source = Arrays({"t": ("I32", tuple(shape), array)})
    names = [f"p{i}" for i in range(len(sizes))]
    apart = Mapped(source, [Split(match="t", into=names, sizes=sizes, axis=axis)])
    assert [apart.tensors[name][1][axis] for name in names] == sizes
    if len(names) < 2:
        return
    back = Mapped(apart, [Concat(match="p0", then=names[1:], into="t", axis=axis)])
    assert back.read_flat("t", 0, array.size).tobytes() == array.tobytes()


TORCH = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@settings(deadline=None)
@given(st.sampled_from(sorted(TORCH)), st.sampled_from(sorted(TORCH)), st.binary(min_size=8, max_size=800))
@example("F32", "BF16", b"\xff\xff\xff\x7f\x01\x00\x80\xff")  # NaN that would round up to zero, or down to infinity
@example("F32", "BF16", b"\x00\x80\x80\x3f\x00\x80\x81\x3f")  # ties: one goes down, one up
def test_casts_are_those_of_torch(one: str, two: str, raw: bytes) -> None:
    """Any bits: subnormals, infinities, ties, NaN (whose payload is nobody's business)."""
    data = np.frombuffer(raw[: len(raw) // 8 * 8], np.uint8).copy()
    want = torch.from_numpy(data.copy()).view(TORCH[one]).to(TORCH[two])
    got = torch.from_numpy(cast(data, one, two).copy()).view(TORCH[two])
    assert torch.equal(got.isnan(), want.isnan())
    assert torch.equal(got.nan_to_num(0.0, 1.0, -1.0), want.nan_to_num(0.0, 1.0, -1.0))
    assert torch.equal(got.isinf(), want.isinf())


def test_values_of_small_types_are_those_of_torch() -> None:
    for name, dtype in (("F8_E4M3", torch.float8_e4m3fn), ("F8_E5M2", torch.float8_e5m2)):
        codes = np.arange(256, dtype=np.uint8)
        found = values(codes, name)
        assert found is not None
        want = torch.from_numpy(codes.copy()).view(dtype).float().numpy()
        assert np.array_equal(found, want, equal_nan=True)
    every = np.arange(65536, dtype="<u2")
    found = values(every.view(np.uint8), "BF16")
    assert found is not None
    assert np.array_equal(found, torch.from_numpy(every).view(torch.bfloat16).float().numpy(), equal_nan=True)
