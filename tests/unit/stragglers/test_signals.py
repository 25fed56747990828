"""The record: its size, what comes back of it, and what is not believed."""

from __future__ import annotations

import math

import numpy as np
import pytest

from elastictrain.stragglers.belief import believed
from elastictrain.stragglers.signals import (
    RECORD_BYTES,
    Signal,
    as_dealt,
    checked,
    counted,
    dealt,
    decode,
    parts,
    table,
)


def test_a_record_has_64_bytes_and_comes_back():
    signal = Signal(7, 1.5, 0.25, 2.0, 0.5, 0.125, 0.0625, 0.03125, 4.0, 1e9, 1e13, flags=5, mirror_s=0.375)
    raw = signal.encode()
    assert len(raw) == RECORD_BYTES == 64
    (record,) = decode(raw)
    names = (
        "lanes", "compute_s", "data_s", "arrive_s", "exchange_s", "collected_s", "vote_s", "gather_s", "step_s",
        "mirror_s",
    )  # fmt: skip
    assert {name: record[name] for name in names} == {name: getattr(signal, name) for name in names}
    assert (record["tokens"], record["squares"], record["flags"]) == (1e9, 1e13, 5)


def test_part_of_a_record_is_refused():
    with pytest.raises(ValueError, match="65 bytes are no whole number of records of 64"):
        decode(bytes(65))


@pytest.mark.parametrize("wild", [1e300, -1e300, math.inf, -math.inf, math.nan])
def test_what_does_not_fit_can_be_sent_and_is_not_believed(wild):
    (record,) = decode(Signal(2, wild).encode())
    assert not checked(np.array([record]))[0]


@pytest.mark.parametrize(
    ("wrong", "sound"),
    [
        ({}, True),
        ({"compute_s": -1.0}, False),
        ({"compute_s": 0.0}, False),
        ({"compute_s": math.nan}, False),
        ({"lanes": 0}, False),
        ({"lanes": 0, "compute_s": 0.0}, True),
        ({"data_s": -1e-3}, False),
        ({"arrive_s": math.inf}, False),
        ({"exchange_s": 1e6}, False),
        ({"mirror_s": -1.0}, False),
        ({"mirror_s": math.nan}, False),
        ({"tokens": -5.0}, False),
        ({"squares": math.nan}, False),
    ],
)
def test_what_cannot_be_true_does_not_count(wrong, sound):
    columns = {"lanes": 4, "compute_s": 1.0, "data_s": 0.1, "arrive_s": 1.1, "exchange_s": 0.2} | wrong
    assert checked(table(**{name: [value] for name, value in columns.items()})).tolist() == [sound]


def test_waiting_for_the_last_one_is_no_transfer():
    records = table(arrive_s=[1.0, 1.5, 3.0], exchange_s=[2.2, 1.7, 0.2])
    wait, transfer = parts(records, np.array([True, True, True]))
    assert wait == pytest.approx([2.0, 1.5, 0.0])
    assert transfer == pytest.approx([0.2, 0.2, 0.2])
    wait, transfer = parts(records, np.array([True, True, False]))  # the last one is not believed: nobody waited for it
    assert wait == pytest.approx([0.5, 0.0, 0.0])
    assert transfer[2] == 0.0


def test_who_waits_in_the_mirror_for_a_slow_link_has_none_itself():
    """The exchange of the second one takes 0.4 s longer; the third one mirrors it, the first one does not."""
    records = table(arrive_s=[1.0, 1.0, 1.0], exchange_s=[0.2, 0.6, 0.6], mirror_s=[0.1, 0.1, 0.5])
    wait, transfer = parts(records, np.ones(3, dtype=bool))
    assert transfer == pytest.approx([0.1, 0.6, 0.2])
    assert wait == pytest.approx([0.1, 0.0, 0.4])
    older = records[[name for name in records.dtype.names if name != "mirror_s"]]
    assert parts(older, np.ones(3, dtype=bool))[1] == pytest.approx([0.2, 0.6, 0.6]), "of an older version"
    assert checked(older).tolist() == checked(records).tolist()


def test_lanes_of_others_are_told_apart_from_those_that_were_dealt_out():
    """In the upper half of the flags, so that the record is as it was."""
    said = [
        Signal(6, 1.2, 0.3, tokens=60.0, squares=6.0, flags=5, more=2),
        Signal(2, 0.4, 0.1, tokens=20.0, squares=2.0, flags=2, more=-2),
        Signal(4, 0.8, 0.2, tokens=40.0, squares=4.0),
        Signal(0, 0.0, more=-4),
    ]
    records = decode(b"".join(one.encode() for one in said))
    assert (records["flags"] & 0xFF).tolist() == [5, 2, 0, 0]
    assert dealt(records).tolist() == [4, 4, 4, 4]
    found = as_dealt(records)
    assert found["lanes"].tolist() == [4, 4, 4, 4]
    assert found["compute_s"].tolist() == pytest.approx([0.8, 0.8, 0.8, 0.0])
    assert found["data_s"].tolist() == pytest.approx([0.2, 0.2, 0.2, 0.0])
    assert found["tokens"].tolist() == pytest.approx([40, 40, 40, 0])
    assert found["flags"].tolist() == [5, 2, 0, 0]
    alone = decode(said[2].encode())
    assert as_dealt(alone) is alone


@pytest.mark.parametrize("more", [126, 127, 128, 300, -126, -127, -128, -300])
def test_any_number_of_lanes_of_others_can_be_told(more):
    """With coded lanes a worker computes those of its whole group."""
    records = decode(Signal(500, 50.0, arrive_s=50.0, flags=5, more=more).encode())
    assert counted(records).all()
    assert dealt(records).tolist() == [500 - more]
    found = as_dealt(records)
    assert (found["lanes"][0], found["flags"][0]) == (500 - more, 5)
    assert found["compute_s"][0] == pytest.approx(0.1 * (500 - more))
    assert dealt(found).tolist() == [500 - more]
    assert believed(records, [(500 - more,)]).all()


def test_records_of_older_versions_may_not_say_it():
    records = table(lanes=[500, 4], compute_s=[50.0, 0.4], flags=[127 << 8, 2 << 8])
    assert counted(records).tolist() == [False, True]
