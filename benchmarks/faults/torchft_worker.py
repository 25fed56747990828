"""One torchft replica group of one process: gradients averaged by hand through the manager (its DDP wrapper ends the
survivors when a peer dies), the state healed from a peer.
"""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

import torch
from torchft import Manager, ProcessGroupGloo
from torchft.optim import OptimizerWrapper
from training import Order, Trainee

PATIENCE = timedelta(seconds=10)


def main() -> None:
    order = Order.given()
    rank = int(os.environ["REPLICA_GROUP_ID"])
    trainee = Trainee(order)
    manager = Manager(
        pg=ProcessGroupGloo(timeout=PATIENCE),
        load_state_dict=trainee.load,
        state_dict=trainee.state,
        min_replica_size=1,
        timeout=PATIENCE,
        replica_id=f"group{rank}",
    )
    optimizer = OptimizerWrapper(manager, trainee.optimizer)
    parameters = [p for p in trainee.model.parameters() if p.requires_grad]
    try:
        while manager.current_step() < order.steps:
            _step(trainee, manager, optimizer, parameters, rank)
        trainee.finish(rank)
    finally:
        manager.shutdown()


def _step(trainee: Trainee, manager: Any, optimizer: Any, parameters: list[Any], rank: int) -> None:
    optimizer.zero_grad()  # asks for the quorum
    if manager.current_step() == 0:
        manager.wait_quorum()  # a group that is new is told here at which step the others are
    step = manager.current_step() + 1
    trainee.begin(step, rank)
    trainee.loss(step, rank, trainee.model).backward()
    flat = torch.cat([p.grad.reshape(-1) for p in parameters])
    manager.allreduce(flat).wait()
    took_part = manager.is_participating()
    for parameter, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        parameter.grad.copy_(part.view_as(parameter))
    optimizer.step()
    if manager.current_step() == step:  # committed
        trainee.end(step, rank, took_part=took_part)


if __name__ == "__main__":
    main()
