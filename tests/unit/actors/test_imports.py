"""What the actors' modules import when they are named.

Ray imports an actor's module where the actor starts, and where it is only named. The controller's process must be up,
and asking for workers, before torch could be imported (seconds): so neither module may import it at its top. And the
command imports torch while Ray starts, not before. Each is imported in a process of its own, because this one has torch
already.
"""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    "module", ["elastictrain_actors.controller_actor", "elastictrain_actors.worker_actor", "elastictrain.run"]
)
def test_naming_an_actor_imports_no_torch(module: str) -> None:
    code = f"import sys, {module}; print(sorted(name for name in sys.modules if name.split('.')[0] == 'torch')[:5])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stdout + done.stderr


def test_what_a_worker_imports_is_never_searched_for_garbage() -> None:
    code = (
        "import gc; from elastictrain_actors.worker_actor import import_engine; import_engine(); "
        "print(gc.isenabled(), gc.get_freeze_count() > 100_000)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "True True"), done.stdout + done.stderr
