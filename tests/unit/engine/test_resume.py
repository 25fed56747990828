"""Where a run starts: the step, what is known of it, and what is given up."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from elastictrain.data.stages import Skip, first_stage, open_stage
from elastictrain.engine.resume import find_start, older_offer
from elastictrain.engine.saver import Saver
from elastictrain.engine.saving import owned_state
from elastictrain.errors import ConfigError, CorruptCheckpoint
from elastictrain.job import Job
from elastictrain.layout import Shard
from elastictrain.protocol import Restore, Stage
from tests.unit.engine.worlds import NetRecipe, committed, make_job, started


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Job:
    """A job with checkpoints of steps 2 and 4 (generation 3) and 6 (generation 5)."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"x": number, "y": 1}) + "\n" for number in range(64)))
    made = make_job(NetRecipe(), lanes=2, lane_batch_size=2, checkpoint={"path": str(tmp_path / "ckpt"), "keep": 10})
    made = made.model_copy(
        update={"data": made.data.model_copy(update={"path": str(rows), "columns": ("x", "y"), "rows_per_block": 16})}
    )
    for step, generation in ((2, 3), (4, 3), (6, 5)):
        store(made, step, generation)
    return made


def store(job: Job, step: int, generation: int) -> None:
    assert job.checkpoint is not None
    model, stage = started(job), first_stage(job)
    shard = Shard(0, len(model.space.blocks), 0, None)
    saver = Saver(job.checkpoint)
    owned = owned_state(model.flat, model.held, [shard], with_counters=True)
    source = open_stage(job, stage)
    tree: dict[str, Any] = {
        "seed": job.seed,
        "data": dict(source.fingerprint),
        "stages": [{"index": 0, "from_step": 0, "lanes": stage.lanes, "lane_batch_size": stage.lane_batch_size}],
    }
    source.close()
    committed(
        saver,
        [saver.begin(owned, step=step, generation=generation, worker=0).share()],
        step=step,
        generation=generation,
        tree=tree,
        aliases=model.space.aliases,
        info={},
    )


def path_of(job: Job, step: int) -> str:
    assert job.checkpoint is not None
    return f"{job.checkpoint.path}/step-{step:08d}"


def test_the_newest_is_gone_on_from_and_nothing_is_given_up(job: Job) -> None:
    start = find_start(job, resume=True)
    assert start.restore == Restore(6, path_of(job, 6), insist=True)
    assert start.checkpoints == tuple((step, path_of(job, step)) for step in (2, 4, 6))
    assert start.notes == ()
    assert (start.resumed, start.generation) == (True, 5)


def test_an_older_one_gives_up_what_came_after_it_and_says_so(job: Job) -> None:
    start = find_start(job, resume=True, step=2)
    assert start.restore == Restore(2, path_of(job, 2), insist=True)
    assert start.notes == (("given_up", {"step": 2, "steps": [4, 6]}),)
    assert start.checkpoints == ((2, path_of(job, 2)),), "a later one is no place to go back to"
    assert start.generation == 5, "above all that has committed, else the first commit would be refused"


def test_giving_up_is_said_beside_a_new_stage(job: Job) -> None:
    start = find_start(job.model_copy(update={"lanes": 3}), resume=True, step=4)
    assert [kind for kind, _ in start.notes] == ["stage", "given_up"]
    assert [(stage.index, stage.from_step, stage.lanes) for stage in start.stages] == [(0, 0, 2), (1, 4, 3)]


def test_a_step_that_is_not_there_is_refused_with_those_that_are(job: Job) -> None:
    with pytest.raises(ConfigError, match=r"^--resume-step 3: .*ckpt has steps 2, 4, 6; choose one of them$"):
        find_start(job, resume=True, step=3)


def damage(job: Job, step: int) -> None:
    assert job.checkpoint is not None
    pack = next((Path(job.checkpoint.path) / f"step-{step:08d}").rglob("*.safetensors"))
    raw = bytearray(pack.read_bytes())
    raw[-5] ^= 1
    pack.write_bytes(raw)


def test_when_the_newest_one_is_damaged_the_newest_older_good_one_is_offered(job: Job) -> None:
    """Workers find it as they restore, and then the run ends (`Restore.insist`)."""
    damage(job, 6)
    assert find_start(job, resume=True).restore.insist
    assert older_offer(job, 6) == "take the older step 4 with --resume-step 4"
    damage(job, 4)
    assert older_offer(job, 6) == "take the older step 2 with --resume-step 2"
    assert find_start(job, resume=True, step=2).notes == (("given_up", {"step": 2, "steps": [4, 6]}),)
    damage(job, 2)
    assert older_offer(job, 6) == "there is no older one that is whole"


def test_one_that_is_cut_short_is_refused_before_anything_starts(job: Job) -> None:
    assert job.checkpoint is not None
    pack = next((Path(job.checkpoint.path) / "step-00000006").rglob("*.safetensors"))
    pack.write_bytes(pack.read_bytes()[:-1])
    with pytest.raises(CorruptCheckpoint, match=r"step 6 is damaged: .*take it with --resume-step 4$"):
        find_start(job, resume=True)


def test_a_new_run_leaves_the_checkpoints_of_another_alone(job: Job) -> None:
    with pytest.raises(ConfigError, match=r"already holds checkpoints \(steps 2, 4, 6\); go on with them \(--resume\)"):
        find_start(job, resume=False)


def test_what_is_to_be_skipped_becomes_a_stage_from_the_checkpoint_on(job: Job) -> None:
    skips = [Skip("steps 6 to 7", 5, 7, order=0), Skip("a row", 3, 4, block=1)]
    start = find_start(job, resume=True, step=4, skips=skips)
    assert start.stages[-1] == Stage(
        1, 4, 2, 2, continues=True, begun=0, at=4, jumps=((5, 7),), holes=((1, 3, 4, 4),), skips=2
    )
    kind, said = start.notes[0]
    assert (kind, said["step"], said["what"]) == ("data_skipped", 4, ["steps 6 to 7", "a row"])
    assert start.data["hash"] == find_start(job, resume=True).data["hash"], "what is skipped is no change of the data"
    both = find_start(job.model_copy(update={"lanes": 3}), resume=True, step=4, skips=skips)
    assert [(stage.index, stage.order, stage.skips) for stage in both.stages] == [(0, 0, 0), (1, 1, 0), (2, 1, 2)]
    assert both.stages[-1].jumps == (), "they were steps of an order that is not in force any more"
