"""Rules of a mapping: what each does, what each refuses, and loads of some of a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from elastictrain_checkpoint import InvalidPiece, Reader, Store
from elastictrain_checkpoint.errors import InvalidMapping, StateMismatch
from elastictrain_checkpoint.mapping import Mapped, Rename, Rule, Split, dump_rules, parse_rules
from elastictrain_checkpoint.partial import Target, load_into
from elastictrain_checkpoint.source import Arrays
from tests.unit.checkpoint.build import make_state, save


def arrays(**held: Any) -> Arrays:
    """float32 tensors by name (``__`` stands for a dot)."""
    return Arrays({n.replace("__", "."): ("F32", np.shape(a), np.asarray(a, dtype="<f4")) for n, a in held.items()})


def rules(*given: dict[str, Any]) -> list[Rule]:
    return parse_rules(json.dumps(given))


def read(source: Mapped, name: str) -> np.ndarray[Any, np.dtype[np.float32]]:
    shape = source.tensors[name][1]
    return source.read_flat(name, 0, int(np.prod(shape))).view("<f4").reshape(shape)


QKV = np.arange(12 * 5, dtype="<f4").reshape(12, 5)


def test_only_drop_rename_and_table() -> None:
    source = arrays(a__w=[1], a__b=[2], c__w=[3])
    assert list(Mapped(source, rules({"op": "only", "match": r"a\..*"})).tensors) == ["a.w", "a.b"]
    assert list(Mapped(source, rules({"op": "drop", "match": r".*\.w"})).tensors) == ["a.b"]
    seen = Mapped(source, rules({"op": "rename", "match": r"(?P<m>\w)\.(\w)", "to": r"x/\2/\g<m>"}))
    assert list(seen.tensors) == ["x/w/a", "x/b/a", "x/w/c"]
    swapped = Mapped(source, rules({"op": "table", "names": {"a.w": "c.w", "c.w": "a.w"}}))
    assert (read(swapped, "a.w")[0], read(swapped, "c.w")[0], read(swapped, "a.b")[0]) == (3, 1, 2)


def test_a_match_fits_whole_names() -> None:
    source = arrays(a=[1], ab=[2], ba=[3])
    assert list(Mapped(source, rules({"op": "drop", "match": "a"})).tensors) == ["ab", "ba"]
    assert list(Mapped(source, rules({"op": "only", "match": "a"})).tensors) == ["a"]
    assert list(Mapped(source, rules({"op": "rename", "match": "a", "to": "x"})).tensors) == ["x", "ab", "ba"]


def test_fused_qkv_to_three_and_back() -> None:
    source = arrays(l0__qkv=QKV, l1__qkv=QKV + 100)
    apart = rules({"op": "split", "match": r"(.*)\.qkv", "into": [r"\1.q", r"\1.k", r"\1.v"]})
    seen = Mapped(source, apart)
    assert seen.tensors["l1.k"] == ("F32", (4, 5))
    assert (read(seen, "l1.k") == QKV[4:8] + 100).all()
    back = rules({"op": "concat", "match": r"(.*)\.q", "then": [r"\1.k", r"\1.v"], "into": r"\1.qkv"})
    again = Mapped(seen, back)
    assert sorted(again.tensors) == ["l0.qkv", "l1.qkv"]
    assert (read(again, "l1.qkv") == QKV + 100).all()


def test_interleaved_heads_are_three_rules() -> None:
    """[heads, (q, k, v), width] in one matrix, as Megatron and GPT-NeoX fuse them."""
    heads, width = 2, 2
    fused = arrays(qkv=QKV)
    seen = Mapped(
        fused,
        rules(
            {"op": "reshape", "match": "qkv", "shape": [heads, 3, width, 5]},
            {"op": "split", "match": "qkv", "into": ["q", "k", "v"], "axis": 1},
            {"op": "reshape", "match": "[qkv]", "shape": [-1, 5]},
        ),
    )
    for number, name in enumerate("qkv"):
        assert (read(seen, name) == QKV.reshape(heads, 3, width, 5)[:, number].reshape(-1, 5)).all()


def test_transpose_sizes_and_cast() -> None:
    source = arrays(w=QKV)
    assert (read(Mapped(source, rules({"op": "transpose", "match": "w"})), "w") == QKV.T).all()
    parts = Mapped(source, rules({"op": "split", "match": "w", "into": ["a", "b"], "sizes": [1, 4], "axis": -1}))
    assert (read(parts, "b") == QKV[:, 1:]).all()
    half = Mapped(source, rules({"op": "cast", "match": "w", "dtype": "F16"}))
    assert half.tensors["w"] == ("F16", (12, 5))
    assert (half.read_flat("w", 3, 7).view("<f2") == [3, 4, 5, 6]).all()


def test_a_slice_along_the_first_axis_reads_only_its_bytes(tmp_path: Path) -> None:
    state = make_state({"big": ("F32", (3000, 1000))})
    manifest = save(Store(tmp_path), state, (), step=1)
    reader = Reader(Store(tmp_path), manifest)
    seen = Mapped(reader, [Split(match="big", into=["a", "b", "c"]), Rename(match="b", to="middle")])
    assert seen.read_flat("middle", 7, 20).tobytes() == state["big"][2][4_000_028:4_000_080]
    assert reader.read_bytes == 1 << 20, "one hash block"


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        ({"op": "only", "match": "nothing"}, r"fits none of 3 tensors \(a, b, c, …\)"),
        ({"op": "rename", "match": ".*", "to": "x"}, "two tensors would be called 'x'"),
        ({"op": "rename", "match": "a", "to": "b"}, "two tensors would be called 'b'"),
        ({"op": "rename", "match": "a", "to": r"\1"}, "a: invalid group reference"),
        ({"op": "table", "names": {"z": "y"}}, "there is no tensor 'z'"),
        ({"op": "reshape", "match": "a", "shape": [7, -1]}, r"shape \[6, 2\] \(12 elements\) does not reshape"),
        ({"op": "reshape", "match": "a", "shape": [-1, -1]}, "does not reshape"),
        ({"op": "transpose", "match": "a", "axes": [0, 0]}, "are not an order of the 2 axes"),
        ({"op": "split", "match": "a", "into": ["x", "y"], "axis": 2}, "has no 2 equal parts"),
        ({"op": "split", "match": "a", "into": list("vwxyz")}, "has no 5 equal parts; give sizes"),
        ({"op": "split", "match": "a", "into": ["x", "y"], "sizes": [2, 3]}, "do not add up to axis 0"),
        ({"op": "split", "match": "a", "into": ["x", "x"]}, "two tensors would be called 'x'"),
        ({"op": "concat", "match": "a", "then": ["c"], "into": "x"}, "does not join"),
        ({"op": "concat", "match": "a", "then": ["z"], "into": "x"}, "there is no tensor 'z' to join it with"),
        ({"op": "concat", "match": "[ab]", "then": ["b"], "into": "x"}, "would be used twice"),
        ({"op": "concat", "match": "([ab])", "then": ["c"], "into": r"\1x", "axis": 1}, "b: c would be used twice"),
        ({"op": "concat", "match": "a", "then": ["b"], "into": "c"}, "two tensors would be called 'c'"),
        ({"op": "cast", "match": "a", "dtype": "I8"}, "no cast from F32 to I8"),
    ],
)
def test_what_cannot_be_applied_is_refused(given: dict[str, Any], complaint: str) -> None:
    source = arrays(a=np.zeros((6, 2)), b=np.zeros((6, 2)), c=np.zeros((6, 3)))
    with pytest.raises(InvalidMapping, match=complaint):
        Mapped(source, rules(given))


def test_an_optional_rule_may_fit_nothing() -> None:
    source = arrays(a=[1])
    given = [
        {"op": op, "match": "z", "optional": True, **rest}
        for op, rest in (("only", {}), ("drop", {}), ("concat", {"then": ["y"], "into": "x"}), ("rename", {"to": "x"}))
    ]
    assert list(Mapped(source, rules(*given[1:])).tensors) == ["a"]
    assert list(Mapped(source, rules(given[0])).tensors) == []


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{}",
        b'[{"op":"eval","match":"a"}]',
        b'[{"op":"only"}]',
        b'[{"op":"only","match":"("}]',
        b'[{"op":"only","match":"a","surprise":1}]',
        b'[{"op":"split","match":"a","into":[]}]',
        b'[{"op":"split","match":"a","into":["x"],"sizes":[1,2]}]',
        b'[{"op":"reshape","match":"a","shape":["3"]}]',
    ],
)
def test_what_are_no_rules_is_refused(text: bytes) -> None:
    with pytest.raises(InvalidMapping, match="these are not rules of a mapping: "):
        parse_rules(text)


def test_rules_survive_json() -> None:
    given = rules(
        {"op": "split", "match": "a", "into": ["x", "y"], "axis": -1},
        {"op": "table", "names": {"a": "b"}, "optional": True},
        {"op": "concat", "match": "x", "then": ["y"], "into": "a"},
    )
    assert parse_rules(dump_rules(given)) == given


def targets(*names: str, shape: Sequence[int] = (3,), dtype: str = "F32") -> dict[str, Target]:
    return {name: Target(dtype, tuple(shape), np.full(shape, -1, "<f4")) for name in names}


def test_strict_lists_everything_that_differs_and_touches_nothing() -> None:
    source = arrays(a=[1, 2, 3], b=[4, 5, 6], c=[[1, 2, 3]])
    wanted = targets("a", "c", "d") | {"b": Target("I32", (3,), np.zeros(3, "<i4"))}
    with pytest.raises(StateMismatch) as caught:
        load_into(source, wanted)
    error = caught.value
    assert (error.missing, error.extra) == (("d",), ())
    assert error.different == ("b is F32 there, expected I32", "c has shape [1, 3] there, expected [3]")
    assert (wanted["a"].out == -1).all()
    with pytest.raises(StateMismatch, match=r"does not fit: 2 not asked for: b, c; map names and shapes with rules"):
        load_into(source, targets("a"))


def test_not_strict_fills_what_fits_and_says_the_rest() -> None:
    source = arrays(a=[1, 2, 3], b=[4, 5, 6], c=[[1, 2, 3]])
    wanted = targets("a", "c", "d")
    told = load_into(source, wanted, strict=False)
    assert (told.loaded, told.missing, told.extra) == (("a",), ("d",), ("b",))
    assert list(told.different) == ["c"]
    assert wanted["a"].out.tolist() == [1, 2, 3]
    assert (wanted["c"].out == -1).all()
    assert str(told) == "1 missing: d; 1 not asked for: b; 1 different: c has shape [1, 3] there, expected [3]"
    assert str(load_into(source, targets("a", "b") | targets("c", shape=(1, 3)))) == "all 3 tensors fit"


def test_buffers_that_do_not_fit_are_refused_before_anything_is_read() -> None:
    source = arrays(a=[1, 2, 3])
    frozen = np.zeros(3, "<f4")
    frozen.flags.writeable = False
    for out in (frozen, np.zeros(2, "<f4"), np.zeros(6, "<f4")[::2]):
        with pytest.raises(InvalidPiece, match="out must be a writable contiguous buffer of 12 bytes"):
            load_into(source, {"a": Target("F32", (3,), out)})


def test_unused_says_what_nothing_is_made_from() -> None:
    seen = Mapped(arrays(a=[1], b=[2]), rules({"op": "only", "match": "a"}))
    assert seen.unused() == ["b"]
    with pytest.raises(KeyError, match="the mapping makes no tensor 'b'"):
        seen.read_flat("b", 0, 1)
    with pytest.raises(InvalidPiece, match=r"elements \[0, 2\) do not lie in shape \[1\]"):
        seen.read_flat("a", 0, 2)
