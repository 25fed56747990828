"""A run with one worker lost, one joined and one drained, written as the run writes it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from elastictrain.job import parse_job
from elastictrain.observe import RunDirectory

STEPS = 40


def job(**changes: Any) -> Any:
    base = {"recipe": "a:B", "data": {"kind": "jsonl", "path": "x"}, "steps": STEPS, "name": "gpt"}
    return parse_job(base | {"workers": {"max": 3}} | changes)


def change(run: RunDirectory, kind: str, generation: int, step: int, worlds: tuple[int, int], **facts: Any) -> None:
    data = {"cause": "signal 9", "generation": generation, "workers": [], "joined": [], "left": [], "step": step}
    data |= {"detected_s": 900.0, "parked_s": 0.1, "sealed_s": 0.25, "seconds": 0.25, "steps_redone": 0}
    data |= {"world_before": worlds[0], "world_after": worlds[1], "restored_from": None}
    run.event(kind, data | facts)
    run.event("running", {"generation": generation, "step": step, "world": worlds[1], "held_once": 0})


def tell(path: Path, *, end: str | None = "finished") -> RunDirectory:
    generation, world = 1, 3
    with RunDirectory.create(path, job()) as run:
        run.event("run_started", {"name": "gpt", "world": 3, "steps": STEPS})
        run.event("running", {"generation": 1, "step": 0, "world": 3, "held_once": 0})
        for step in range(1, STEPS + 1):
            if step == 11:
                run.event("worker_lost", {"worker": 1, "cause": "signal 9", "generation": 1})
                change(run, "recovery", 2, 10, (3, 2), workers=[1], steps_redone=1)
                generation, world = 2, 2
            if step == 21:
                change(run, "resized", 3, 20, (2, 3), joined=[3], cause="a worker is ready")
                generation, world = 3, 3
            if step == 31:
                change(run, "resized", 4, 30, (3, 2), left=[0], cause="drain")
                generation, world = 4, 2
            row: dict[str, Any] = {
                "step": step,
                "generation": generation,
                "world": world,
                "loss": 10.0 / step,
                "tokens": 100,
            }
            row |= {"step_s": 0.5, "samples": 4}
            if step == 15:
                row |= {"loss": float("nan"), "skipped": {"lanes": [3]}}
            if step % 20 == 0:
                row |= {"evaluation": {"accuracy": step / STEPS}}
            run.row(row)
        if end is not None:
            run.event(end, {"step": STEPS, "digest": "ab12" if end == "finished" else None, "error": None})
    return RunDirectory.open(path)
