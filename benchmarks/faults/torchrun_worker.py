"""One rank under torchrun: DDP with gloo, a checkpoint every so many steps, resumed from after a restart of all."""

from __future__ import annotations

import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from training import Order, Trainee


def main() -> None:
    order = Order.given()
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    trainee = Trainee(order)
    step = trainee.resume(trainee.checkpoint)
    wrapped = DistributedDataParallel(trainee.model, gradient_as_bucket_view=True)
    while step < order.steps:
        step += 1
        trainee.step(step, rank, wrapped)
        if rank == 0 and step % order.checkpoint_every == 0:
            trainee.save(step, trainee.checkpoint)
    trainee.finish(rank)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
