"""What a controller leaves for the next one: numbers that only one can take, and lines that are whole."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from elastictrain_actors.journal_file import JournalFile, Replaced, begin_anew

Open = Callable[[], JournalFile]


@pytest.fixture
def controller(tmp_path: Path) -> Iterator[Open]:
    """Another controller begins."""
    begun: list[JournalFile] = []

    def begin() -> JournalFile:
        begun.append(JournalFile(tmp_path))
        return begun[-1]

    yield begin
    for journal in begun:
        journal.close()


def test_every_controller_gets_a_number_of_its_own(controller: Open) -> None:
    assert [controller().epoch for _ in range(3)] == [1, 2, 3]


def test_a_controller_that_was_replaced_writes_nothing(controller: Open) -> None:
    old = controller()
    old.append("one")
    new = controller()
    with pytest.raises(Replaced, match=r"controller 1 of .* has been replaced"):
        old.append("two")
    new.append("three")
    assert new.lines() == ["one", "three"]


def test_what_a_predecessor_has_taken_is_ours_and_not_the_other_way_round(controller: Open) -> None:
    old = controller()
    assert old.claim(1)
    new = controller()
    assert new.claim(1), "its journal led us to the same plan"
    assert new.claim(2)
    assert not old.claim(2), "it knows nothing of this one"
    assert old.claim(1)


def test_a_line_that_its_writer_did_not_finish_is_cut_off(controller: Open, tmp_path: Path) -> None:
    first = controller()
    first.append("whole")
    with (tmp_path / "journal.jsonl").open("a") as file:
        file.write("torn")
    again = controller()
    again.append("next")
    assert again.lines() == ["whole", "next"]


def test_a_resumed_run_begins_a_new_journal_above_all_generations(controller: Open, tmp_path: Path) -> None:
    assert begin_anew(tmp_path) == 0
    for number in (1, 2):
        journal = controller()
        journal.append(f"run {number}")
        journal.claim(7 * number)
        journal.close()
        assert begin_anew(tmp_path) == 7 * number
    assert controller().lines() == []
    assert [(tmp_path / f"journal-{n}.jsonl").read_text() for n in (1, 2)] == ["run 1\n", "run 2\n"]
