"""One rank of plain torch DDP under gloo: the same model, optimizer, batches and stamps as the elastictrain job.

Its samples lie ready in memory, so no data loading is counted against it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import stamps
from recipes import GPTRecipe, memory_base, next_token_loss

POOL = 16
"""Different batches in memory."""


def parsed() -> Any:
    parser = argparse.ArgumentParser()
    for name in ("rank", "world", "lanes", "batch"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--store", required=True, help="file of the rendezvous")
    parser.add_argument("--stamp", required=True, help="folder for time stamps")
    parser.add_argument("--model", type=json.loads, required=True)
    parser.add_argument("--form", choices=["naive", "best"], required=True)
    parser.add_argument("--clip", type=float, default=None)
    parser.add_argument("--memory", action="store_true")
    return parser.parse_args()


def main() -> None:
    options = parsed()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    stamp = stamps.Stamps(options.stamp)
    watch = stamps.MemoryWatch(stamp, memory_base()) if options.memory else None
    recipe = GPTRecipe(model=options.model)
    model = recipe.model()
    store = dist.FileStore(options.store, options.world)
    dist.init_process_group(
        "gloo", store=store, rank=options.rank, world_size=options.world, timeout=timedelta(minutes=30)
    )
    # "best": one all-reduce per step, gradients that are views of the buckets. static_graph is left out: it wants the
    # same synchronisation in every iteration, which no_sync is not.
    wrapped = DistributedDataParallel(model, gradient_as_bucket_view=options.form == "best")
    optimizer = recipe.optimizer(list(model.named_parameters()))
    width = recipe.config.sequence_length + 1
    batches = [torch.randint(0, 257, (options.batch, width)) for _ in range(POOL)]
    step = 0
    while True:
        step += 1
        stamp("start", step=step, rank=options.rank, world=options.world)
        if watch is not None:
            watch.before_step()
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * recipe.schedule(step)
        for lane in range(options.lanes):
            last = lane == options.lanes - 1
            waits = contextlib.nullcontext() if last or options.form == "naive" else wrapped.no_sync()
            with waits:
                loss = next_token_loss(wrapped, batches[(step * options.lanes + lane) % POOL]) / options.lanes
                loss.backward()
                float(loss.detach())  # a training loop that knows its loss
        if options.clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), options.clip, foreach=True)
        if watch is not None:
            watch.at_vote()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        stamp("end", step=step, rank=options.rank)
        if watch is not None:
            watch.after_step()


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    main()
