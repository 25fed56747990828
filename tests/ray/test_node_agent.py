"""The node agent as an actor on a real raylet: Ray leaves a stopped actor alive, the agent does not."""

from __future__ import annotations

import os
import signal
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from elastictrain.controller import events as ev
from elastictrain.controller.suspicion import Suspicion
from elastictrain.pulse import Pulse, pulse_folder, pulse_paths
from elastictrain.signs import Activity
from elastictrain_actors.heartbeats import Heartbeats
from elastictrain_actors.node_agent import start_agent
from elastictrain_actors.watchman import Watchman

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("shared_ray")]
TOKEN = "a run"


class Stepper:
    """A worker actor that does nothing but step."""

    def prepare(self, worker: int, home: str) -> int:
        pulse = Pulse.create(pulse_folder(TOKEN, Path(home)), worker)
        threading.Thread(target=self._train, args=(pulse,), daemon=True).start()
        return os.getpid()

    def _train(self, pulse: Pulse) -> None:
        pulse.adopt()
        pause, step = threading.Event(), 0
        while True:
            step += 1
            pulse.begin_step(1, step)
            pause.wait(0.02)
            pulse.enter(Activity.EXCHANGE)
            pulse.end_step()


def watch(watchman: Watchman, limit_s: float) -> Any:
    """The first thing that the watchman notices."""
    pause, began_s = threading.Event(), time.monotonic()
    while time.monotonic() < began_s + limit_s:
        found = watchman.look()
        if found:
            return found[0]
        pause.wait(0.1)
    return None


def test_a_stopped_actor_is_named_killed_and_confirmed_by_its_nodes_agent(tmp_path: Path) -> None:
    import ray

    node = ray.get_runtime_context().get_node_id()
    workers = [ray.remote(Stepper).options(num_cpus=0.1, max_restarts=0).remote() for _ in range(2)]
    pids = ray.get([w.prepare.remote(n, str(tmp_path)) for n, w in enumerate(workers)])
    with ExitStack() as stack:
        ear = Heartbeats(ray.util.get_node_ip_address(), TOKEN, 4)
        stack.callback(ear.close)
        watchman = Watchman(ear, Suspicion())
        agent = start_agent(node, TOKEN, 1, home=str(tmp_path))
        assert ray.get(agent.follow.remote(4, ear.host, ear.port, 1), timeout=60)
        running = agent.run.remote()
        watchman.agent_started(node, 1)
        watchman.formed(1, (0, 1))
        assert watch(watchman, 3.0) is None
        assert (ear.unheard(), ear.silent()) == ({}, {})
        os.kill(pids[1], signal.SIGSTOP)
        stopped_s = time.monotonic()
        event = watch(watchman, 10.0)
        named_s = time.monotonic() - stopped_s
        assert isinstance(event, ev.WorkerFrozen)
        assert (event.worker, named_s < 2.0) == (1, True)
        found = watchman.suspicion.identity(1)
        assert found is not None
        where, pid, ticks = found
        assert (where, pid) == (node, pids[1])
        assert ray.get(agent.kill.remote(3, pid, ticks), timeout=10) == "refused: a newer controller is in charge"
        assert ray.get(agent.kill.remote(4, pid, ticks), timeout=10) == "gone"
        assert time.monotonic() - stopped_s < 5.0
        watchman.worker_gone(1)
        with pytest.raises(ray.exceptions.RayActorError):
            ray.get(workers[1].prepare.remote(1, str(tmp_path)), timeout=30)
        assert ray.get(agent.kill_all_but.remote(4, []), timeout=10) == {pids[0]: "gone"}
        ray.get(agent.stop.remote(), timeout=10)
        ray.get(running, timeout=10)
        ray.kill(agent)


def test_the_death_of_an_agent_is_seen_at_once_and_another_takes_over(tmp_path: Path) -> None:
    import ray

    node = ray.get_runtime_context().get_node_id()
    pulse = Pulse.create(pulse_folder(TOKEN, tmp_path), 5)  # a worker that both agents see
    with ExitStack() as stack:
        ear = Heartbeats(ray.util.get_node_ip_address(), TOKEN, 1)
        stack.callback(ear.close)
        for number in (1, 2):
            agent = start_agent(node, TOKEN, number, home=str(tmp_path))
            assert ray.get(agent.follow.remote(1, ear.host, ear.port, number), timeout=60)
            running = agent.run.remote()
            ear.expect(node, number)
            pause, began_s, seen = threading.Event(), time.monotonic(), []
            while not seen and time.monotonic() < began_s + 20:
                seen = [(r.agent, [w.worker for w in r.workers]) for r in ear.poll() if r.workers]
                pause.wait(0.05)
            assert seen == [(number, [5])]
            ray.kill(agent, no_restart=True)
            with pytest.raises(ray.exceptions.RayActorError):
                ray.get(running, timeout=5)
            ear.forget(node)
    pulse.close()
    assert list(pulse_paths(pulse_folder(TOKEN, tmp_path))) == []
