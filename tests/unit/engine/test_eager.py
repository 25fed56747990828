"""Doing without torch's compiler: nobody imports it unasked, and every number is the same."""

from __future__ import annotations

import subprocess
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.optimizer import _global_optimizer_pre_hooks, register_optimizer_step_pre_hook

from elastictrain.engine import eager
from tests.unit.engine.optimizer_table import ELEMENT_WISE

WORKER = """
import sys, tempfile
from pathlib import Path
from elastictrain.engine.host import WorkerHost
from tests.support.process_cluster import byte_job

job = byte_job(Path(tempfile.mkdtemp()), workers=1)
host = WorkerHost(job, 0, host="127.0.0.1")
host.prepare()
held = host.session.model.held
held.hold(range(len(host.session.model.space.blocks)))
blocks = host.session.model.space.blocks[: host.session.model.space.active_blocks]
import torch
held.apply({b.number: torch.ones(b.elements) for b in blocks}, scale=1.0, lanes=1, lr_factor=1.0)
host.stop()
assert torch.are_deterministic_algorithms_enabled()
found = [name for name in ("torch._dynamo", "torch._inductor", "sympy") if name in sys.modules]
import torch._inductor.config
print(found, torch._inductor.config.deterministic, flush=True)
"""


def test_a_worker_that_compiles_nothing_imports_no_compiler_and_one_that_does_has_it_deterministic() -> None:
    done = subprocess.run([sys.executable, "-c", WORKER], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "[] True", done.stderr[-2000:]


def stepped(make: Any, step: Any) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    params = [(n, torch.nn.Parameter(torch.randn(5, 7, generator=generator))) for n in ("mid.weight", "rest.weight")]
    params.append(("flat", torch.nn.Parameter(torch.randn(11, generator=generator))))
    optimizer = make(params)
    for _ in range(3):
        for _, parameter in params:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        step(optimizer)
    kept = [t for s in optimizer.state.values() for _, t in sorted(s.items()) if isinstance(t, torch.Tensor)]
    return [p.detach() for _, p in params] + kept


@pytest.mark.parametrize("name", ELEMENT_WISE)
def test_a_plain_step_computes_what_torchs_computes(name: str) -> None:
    def plain(optimizer: Optimizer) -> None:
        found = eager.plain_step(optimizer)
        if type(optimizer).__module__.startswith("torch.optim"):
            assert found is not None, "torch's own have one"
            with torch.no_grad():
                found(optimizer)
        else:
            assert found is None, "a user's own is stepped as it is"
            optimizer.step()

    ours, torchs = stepped(ELEMENT_WISE[name], plain), stepped(ELEMENT_WISE[name], lambda o: o.step())
    assert len(ours) == len(torchs)
    assert all(torch.equal(a, b) for a, b in zip(ours, torchs, strict=True))


def test_savers_that_hear_of_every_step_leave_it_plain() -> None:
    import elastictrain_checkpoint.torch as checkpoint

    assert checkpoint.async_save
    assert _global_optimizer_pre_hooks, "nobody hears of steps"
    assert eager.plain_step(adamw()) is not None


def adamw(**settings: Any) -> AdamW:
    return AdamW([torch.nn.Parameter(torch.ones(3))], **settings)


def test_more_than_a_plain_step_is_left_to_torch() -> None:
    assert eager.plain_step(adamw()) is not None
    hooked = adamw()
    hooked.register_step_pre_hook(lambda *_: None)
    assert eager.plain_step(hooked) is None
    hooked = adamw()
    hooked.register_step_post_hook(lambda *_: None)
    assert eager.plain_step(hooked) is None
    assert eager.plain_step(adamw(differentiable=True)) is None
    wrapped = adamw()
    wrapped.step = lambda closure=None: None  # type: ignore[method-assign, assignment, misc]
    assert eager.plain_step(wrapped) is None

    class Own(SGD):
        def step(self, closure: Any = None) -> Any:
            return super().step(closure)

    assert eager.plain_step(Own([torch.nn.Parameter(torch.ones(3))])) is None
    everywhere = register_optimizer_step_pre_hook(lambda *_: None)
    try:
        assert eager.plain_step(adamw()) is None
    finally:
        everywhere.remove()


@pytest.mark.parametrize("loaded", [False, True])
def test_once_the_compiler_is_there_torchs_own_step_is_taken(loaded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if loaded:
        monkeypatch.setitem(sys.modules, "torch._dynamo", sys.modules.get("torch._dynamo", ModuleType("torch._dynamo")))
    else:
        monkeypatch.delitem(sys.modules, "torch._dynamo", raising=False)
    taken: list[str] = []
    optimizer = adamw()
    monkeypatch.setattr(eager, "plain_step", lambda _: lambda _: taken.append("plain"))
    monkeypatch.setattr(optimizer, "step", lambda: taken.append("torch's"))
    eager.step(optimizer)
    assert taken == (["torch's"] if loaded else ["plain"])


def test_without_gradients_whatever_the_caller_has_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torch._dynamo", raising=False)
    optimizer = adamw()
    next(iter(optimizer.param_groups[0]["params"])).grad = torch.ones(3)
    with torch.enable_grad():
        eager.step(optimizer)
        assert torch.is_grad_enabled()
    assert optimizer.param_groups[0]["params"][0].grad_fn is None
