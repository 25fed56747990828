"""The datagrams of heartbeats: what goes in comes out, and nothing else is let in."""

from __future__ import annotations

import math

from hypothesis import given, settings
from hypothesis import strategies as st

from elastictrain.signs import Activity, NodeReport, WorkerSign
from elastictrain_actors.beats import Codec

seconds = st.floats(0, 1e6).map(lambda value: round(value, 3))
SIGNS = st.builds(
    WorkerSign,
    st.integers(0, 9999),
    st.integers(1, 2**22),
    st.integers(0, 2**40),
    st.sampled_from("RSDTtX"),
    seconds,
    st.none() | seconds,
    st.integers(-1, 2**50),
    st.integers(0, 2**31),
    st.integers(0, 2**31),
    st.sampled_from(list(Activity)),
    st.integers(0, 2**31),
    seconds,
    seconds,
    seconds,
)
REPORTS = st.builds(
    NodeReport,
    st.text(max_size=60),
    st.integers(0, 99),
    st.integers(1, 2**31),
    st.integers(0, 2**31),
    seconds,
    seconds,
    st.lists(SIGNS, max_size=4).map(tuple),
    st.none() | seconds,
    st.text(max_size=60),
)


@settings(max_examples=200, deadline=None)
@given(REPORTS)
def test_a_report_comes_out_as_it_went_in(report: NodeReport) -> None:
    codec = Codec("token")
    assert codec.decode_report(codec.encode_report(report)) == report


@given(st.integers(0, 2**40), st.text(max_size=60), st.integers(0, 99), st.integers(0, 2**31))
def test_an_answer_comes_out_as_it_went_in(epoch: int, node: str, agent: int, number: int) -> None:
    codec = Codec("token")
    assert codec.decode_answer(codec.encode_answer(epoch, node, agent, number)) == (epoch, node, agent, number)


@settings(max_examples=300, deadline=None)
@given(REPORTS, st.data())
def test_one_changed_byte_makes_it_nothing(report: NodeReport, data: st.DataObject) -> None:
    codec = Codec("token")
    good = bytearray(codec.encode_report(report))
    at = data.draw(st.integers(0, len(good) - 1))
    good[at] ^= data.draw(st.integers(1, 255))
    assert codec.decode_report(bytes(good)) is None
    assert codec.decode_report(bytes(good[: data.draw(st.integers(0, len(good) - 1))])) is None


@given(st.binary(max_size=200))
def test_noise_is_nothing(noise: bytes) -> None:
    assert Codec("token").decode_report(noise) is None
    assert Codec("token").decode_answer(noise) is None


def test_another_run_and_the_other_direction_are_nothing() -> None:
    report = NodeReport("n", 1, 1, 0, 1.0, 0.0)
    raw = Codec("ours").encode_report(report)
    assert Codec("theirs").decode_report(raw) is None
    assert Codec("ours").decode_answer(raw) is None
    assert Codec("ours").decode_report(Codec("ours").encode_answer(1, "n", 1, 1)) is None


def test_a_report_of_another_shape_is_nothing() -> None:
    codec = Codec("x")
    head = ["n", 1, 1, 0, 1.0, 0.0]
    assert codec.decode_report(codec._seal([*head, [], None, ""])) is not None
    for content in ([], {}, 5, None, [*head, [[1]], None, ""], [*head, 5, None, ""], [*head, [], "soon", ""], ["n"]):
        assert codec.decode_report(codec._seal(content)) is None
        assert codec.decode_answer(codec._seal(content)) is None
    unknown = [0, 1, 1, "R", 0.0, None, 1, 1, 1, 99, 1, 0.0, 0.0, 0.0]  # an activity of a later version
    assert codec.decode_report(codec._seal([*head, [unknown], None, ""])) is None


def test_sixteen_workers_fit_into_two_frames_and_nothing_infinite_travels() -> None:
    codec = Codec("x")
    sign = WorkerSign(
        1234, 4_000_000, 123_456_789, "R", 12345.678, 123.456, 10**9, 99, 10**6, Activity.COMPUTE, 10**6, 12.345, 9.999,
        99.999,
    )  # fmt: skip
    raw = codec.encode_report(NodeReport("a" * 56, 1, 10**7, 10**7, 123456.789, 12.5, (sign,) * 16))
    assert len(raw) < 2 * 1400
    found = codec.decode_report(codec.encode_report(NodeReport("n", 1, 1, 0, math.inf, math.nan)))
    assert found is not None
    assert (found.at_s, found.late_s) == (0.0, 0.0)
