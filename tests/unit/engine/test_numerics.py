"""What must be equal for equal bits is recorded, and compared in words."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from elastictrain.agreement import differences
from elastictrain.engine.numerics import apply_numerics, capture
from elastictrain.job import Numerics
from tests.unit.engine.worlds import CPU


@pytest.fixture
def settings_restored() -> Iterator[None]:
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    deterministic = torch.are_deterministic_algorithms_enabled()
    yield
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision(precision)
    torch.use_deterministic_algorithms(deterministic)


@pytest.mark.usefixtures("settings_restored")
@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens on a host without CUDA")
def test_settings_are_made() -> None:
    device = apply_numerics(Numerics(threads=2, matmul_precision="high", deterministic=True))
    assert device == CPU
    assert torch.get_num_threads() == 2
    assert torch.get_float32_matmul_precision() == "high"
    assert torch.are_deterministic_algorithms_enabled()
    apply_numerics(Numerics(deterministic=False))
    assert not torch.are_deterministic_algorithms_enabled()


def test_the_facts_name_what_the_job_and_the_machine_fix() -> None:
    facts = capture(Numerics(threads=3, compute_dtype="bf16"), CPU)
    assert facts == {
        "torch": torch.__version__,
        "device": "CPU",
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "threads": "3",
        "compute_dtype": "bf16",
        "matmul_precision": "highest",
        "deterministic": "True",
        "attention": "default",
    }
    assert differences(facts, dict(facts), "worker 3") == []


def test_every_difference_is_a_sentence() -> None:
    run = {"cpu": "AVX512", "threads": "1", "device": "CPU"}
    assert differences(run, {"cpu": "AVX2", "device": "CPU"}, "worker 3") == [
        "worker 3 has CPU instruction set AVX2, the run has AVX512: results will differ in the last bits",
        "worker 3 has intra-op threads unknown, the run has 1: results will differ in the last bits",
    ]
