"""On CUDA devices: the same bits over layouts of one GPU model, NCCL groups that drop and form again."""

from __future__ import annotations

import pytest
import torch

from elastictrain.engine.to_host import ToHost
from elastictrain.faults import flip, kill
from tests.support.process_cluster import byte_job, run_job

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(300),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
needs_three = pytest.mark.skipif(torch.cuda.device_count() < 3, reason="needs three CUDA devices")


@pytest.mark.parametrize("compute_dtype", ["f32", "bf16"])
def test_both_memory_choices_give_the_same_bits(tmp_path, compute_dtype):
    jobs = [
        byte_job(tmp_path, workers=1, gradients=gradients, numerics={"compute_dtype": compute_dtype})
        for gradients in ("sum", "hand_over")
    ]
    first, second = (run_job(job) for job in jobs)
    assert first.digest == second.digest


def test_a_run_on_a_device_repeats(tmp_path):
    assert run_job(byte_job(tmp_path, workers=1)).digest == run_job(byte_job(tmp_path, workers=1)).digest


def test_a_share_comes_while_the_device_is_busy_and_before_it_changes():
    state = {str(number): torch.randn(1000, 1000, device="cuda") for number in range(20)}
    expected = {name: value.cpu() for name, value in state.items()}
    to_host = ToHost()
    busy = torch.ones(8192, 8192, device="cuda")
    for turn in range(3):
        for _ in range(100):
            busy = torch.tanh(busy @ busy)
        hosts = to_host.begin(state, fresh=False)
        copied = to_host.copied()
        to_host.before_apply()
        for value in state.values():
            value.add_(1)
        assert turn == 0 or not torch.cuda.current_stream().query(), "the host has waited for nothing"
        copied()
        for name, value in expected.items():
            assert torch.equal(hosts[name], value), name
            assert hosts[name].is_pinned()
            value.add_(1)


@pytest.mark.parametrize("every_steps", [1, 3])
def test_a_device_dies_and_goes_on_from_its_checkpoint(tmp_path, every_steps):
    undisturbed = run_job(byte_job(tmp_path, workers=1))
    job = byte_job(
        tmp_path,
        checkpoint={"path": str(tmp_path / "c"), "every_steps": every_steps},
        workers={"max": 1, "replace": True},
    )
    assert run_job(job, [kill(0, 6, "compute")]).digest == undisturbed.digest


def test_a_flipped_bit_on_a_device_is_found(tmp_path):
    undisturbed = run_job(byte_job(tmp_path, workers=1))
    job = byte_job(
        tmp_path, checkpoint={"path": str(tmp_path / "c"), "every_steps": 3}, workers={"max": 1, "replace": True}
    )
    run = run_job(job, [flip(0, 6, "optimizer")])
    assert run.digest == undisturbed.digest
    assert [d["worker"] for d in run.record.of("doomed") if d["reason"].startswith("corrupt")] == [0]


@needs_three
@pytest.mark.parametrize("phase", ["compute", "exchange", "vote", "gather"])
def test_nccl_recovers_in_place(tmp_path, phase):
    undisturbed = run_job(byte_job(tmp_path, workers=1), cuda_devices=3)
    run = run_job(byte_job(tmp_path, workers=3), [kill(1, 4, phase)], cuda_devices=3)
    assert run.digest == undisturbed.digest
    assert not run.record.of("went_back")
