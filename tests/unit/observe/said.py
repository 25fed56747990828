"""Events and the sentences that are said of them: kind, data, words."""

from __future__ import annotations

from typing import Any

CHANGE = {"seconds": 0.314, "steps_redone": 1, "world_before": 3, "world_after": 2, "cause": "killed by signal 9"}
NODE = "0a1b2c3d" + "e" * 48

FOUR_TAKE_PART, BY_MODEL = "plan: auto: 4 workers take part", "(cost model, and speeds learned so far)"
SAID: list[tuple[str, dict[str, Any], str]] = [
    ("run_started", {"name": "gpt", "world": 3, "steps": 50}, "run started (gpt) with 3 workers, 50 steps"),
    ("run_resumed", {"step": 7}, "run resumed at step 7"),
    ("worker_started", {"worker": 2}, "worker 2 is starting"),
    ("worker_ready", {"worker": 2, "domain": "node-a"}, "worker 2 is ready on node-a"),
    ("worker_ready", {"worker": 2, "domain": "0a1b2c3d" + "e" * 48}, "worker 2 is ready on node 0a1b2c3d"),
    (
        "worker_prepared",
        {"worker": 2, "domain": "node-a", "prepared_s": {"model_s": 1.5, "data_s": 0.25}},
        "worker 2 is prepared on node-a after 1.8 s",
    ),
    (
        "slow_start",
        {"worker": 2, "asked": {"cpus": 2.0, "gpus": 1}, "free": {"CPU": 0.5}},
        "worker 2 has not started yet: it needs 2 CPU, 1 GPU, free are 0.5 CPU",
    ),
    (
        "slow_start",
        {"worker": 2, "asked": {"cpus": 1, "gpus": 0.0}, "free": {}},
        "worker 2 has not started yet: it needs 1 CPU, free are none",
    ),
    (
        "slow_start",
        {"worker": 2, "asked": {"cpus": 1, "gpus": 0.0}, "free": None},
        "worker 2 has not started yet: the head of the Ray cluster does not answer",
    ),
    ("feeder_started", {"node": NODE, "workers": [0, 1]}, "the feeder of node 0a1b2c3d reads for the workers there"),
    (
        "feeder_lost",
        {"node": NODE, "reason": "The actor died."},
        "the feeder of node 0a1b2c3d is lost, its workers read for themselves until there is another: The actor died.",
    ),
    (
        "feeder_failed",
        {"node": NODE, "error": "DataError: no"},
        "the feeder of node 0a1b2c3d cannot open the data, its workers read for themselves: DataError: no",
    ),
    (
        "stage",
        {"stage": 1, "step": 6, "lanes_before": 1, "lanes": 8, "lane_batch_size_before": 2, "lane_batch_size": 2},
        "a new stage of the data order after step 6: lanes 1 → 8",
    ),
    (
        "stage",
        {"stage": 1, "step": 6, "lanes_before": 4, "lanes": 8, "lane_batch_size_before": 1, "lane_batch_size": 2},
        "a new stage of the data order after step 6: lanes 4 → 8, samples per lane 1 → 2",
    ),
    (
        "data_changed",
        {"step": 6, "changes": ["b.parquet is new", "c.parquet is missing"], "left": []},
        "the data have changed, and are a new stage of the order after step 6: b.parquet is new; c.parquet is missing",
    ),
    (
        "data_skipped",
        {"stage": 1, "step": 100, "what": ["steps 118 to 317", "a.parquet, row group 3"]},
        "taken out of the data after step 100: steps 118 to 317; a.parquet, row group 3",
    ),
    (
        "watch_ended",
        {"reason": "ZeroDivisionError: by zero"},
        "slow workers are not looked for any more: ZeroDivisionError: by zero",
    ),
    ("data_awaited", {"worker": 1, "reason": "step 9: s3://b/s"}, "training waits for data: step 9: s3://b/s"),
    ("start_failed", {"worker": 2, "error": "no module x", "attempts": 1}, "worker 2 could not start: no module x"),
    ("start_paused", {"after_s": 30, "error": "e"}, "no new workers for now, next try in 30 s: e"),
    ("worker_lost", {"worker": 1, "cause": "killed by signal 9"}, "worker 1 is lost: killed by signal 9"),
    ("unresponsive", {"worker": 1, "reason": "no answer"}, "worker 1 does not answer: no answer"),
    ("parking", {"generation": 3, "cause": "c"}, "generation 3 parks: c"),
    ("gathering", {"parked": [0, 2], "reason": "too few"}, "waiting, parked: [0, 2]: too few"),
    (
        "forming",
        {"generation": 2, "step": 9, "workers": [0, 2], "blocks_moved": 1},
        "generation 2 is forming with 2 workers at step 9; 1 block to copy",
    ),
    (
        "running",
        {"generation": 2, "step": 9, "world": 1, "held_once": 4},
        "generation 2 sealed with 1 worker at step 9; 4 blocks held once",
    ),
    (
        "recovery",
        CHANGE | {"workers": [1]},
        "recovered from the loss of worker 1: killed by signal 9; 0.31 s, 1 step redone, world 3 → 2",
    ),
    (
        "recovery",
        CHANGE | {"workers": [0, 1, 4], "restored_from": "/ckpt/5"},
        (
            "recovered from the loss of workers 0, 1 and 4: killed by signal 9; 0.31 s, 1 step redone, world 3 → 2, "
            "restored from /ckpt/5"
        ),
    ),
    (
        "resized",
        CHANGE | {"joined": [3], "left": [0], "steps_redone": 0},
        "worker 3 joined and worker 0 left; 0.31 s, 0 steps redone, world 3 → 2",
    ),
    (
        "went_back",
        {"from_step": 9, "to_step": 5, "restored_from": "/ckpt/5", "reason": "both gone"},
        "went back to step 5 from step 9, restored from /ckpt/5: both gone",
    ),
    ("checkpoint", {"step": 5, "path": "/c"}, "checkpoint of step 5 committed at /c"),
    (
        "checkpoint_copied",
        {"step": 40, "path": "s3://b/c", "waiting": [20, 30]},
        "checkpoint of step 40 copied to s3://b/c; still to be copied: 20, 30",
    ),
    (
        "copy_failed",
        {"path": "s3://b/c", "error": "OSError: it is full", "waiting": [1, 2, 3, 4, 5, 6]},
        (
            "checkpoints cannot be copied to s3://b/c: OSError: it is full; the run goes on, and it is tried again; "
            "still to be copied: 6 steps, the newest 2, 3, 4, 5, 6"
        ),
    ),
    (
        "copy_works",
        {"path": "s3://b/c", "waiting": []},
        "checkpoints can be copied to s3://b/c again",
    ),
    (
        "place_silent",
        {"path": "s3://b/c", "error": "no answer within 120 s"},
        "s3://b/c does not answer: no answer within 120 s; the run goes on without what lies there",
    ),
    (
        "checkpoint_given_up",
        {"step": 4, "begun_in": 1, "why": "worker 1 died; not all of it was written", "stored_instead": 5},
        "checkpoint of step 4 given up: worker 1 died; not all of it was written; step 5 is stored instead",
    ),
    (
        "checkpoint_given_up",
        {"step": 4, "begun_in": 1, "why": "worker 1 died", "stored_instead": 4},
        "checkpoint of step 4 given up: worker 1 died; it is written anew",
    ),
    (
        "checkpoint_given_up",
        {"step": 4, "begun_in": 1, "why": "all died", "stored_instead": None},
        "checkpoint of step 4 given up: all died; nothing is stored before the next one is due",
    ),
    (
        "checkpoint_dropped",
        {"step": 5, "path": "/c/5", "next_step": 3, "error": "pack-0 differs"},
        "checkpoint refused, step 5 at /c/5, taking step 3 instead: pack-0 differs",
    ),
    (
        "restored",
        {
            "step": 5,
            "stored_bytes": 19_000_000,
            "read_bytes": 19_500_000,
            "read_by_worker": {"0": 9_500_000, "2": 10**7},
        },
        "checkpoint of step 5 restored: 19.5 MB read of 19.0 MB stored, by 2 workers",
    ),
    (
        "started_from",
        {"checkpoint": "s3://b/a", "step": 40, "tensors": 9, "kept": ["x"], "skipped": ["y", "z"]},
        "begins with the weights of s3://b/a, step 40: 9 tensors, 1 kept as the recipe made them, 2 not taken",
    ),
    (
        "started_from",
        {"checkpoint": "hf", "step": None, "tensors": 9, "kept": [], "skipped": []},
        "begins with the weights of hf: 9 tensors",
    ),
    ("refused", {"request": "drain", "reason": "workers.min"}, "refused to drain: workers.min"),
    (
        "skipped",
        {"step": 4, "lane": 3, "worker": 1},
        "step 4 skipped on all workers alike: not finite in lane 3 (worker 1)",
    ),
    ("skipped", {"step": 4, "lanes": [3, 5]}, "step 4 skipped on all workers alike: not finite in lanes 3, 5"),
    (
        "numerics_differ",
        {"differences": ["worker 3 is AVX2", "not AVX-512"]},
        "numerics differ: worker 3 is AVX2; not AVX-512",
    ),
    (
        "fault",
        {"do": "kill", "worker": 1, "step": 7, "phase": "vote"},
        "fault on purpose: kill worker 1 at step 7, in vote",
    ),
    ("finished", {"step": 50, "digest": "ab"}, "finished at step 50, digest ab"),
    ("failed", {"step": 5, "error": "loss is NaN"}, "failed at step 5: loss is NaN"),
    ("stopped", {"step": 5, "reason": "asked"}, "stopped at step 5: asked"),
    (
        "frozen",
        {"worker": 1, "node": "n", "reason": "no sign of life for 2.1 s", "evidence": ["state T"]},
        "worker 1 is frozen: no sign of life for 2.1 s",
    ),
    (
        "frozen",
        {"worker": 1, "reason": "silent", "blocks_held_alone": 4, "grace_s": 2.0},
        "worker 1 is frozen: silent; it gets 2 s to answer, since it alone holds 4 blocks",
    ),
    ("doomed", {"worker": 1, "node": "n", "reason": "frozen", "blocks_held_alone": 0}, "worker 1 is killed: frozen"),
    (
        "hung",
        {"generation": 3, "reason": "all wait in exchange", "suspect": 2, "times": 1, "blamed": False},
        "generation 3 hangs, all wait for each other: all wait in exchange; worker 2 is suspected",
    ),
    (
        "hung",
        {"generation": 3, "reason": "again", "suspect": 2, "times": 2, "blamed": True},
        "generation 3 hangs, all wait for each other: again; worker 2 is blamed",
    ),
    (
        "node_lost",
        {"node": NODE, "workers": [1, 2], "reason": "no round trip for 1.5 s"},
        "node 0a1b2c3d is lost with workers 1 and 2: no round trip for 1.5 s",
    ),
    (
        "worker_lost",
        {"worker": 1, "cause": f"its node {NODE} is lost"},
        "worker 1 is lost: its node 0a1b2c3d is lost",
    ),
    (
        "node_set_aside",
        {"node": "node-a", "failures": ["died", "frozen"], "after_s": 600.0},
        "node-a is set aside for 600 s, too much has failed there: died, frozen",
    ),
    ("node_taken_back", {"node": NODE}, "node 0a1b2c3d may be used again"),
    (
        "preemption",
        {"node": NODE, "workers": [3], "reason": "spot", "notice_s": 119.7},
        "node 0a1b2c3d goes in 120 s; worker 3 will have handed over by then: spot",
    ),
    (
        "controller_back",
        {"gone_s": 3.14, "phase": "running"},
        "the controller is back after 3.1 s (the workers stepped on)",
    ),
    ("controller_back", {"gone_s": 3.14, "phase": "forming"}, "the controller is back after 3.1 s"),
    (
        "agent_unheard",
        {"node": "a", "seconds": 31.0, "address": "h:udp", "consequence": "only Ray will notice its loss"},
        "the agent of a is not heard, for 31 s now: only Ray will notice its loss",
    ),
    ("storage_stalled", {"reason": "all read", "evidence": []}, "the storage stands still: all read"),
    (
        "incident",
        {"cause": "signal 9", "outcome": "recovered", "seconds": {"total": 0.42}},
        "incident over (signal 9): first commit 0.42 s after the first sign of trouble",
    ),
    (
        "incident",
        {"cause": "signal 9", "outcome": "overtaken", "seconds": {"total": None}},
        "incident (signal 9): overtaken by the next one before the first commit",
    ),
    (
        "incident",
        {"cause": "signal 9", "outcome": "stopped", "seconds": {}},
        "incident ended with the run, which was stopped (signal 9)",
    ),
    (
        "straggler",
        {"what": "slow", "worker": 3, "cause": "compute", "reason": "since step 9 its lanes take 2.00 x"},
        "worker 3 is slow (compute): since step 9 its lanes take 2.00 x",
    ),
    ("straggler", {"what": "slow", "worker": None, "cause": "link"}, "the network is slow (link)"),
    (
        "straggler",
        {"what": "recovered", "worker": 3, "cause": "data"},
        "worker 3 is as fast again as it was (data)",
    ),
    ("straggler", {"what": "nonsense", "worker": 3, "reason": "ignored"}, "worker 3 reports nonsense: ignored"),
    (
        "straggler",
        {"what": "slow", "worker": 3, "cause": "compute", "factor": 0.7},
        "worker 3 is still slow, though less (compute)",
    ),
    (
        "straggler",
        {"what": "faster", "worker": 0, "cause": "compute", "factor": 0.5},
        "worker 0 is faster than it was before (compute)",
    ),
    ("straggler", {"what": "imbalance", "worker": 3, "cause": "work"}, "worker 3 has more work than others"),
    (
        "lanes_moved",
        {
            "action": "move_lanes",
            "lanes": {"2": [4, 2], "0": [4, 6]},
            "before_s": 8.0,
            "after_s": 5.0,
            "reason": "slow",
        },
        "lanes move: worker 2 4 → 2, worker 0 4 → 6; 8 s of computation a step, expected 5 s: slow",
    ),
    (
        "lanes_moved",
        {"action": "move_back", "lanes": {str(w): [1, 2] for w in range(10)}},
        "lanes are moved back: " + ", ".join(f"worker {w} 1 → 2" for w in range(8)) + ", 2 more",
    ),
    (
        "straggler_leaves",
        {"action": "replace", "worker": 3, "before_s": 8.0, "after_s": 5.0, "reason": "x"},
        "worker 3 is too slow and gives its place to a spare; 8 s of computation a step, expected 5 s: x",
    ),
    ("straggler_leaves", {"action": "leave_out", "worker": 3}, "worker 3 is too slow and is left out"),
    (
        "workers_waiting",
        {"workers": [0, 1, 2, 4], "waiting": [5], "step_s": 0.5, "all_s": 0.51},
        f"{FOUR_TAKE_PART}, worker 5 waits as a spare: 0.5 s a step, 0.51 s with all {BY_MODEL}",
    ),
    (
        "lanes_refused",
        {"lanes": {"0": 6, "2": 2}, "reason": "worker 0 has 7 bytes", "step": 9},
        "lanes stay as they are: another split (worker 0 6, worker 2 2) does not fit: worker 0 has 7 bytes",
    ),
    *(
        (
            "lanes_refused",
            {"lanes": {"0": 6}, "instead": instead, "reason": "full"},
            f"{words}: another split (worker 0 6) does not fit: full",
        )
        for instead, words in (
            ("nothing", "lanes stay as they are"),
            ("smaller_move", "fewer lanes move than speeds ask for"),
            ("replace", "a slow worker is replaced, since lanes cannot move as speeds ask for"),
            ("leave_out", "a slow worker is left out, since lanes cannot move as speeds ask for"),
        )
    ),
    (
        "lanes_refused",
        {"lanes": {str(w): 2 for w in range(10)}, "reason": ""},
        "lanes stay as they are: another split ("
        + ", ".join(f"worker {w} 2" for w in range(8))
        + ", 2 more) does not fit",
    ),
    ("finished", {"digest": "ab" * 32}, "finished, digest " + "ab" * 32),
    ("new_kind", {"a": 1, "b": "x"}, "new kind: a=1, b=x"),
    ("went_back", {"unknown": 1}, "went back: unknown=1"),
]
