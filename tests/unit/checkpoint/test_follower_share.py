"""Copies take no more than their share of a processor, until somebody waits for them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastictrain_checkpoint import Follower, Newest, Store, list_steps, load
from elastictrain_checkpoint.following import LONGEST_REST_S, rest_s
from elastictrain_checkpoint.transfer import copy_checkpoint
from tests.unit.checkpoint.build import make_state, save

STATE = make_state({"model/a": ("U8", (20_500_000,))})
BLOCKS = 20


class Noted(threading.Condition):
    """Notes how long the thread that copies is ready to wait; waits at all only where it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[float] = []
        self.really = False
        self.waits = threading.Event()

    def wait_for(self, predicate: Callable[[], Any], timeout: float | None = None) -> Any:
        if threading.current_thread().name != "elastictrain-copies" or timeout is None:
            return super().wait_for(predicate, timeout)
        self.asked.append(timeout)
        if self.really:
            self.waits.set()
            return super().wait_for(predicate, 60)
        return predicate()


class Work:
    """A processor that has worked so much more each time it is asked."""

    def __init__(self, each_s: float) -> None:
        self.each_s, self.sum_s = each_s, 0.0

    def __call__(self) -> float:
        self.sum_s += self.each_s
        return self.sum_s


def scene(folder: Path, **settings: Any) -> tuple[Follower, Noted]:
    near = Store(folder / "near")
    save(near, STATE, step=2)
    follower, noted = Follower(near, Store(folder / "far"), Newest(9), **settings), Noted()
    follower._changed = noted
    return follower, noted


def test_after_every_block_the_work_is_made_up_for(tmp_path: Path) -> None:
    follower, noted = scene(tmp_path, share=0.2, worked=Work(0.01))
    follower.serve()
    assert follower.wait(60)
    follower.rest()
    assert noted.asked.count(pytest.approx(0.04)) >= BLOCKS
    assert noted.asked == pytest.approx([0.04] * len(noted.asked)), "also after calls that move no block"
    assert list_steps(Store(tmp_path / "far")) == [2]


def test_what_one_rest_could_not_make_up_for_the_next_ones_do(tmp_path: Path) -> None:
    work = Work(0.0)
    follower, noted = scene(tmp_path, share=0.5, worked=work)
    work.sum_s = 2.5
    over = threading.Event()
    thread = threading.Thread(target=lambda: [follower._rest(over) for _ in range(4)], name="elastictrain-copies")
    thread.start()
    thread.join(60)
    assert noted.asked == pytest.approx([1.0, 1.0, 0.5, 0.0])


def test_packs_that_are_there_already_are_read_at_the_same_pace(tmp_path: Path) -> None:
    asked = []
    for name in ("sent", "there"):
        follower, noted = scene(tmp_path / name, share=0.2, worked=Work(0.01))
        near, far = Store(tmp_path / name / "near"), Store(tmp_path / name / "far")
        if name == "there":
            copy_checkpoint(near, load(near, 2), far)
            far.remove(load(far, 2).path)
        follower.serve()
        assert follower.wait(60)
        follower.rest()
        assert list_steps(far) == [2]
        asked.append(len(noted.asked))
    assert asked[1] >= asked[0] > BLOCKS, "as often as if every block had been sent"


def test_who_hurries_ends_a_rest_and_there_is_no_other(tmp_path: Path) -> None:
    follower, noted = scene(tmp_path, share=0.2, worked=Work(0.01))
    noted.really = True
    follower.serve()
    assert noted.waits.wait(60)
    follower.hurry()
    assert follower.wait(60)
    follower.rest()
    assert list_steps(Store(tmp_path / "far")) == [2]


def test_who_is_told_to_stop_stops_in_a_rest(tmp_path: Path) -> None:
    follower, noted = scene(tmp_path, share=0.2, worked=Work(0.01))
    noted.really = True
    follower.serve()
    assert noted.waits.wait(60)
    thread = next(one for one in threading.enumerate() if one.name == "elastictrain-copies")
    follower.rest()
    thread.join(60)
    assert not thread.is_alive()
    assert list_steps(Store(tmp_path / "far")) == []


@pytest.mark.parametrize("share", [0.0, -1.0, 1.1])
def test_a_share_is_a_part_of_a_processor(tmp_path: Path, share: float) -> None:
    with pytest.raises(ValueError, match="not a part of a processor"):
        scene(tmp_path, share=share)


@given(st.floats(0.0, 1e6), st.floats(0.001, 1.0))
def test_work_and_rest_make_up_the_share(worked: float, share: float) -> None:
    rest = rest_s(worked, share)
    assert 0 <= rest <= LONGEST_REST_S
    assert rest == LONGEST_REST_S or worked <= share * (worked + rest) * (1 + 1e-9) + 1e-12
    assert rest_s(-worked, share) == 0
