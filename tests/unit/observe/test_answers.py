from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastictrain.observe.answers import Request, answer, progress
from elastictrain.observe.events import Event, make_event

NOW = datetime(2026, 11, 22, 10, 0, 0, tzinfo=UTC)


def event(kind: str, **data: Any) -> Event:
    return make_event(kind, data, time=NOW)


def changed(
    kind: str, before: int, after: int, *, joined: list[int] | None = None, left: list[int] | None = None
) -> Event:
    data = {"cause": "planned pause", "seconds": 0.21, "steps_redone": 0, "workers": []}
    return event(kind, world_before=before, world_after=after, joined=joined or [], left=left or [], **data)


def view(*members: int, **more: Any) -> dict[str, Any]:
    base = {
        "phase": "running",
        "world": len(members),
        "target": len(members),
        "draining": [],
        "spares": [],
        "starting": [],
    }
    return base | {"workers": [{"worker": worker} for worker in members]} | more


ADD, DRAIN, RESIZE, STOP = Request("add"), Request("drain", 1), Request("resize", 4), Request("stop", "asked")
THREE = view(0, 1, 2)

CASES: list[tuple[str, Request, list[Event], dict[str, Any] | None, tuple[str, str] | None]] = [
    ("nothing yet", ADD, [], THREE, None),
    ("refused", DRAIN, [event("refused", request="drain", reason="it is the last one")], None,
     ("refused", "it is the last one")),
    ("another was refused", DRAIN, [event("refused", request="add", reason="full")], None, None),
    ("grown", RESIZE, [event("worker_ready", worker=3), changed("resized", 3, 4, joined=[3])], None,
     ("done", "worker 3 joined; world 3 → 4, a pause of 0.21 s, no step redone")),
    ("on its way", RESIZE, [changed("resized", 2, 3, joined=[3])], view(0, 1, 2, target=4), None),
    ("grown after a loss", RESIZE, [changed("recovery", 3, 4, joined=[3, 4])], None,
     ("done", "workers 3 and 4 joined; world 3 → 4, a pause of 0.21 s, no step redone")),
    ("has that size", RESIZE, [], view(0, 1, 2, 3), ("done", "the run has 4 workers")),
    ("has that size, but not for long", RESIZE, [], view(0, 1, 2, 3, draining=[3]), None),
    ("has that size, but was asked for another", RESIZE, [], view(0, 1, 2, 3, target=5), None),
    ("has that size, parked", RESIZE, [], view(0, 1, 2, 3, phase="parking"), None),
    ("drained", DRAIN, [changed("resized", 3, 2, left=[1])], None,
     ("done", "worker 1 has handed over and left; world 3 → 2, a pause of 0.21 s, no step redone")),
    ("another was drained", DRAIN, [changed("resized", 3, 2, left=[0])], THREE, None),
    ("died first", DRAIN, [event("worker_lost", worker=1, cause="signal 9")], None,
     ("done", "worker 1 is lost: signal 9, before it had handed over")),
    ("another died", DRAIN, [event("worker_lost", worker=2, cause="signal 9")], THREE, None),
    ("joined", ADD, [changed("resized", 3, 4, joined=[3])], None,
     ("done", "worker 3 joined; world 3 → 4, a pause of 0.21 s, no step redone")),
    ("a pause without a joiner", ADD, [changed("resized", 4, 3, left=[0])], None, None),
    ("stopped", STOP, [event("checkpoint", step=8, path="/c/8"), event("stopped", step=8)], None,
     ("done", "the run has stopped after step 8; its state is in the checkpoint /c/8")),
    ("stopped, nothing stored", STOP, [event("checkpoint", step=5, path="/c/5"), event("stopped", step=8)], None,
     ("done", "the run has stopped after step 8; no checkpoint of this step was stored")),
    ("finished before the stop", STOP, [event("finished", step=9)], None,
     ("done", "the run came to its end first: finished at step 9")),
    ("finished before", ADD, [event("finished", step=9)], None,
     ("over", "the run came to its end first: finished at step 9")),
    ("stopped before", RESIZE, [event("stopped", step=9)], None,
     ("over", "the run was stopped first: stopped at step 9")),
    ("failed", STOP, [event("failed", error="no room")], None, ("failed", "the run failed first: failed: no room")),
]  # fmt: skip


@pytest.mark.parametrize(
    ("request_", "since", "now", "expected"), [case[1:] for case in CASES], ids=[c[0] for c in CASES]
)
def test_answer(
    request_: Request, since: list[Event], now: dict[str, Any] | None, expected: tuple[str, str] | None
) -> None:
    found = answer(request_, THREE, since, now)
    assert (found and (found.outcome, found.words)) == expected


@pytest.mark.parametrize("role", ["spares", "starting"])
def test_a_worker_that_holds_nothing_leaves_without_an_event(role: str) -> None:
    before = view(0, 1, 2, **{role: [7]})
    drain = Request("drain", 7)
    assert answer(drain, before, [], before) is None
    assert answer(drain, before, [], view(0, 1, 2, 7)) is None, "it has become a member"
    found = answer(drain, before, [], THREE)
    assert found is not None
    assert (found.outcome, found.words) == ("done", "worker 7 has left; it held nothing, so nobody paused")
    assert answer(drain, THREE, [], THREE) is None, "nobody knows it: that will be refused"


@given(st.permutations([changed("resized", 3, 4, joined=[3]), changed("resized", 4, 3, left=[1]), event("gathering")]))
def test_what_comes_first_decides(since: list[Event]) -> None:
    for request, position in ((ADD, 0), (DRAIN, 1), (RESIZE, 0)):
        for length in range(len(since) + 1):
            found = answer(request, THREE, since[:length], None)
            wanted = [changed("resized", 3, 4, joined=[3]), changed("resized", 4, 3, left=[1])][position]
            assert (found is not None) == (wanted in since[:length])


def test_progress_says_why_it_takes_so_long() -> None:
    assert progress([]) == ""
    assert progress([event("checkpoint", step=1, path="p")]) == ""
    slow = event("slow_start", worker=3, asked={"cpus": 1}, free={})
    assert progress([slow, event("checkpoint", step=1, path="p")]) == (
        "worker 3 has not started yet: it needs 1 CPU, free are none"
    )
    assert progress([slow, event("start_failed", worker=3, error="boom\ntrace")]) == "worker 3 could not start: boom"


def test_requests_in_words() -> None:
    said = [str(request) for request in (ADD, DRAIN, RESIZE, STOP)]
    assert said == ["add a worker", "drain worker 1", "resize to 4 workers", "stop the run"]
    assert [request.arguments for request in (ADD, DRAIN, RESIZE, STOP)] == [(), (1,), (4,), ("asked",)]
    assert Request("drain", 0).arguments == (0,)
