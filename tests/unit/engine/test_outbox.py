"""What a worker says is kept until it is written down, and urgent news ends a poll."""

from __future__ import annotations

import threading

from elastictrain.controller import events as ev
from elastictrain.engine.outbox import MOST_SIGNALS, Outbox
from elastictrain.protocol import Row, StepSignals

LONG_S = 30.0


def row(step: int) -> Row:
    return Row({"step": step})


def progress(step: int) -> ev.Progress:
    return ev.Progress(0.0, 1, step)


SEALED = ev.Sealed(0.0, 1, 0, 0)


def test_nothing_is_forgotten_before_it_is_written_down() -> None:
    outbox = Outbox()
    for step in (1, 2):
        outbox.put(row(step))
    assert outbox.after(0, 0) == (2, [row(1), row(2)])
    assert outbox.after(0, 0) == (2, [row(1), row(2)])  # another controller asks from the beginning
    outbox.put(row(3))
    assert outbox.after(2, 0) == (3, [row(3)])
    assert outbox.after(0, 0) == (3, [row(3)])  # what was written down is not said again
    assert outbox.after(3, 0) == (3, [])


def test_an_order_for_messages_that_are_not_there_yet_is_harmless() -> None:
    outbox = Outbox()
    assert outbox.after(0, 0) == (0, [])
    outbox.put(SEALED)
    assert outbox.after(0, LONG_S) == (1, [SEALED])


def test_rows_wait_for_the_end_of_the_poll_and_news_end_it() -> None:
    outbox = Outbox()
    outbox.put(row(1))
    outbox.put(progress(1))
    assert outbox.after(0, 0.01) == (2, [row(1), progress(1)])
    threading.Timer(0.05, outbox.put, [SEALED]).start()
    assert outbox.after(2, LONG_S) == (3, [SEALED])  # within the test's time limit: the poll was ended by the seal


def test_the_first_commit_after_a_seal_is_news_the_next_is_not() -> None:
    outbox = Outbox()
    outbox.put(SEALED)
    outbox.after(0, LONG_S)
    outbox.put(progress(5))
    assert outbox.after(1, LONG_S) == (2, [progress(5)])
    outbox.put(progress(6))
    assert outbox.after(2, 0.01) == (3, [progress(6)])


def test_urgent_messages_that_were_not_written_down_end_the_next_poll_at_once() -> None:
    outbox = Outbox()
    outbox.put(SEALED)
    assert outbox.after(0, LONG_S)[0] == 1
    assert outbox.after(0, LONG_S) == (1, [SEALED])


def test_signals_are_not_kept_for_ever_while_nobody_listens() -> None:
    outbox = Outbox()
    for step in range(MOST_SIGNALS + 10):
        outbox.put(StepSignals(1, step, b""))
        outbox.put(Row({"step": step}))
    number, messages = outbox.after(0, 0.0)
    assert number == len(messages) == 2 * MOST_SIGNALS + 10, "and every row is"
    assert [m.step for m in messages if isinstance(m, StepSignals)] == list(range(MOST_SIGNALS))
    outbox.after(number, 0.0)
    outbox.put(StepSignals(1, 7, b""))
    assert outbox.after(number, 0.0)[1] == [StepSignals(1, 7, b"")]


def test_signals_say_how_long_they_have_waited() -> None:
    """Asked for again by another controller, they are older."""
    now_s = 10.0
    outbox = Outbox(clock=lambda: now_s)
    outbox.put(StepSignals(1, 7, b""))
    outbox.put(Row({"step": 7}))
    for now_s in (12.5, 40.0):
        (signals, _) = outbox.after(0, 0.0)[1]
        assert isinstance(signals, StepSignals)
        assert signals.age_s == now_s - 10.0
