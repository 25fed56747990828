"""From a job and what is known of its model to what the controller must know."""

from __future__ import annotations

from elastictrain.controller.facts import GradientSpec, MachineSpec, StragglerSpec
from elastictrain.job import Job
from elastictrain.planner.pace import Pace
from elastictrain.protocol import ModelFacts


def machine_spec(job: Job, facts: ModelFacts, *, base_generation: int = 0, pace: Pace | None = None) -> MachineSpec:
    """The controller's fixed facts of a run. `pace`: of a job that plans."""
    slow = job.stragglers
    workers, keep = job.workers, job.checkpoint.keep if job.checkpoint else None
    if job.checkpoint is not None and job.checkpoint.copy_to:
        keep = None  # what the first store lets go may be in another one: whoever publishes says what is gone
    return MachineSpec(
        lane_count=job.lanes,
        steps=job.steps,
        block_elements=facts.block_elements,
        min_workers=workers.min,
        max_workers=workers.max,
        initial_workers=workers.initial,
        spares=workers.spares,
        replace=workers.replace,
        mirrors=job.mirrors,
        lane_order="contiguous" if job.gradients == "sum" else "round_major",
        lane_shares=workers.lane_shares,
        block_shares=workers.block_shares,
        fixed_bytes=facts.fixed_bytes,
        bytes_per_held_element=facts.bytes_per_held_element,
        gradients=_gradients(job, facts),
        plans=job.plan == "auto",
        pace=pace,
        domain_label=workers.domain_label,
        checkpoint=job.checkpoint is not None,
        checkpoints_kept=keep if isinstance(keep, int) else None,
        base_generation=base_generation,
        stragglers=None
        if not job.watches_workers
        else StragglerSpec(slow.action in ("lanes", "evict"), slow.action == "evict", slow.min_gain),
    )


def _gradients(job: Job, facts: ModelFacts) -> GradientSpec | None:
    if job.gradients != "sum":
        return None
    apart, shared = job.micro_batches > 1, job.redundancy
    if shared.replay is not None:  # any lane may be missing
        return GradientSpec(facts.active_blocks, apart, "drop_slowest", job.lanes)
    if shared.lanes == "none":
        return GradientSpec(facts.active_blocks, apart)
    return GradientSpec(facts.active_blocks, apart, shared.lanes, shared.reach, shared.group)
