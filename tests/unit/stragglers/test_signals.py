"""The record: its size, what comes back of it, and what is not believed."""

from __future__ import annotations

import math

import numpy as np
import pytest

from elastictrain.stragglers.signals import RECORD_BYTES, Signal, checked, decode, parts, table


def test_a_record_has_64_bytes_and_comes_back():
    signal = Signal(7, 1.5, 0.25, 2.0, 0.5, 0.125, 0.0625, 0.03125, 4.0, 1e9, 1e13, flags=5)
    raw = signal.encode()
    assert len(raw) == RECORD_BYTES == 64
    (record,) = decode(raw)
    names = ("lanes", "compute_s", "data_s", "arrive_s", "exchange_s", "collected_s", "vote_s", "gather_s", "step_s")
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
