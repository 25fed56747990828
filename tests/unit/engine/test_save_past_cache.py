"""The saves of a run use what the library offers: what training has the time for is written past the page cache."""

from __future__ import annotations

from pathlib import Path

import pytest

from elastictrain.engine.saver import Saver
from elastictrain_checkpoint import posix
from tests.unit.engine.test_saving import pieces_of, store_of, trained
from tests.unit.engine.worlds import NetRecipe, make_job


def test_the_disk_is_asked_whether_it_can_write_past_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of this state is one block, so nothing is live any more when it is written, and there is time."""
    model = trained(make_job(NetRecipe(), lanes=2))
    saver, asked = Saver(store_of(tmp_path)), []
    monkeypatch.setattr(posix.DirectFile, "of", lambda *facts: asked.append(facts))  # this one cannot
    [owned] = pieces_of(model, [[(0, len(model.space.blocks))]])
    writing = saver.begin(owned, step=2, generation=1, worker=0)
    assert writing.handle._ended.wait(60)
    assert len(asked) == 1
    assert writing.share()
