"""Small models with everything that is awkward, and worlds of several workers in one process."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from elastictrain.engine.collective import GroupSet
from elastictrain.engine.lanes import LaneTree
from elastictrain.engine.pending import Pending
from elastictrain.engine.saver import Saver
from elastictrain.engine.step import StepRunner
from elastictrain.engine.vote import Tally, gradient_scale
from elastictrain.engine.worker_model import WorkerModel, build, build_initial
from elastictrain.job import Data, Job
from elastictrain.layout import Layout, Shard
from elastictrain.recipe import Recipe

CPU = torch.device("cpu")
MakeOptimizer = Callable[[Sequence[Any]], torch.optim.Optimizer]


def adamw(params: Sequence[Any]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=1e-2)


class Net(nn.Module):
    """A tied weight of two blocks, a 0-dim, an unused and a frozen parameter, batch norm, counters, a constant."""

    scale: torch.Tensor
    seen: torch.Tensor

    def __init__(self, *, dropout: float = 0.0) -> None:
        super().__init__()
        self.inp = nn.Linear(6, 70)
        self.norm = nn.BatchNorm1d(70)
        self.mid = nn.Linear(70, 70)
        self.out = nn.Linear(70, 70)
        self.out.weight = self.mid.weight
        self.gain = nn.Parameter(torch.tensor(1.5))
        self.unused = nn.Parameter(torch.arange(5.0))
        self.frozen = nn.Parameter(torch.arange(3.0), requires_grad=False)
        self.drop = nn.Dropout(dropout)
        self.register_buffer("scale", torch.full((70,), 0.5), persistent=False)
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            self.seen += 1
        h = self.drop(torch.relu(self.norm(self.inp(x.to(self.inp.weight.dtype)) * self.scale)))
        return self.out(torch.relu(self.mid(h))) * self.gain + self.frozen.sum()  # type: ignore[no-any-return]


class NetRecipe(Recipe):
    def __init__(self, optimizer: MakeOptimizer = adamw, model: Callable[[], nn.Module] = Net) -> None:
        self.make_optimizer, self.make_model = optimizer, model

    def model(self) -> nn.Module:
        return self.make_model()

    def optimizer(self, params: Sequence[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
        return self.make_optimizer(params)

    def loss(self, model: nn.Module, batch: Mapping[str, torch.Tensor]) -> Any:
        return (model(batch["x"]) - batch["y"]).float().square().mean(-1).sum(), batch["x"].shape[0]


class Numbers:
    """Batches: a pure function of step and lane."""

    def __init__(self, size: int = 6) -> None:
        self.size = size

    def batch(self, step: int, lane: int) -> Mapping[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(1000 * step + lane)
        return {
            "x": torch.randn(self.size, 6, generator=generator),
            "y": torch.randn(self.size, 1, generator=generator),
        }


def make_job(recipe: Any, **settings: Any) -> Job:
    data = Data(kind="jsonl", path="unused.jsonl")
    defaults = {"lanes": 5, "steps": 10, "lane_batch_size": 6, "block_elements": 4096}  # so that there are several
    return Job(recipe=recipe, data=data, **(defaults | settings))


def started(job: Job, blocks: Iterable[int] | None = None) -> WorkerModel:
    """A worker's model that holds `blocks` (default all) at the recipe's initial state."""
    model = build(job, CPU)
    model.held.hold(range(len(model.space.blocks)) if blocks is None else blocks)
    model.held.start_from(build_initial(model.recipe, job.seed))
    return model


def same_bits(a: Any, b: Any) -> bool:
    """Equal dtype, shape and bytes: tells -0.0 from +0.0 and compares NaN."""
    if not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor):
        return type(a) is type(b) and bool(a == b)
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    x, y = (t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (a, b))
    return torch.equal(x, y)


def state_of(model: WorkerModel, blocks: Iterable[int] | None = None) -> dict[tuple[int, str], Any]:
    numbers = model.held.masters if blocks is None else blocks
    return {
        (n, key): value.clone() if isinstance(value, torch.Tensor) else value
        for n in numbers
        for key, value in model.held.tensors(n)
    }


def differing(a: Mapping[Any, Any], b: Mapping[Any, Any]) -> list[Any]:
    """The keys under which two states are not the same bits."""
    return [key for key in {**a, **b} if key not in a or key not in b or not same_bits(a[key], b[key])]


def committed(saver: Saver, shares: Sequence[Mapping[str, Any]], **facts: Any) -> str:
    """Commit shares and wait for it; the path."""
    paths: list[str] = []
    told = {
        "committed": lambda _, path: paths.append(path),
        "removed": lambda _: None,
        "refused": paths.append,
        "check": lambda: None,
    }
    saver.begin_commit(shares, **told, **facts)  # type: ignore[arg-type]
    assert saver.wait_for_commit(lambda: None) == [facts["step"]]
    return paths[-1]


# --- worlds ---


class Mail:
    """Stands in for the groups of one rank: what is sent lies in a queue per pair until it is received."""

    def __init__(self, rank: int, boxes: list[list[queue.SimpleQueue[Any]]]) -> None:
        self.rank, self.boxes = rank, boxes

    def exchange(self, sends: Any, recvs: Any, *, between: Callable[[], None] = lambda: None) -> None:
        for peer, tensor in sends:
            assert tensor.is_contiguous()
            self.boxes[self.rank][peer].put(tensor.clone())
        between()
        for peer, tensor in recvs:
            got = self.boxes[peer][self.rank].get(timeout=30)
            assert got.shape == tensor.shape
            assert got.dtype == tensor.dtype
            tensor.copy_(got)

    def all_gather_equal(self, payload: bytes) -> list[bytes]:
        for row in self.boxes[self.rank]:
            row.put(payload)
        found = [self.boxes[peer][self.rank].get(timeout=30) for peer in range(len(self.boxes))]
        assert len({len(raw) for raw in found}) == 1
        return found


class Worker:
    """One worker of a world in one process."""

    def __init__(self, job: Job, layout: Layout, number: int, groups: Any, batches: Any) -> None:
        self.job = job
        self.model = started(job, layout.held(number))
        self.tree = LaneTree(self.model.space, job.lanes, CPU, job.micro_batches)
        self.tree.watch(self.model.flat.model)
        self.runner = StepRunner(
            job, self.model.recipe, number, layout, groups, self.model.flat, self.model.held, self.tree, batches,
            probe=lambda phase: None, check=lambda: None,
        )  # fmt: skip
        self.tallies: list[Tally] = []

    def compute(self, step: int) -> tuple[Pending, Tally]:
        pending = self.runner.run(step)
        return pending, self.runner.vote_format.tally(self.runner.vote(pending, flags=0, plan=0))

    def step(self, step: int) -> Tally:
        pending, tally = self.compute(step)
        self.model.held.apply(
            self.runner.gradients(pending),
            scale=gradient_scale(tally, self.job.clip_grad_norm),
            lanes=self.job.lanes,
            lr_factor=float(self.model.recipe.schedule(step)),
        )
        self.model.flat.commit_counters(tally.largest)
        self.runner.gather()
        self.tallies.append(tally)
        return tally


def alone(job: Job, batches: Any | None = None) -> Worker:
    """World 1."""
    blocks = len(build(job, CPU).space.blocks)

    layout = Layout(1, (0,), (tuple(range(job.lanes)),), (Shard(0, blocks, 0, None),), job.lanes)
    groups = GroupSet(None, generation=1, rank=0, world=1, device=CPU, host="127.0.0.1")
    return Worker(job, layout, 0, groups, batches or Numbers())


def run_world(job: Job, layout: Layout, steps: int, batches: Any | None = None) -> list[Worker]:
    """All workers of `layout` as threads of this process. No dropout: the random generators are the process's."""
    world = layout.world_size
    boxes: list[list[queue.SimpleQueue[Any]]] = [[queue.SimpleQueue() for _ in range(world)] for _ in range(world)]
    workers = [Worker(job, layout, w, Mail(r, boxes), batches or Numbers()) for r, w in enumerate(layout.workers)]
    problems: list[BaseException] = []

    def work(worker: Worker) -> None:
        try:
            for step in range(1, steps + 1):
                worker.step(step)
        except BaseException as error:
            problems.append(error)

    threads = [threading.Thread(target=work, args=(worker,)) for worker in workers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if problems:
        raise problems[0]
    return workers
