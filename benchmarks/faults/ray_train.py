"""Ray Train's TorchTrainer: DDP with gloo, FailureConfig, checkpoints reported every so many steps."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import ray
import ray.train
from ray.train import Checkpoint, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer, prepare_model
from training import ORDER, Order, Trainee

HERE = str(Path(__file__).resolve().parent)


def train(settings: dict[str, Any]) -> None:
    os.environ[ORDER] = settings["order"]
    order = Order.given()
    rank = ray.train.get_context().get_world_rank()
    trainee = Trainee(order)
    step, newest = 0, ray.train.get_checkpoint()
    if newest is not None:
        with newest.as_directory() as folder:
            step = trainee.resume(Path(folder) / "checkpoint.pt")
    wrapped = prepare_model(trainee.model, parallel_strategy_kwargs={"gradient_as_bucket_view": True})
    while step < order.steps:
        step += 1
        trainee.step(step, rank, wrapped)
        if step % order.checkpoint_every == 0:
            with tempfile.TemporaryDirectory() as folder:
                if rank == 0:
                    trainee.save(step, Path(folder) / "checkpoint.pt")
                ray.train.report({"step": step}, checkpoint=Checkpoint.from_directory(folder) if rank == 0 else None)
    trainee.finish(rank)


def main() -> None:
    order = Order.given()
    paths = os.pathsep.join([HERE, str(Path(HERE).parent), os.environ.get("PYTHONPATH", "")])
    ray.init(
        address="local", num_cpus=order.world + 1, include_dashboard=False, log_to_driver=False,
        runtime_env={"env_vars": {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}},
    )  # fmt: skip
    failures = FailureConfig(max_failures=len(order.kills))
    trainer = TorchTrainer(
        train,
        train_loop_config={"order": os.environ[ORDER]},
        torch_config=TorchConfig(backend="gloo"),
        scaling_config=ScalingConfig(num_workers=order.world),
        run_config=RunConfig(name="faults", storage_path=f"{order.folder}/ray", failure_config=failures),
    )
    trainer.fit()


if __name__ == "__main__":
    main()
