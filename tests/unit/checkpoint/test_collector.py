"""The pause of the garbage collector ends however its body ends, and leaves a collector that was off alone."""

from __future__ import annotations

import gc

import pytest

from elastictrain_checkpoint.collector import no_collections


def test_nested_pauses_end_with_the_outermost() -> None:
    assert gc.isenabled()
    with no_collections():
        with no_collections():
            assert not gc.isenabled()
        assert not gc.isenabled()
    assert gc.isenabled()
    with pytest.raises(KeyError), no_collections():
        raise KeyError
    assert gc.isenabled()


def test_a_collector_that_was_off_stays_off() -> None:
    gc.disable()
    try:
        with no_collections():
            assert not gc.isenabled()
        assert not gc.isenabled()
    finally:
        gc.enable()
