"""`plan: auto`: the job with as many workers as are quickest by the planner's cost model."""

from __future__ import annotations

from typing import Any

from elastictrain.data import open_data
from elastictrain.data.reader import LaneReader
from elastictrain.engine.describe import describe
from elastictrain.errors import CapacityError, RecipeError
from elastictrain.job import Job
from elastictrain.planner.advice import smallest_help
from elastictrain.planner.auto import choose_workers, pace_of, told
from elastictrain.planner.pace import Pace
from elastictrain.planner.profiles import Cluster, load_cluster
from elastictrain.planner.workload import Workload


def plan_job(job: Job) -> tuple[Job, dict[str, Any], Pace]:
    """The job with `workers.max` as chosen, and what there is to tell: `workers`, `step_s`, `said` (sentences). Then
    what the controller goes by when the world changes.

    Nothing of the mathematics changes, so neither do the bits. Raises ConfigError (the cluster file), RecipeError (a
    model that cannot be looked at without data), CapacityError (it fits nowhere).
    """
    assert job.cluster is not None  # the job's validator
    cluster = load_cluster(job.cluster)
    try:
        work = look_at(job)
    except RecipeError as error:
        raise RecipeError(f"plan: auto is not possible for this recipe; remove `plan` from the job: {error}") from error
    limits = job.workers
    choice = choose_workers(work, cluster, limits.min, limits.max)
    if choice is None:
        if cluster.size < limits.min:
            raise CapacityError(
                f"plan: auto: workers.min={limits.min}, but {job.cluster} has {cluster.size} devices; lower "
                "workers.min or correct the file"
            )
        raise CapacityError(
            f"plan: auto: a model of {work.params:,} parameters, whole on every worker, does not fit on {limits.min} "
            f"to {limits.max} devices of {job.cluster}; {smallest_help(lambda other: _fits(work, other, job), cluster)}"
        )
    workers = limits.model_copy(update={"max": choice.workers})
    note = {
        "workers": choice.workers, "step_s": choice.split.step_s, "said": told(choice, cluster, limits.max),
        "others": {str(count): seconds for count, seconds in sorted(choice.others.items())},
    }  # fmt: skip
    return job.model_copy(update={"workers": workers}), note, pace_of(work, cluster, choice)


def look_at(job: Job) -> Workload:
    """The job's model with the samples of one lane."""
    # Of a live source the files that are there show what a batch is like; their order does not matter here.
    data = job.data.settled().model_copy(update={"batch_dtype": "int64"})  # as the recipe gets it
    source = open_data(data, seed=job.seed, lanes=job.lanes, lane_batch_size=job.lane_batch_size)
    try:
        return describe(job, LaneReader(source).batch(1, 0))
    finally:
        source.close()


def _fits(work: Workload, cluster: Cluster, job: Job) -> bool:
    return choose_workers(work, cluster, job.workers.min, job.workers.max) is not None
