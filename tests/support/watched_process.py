"""Processes with a pulse that step, stop, deadlock or spin; and agents in processes of their own. No torch, no Ray.

`python watched_process.py worker FOLDER NUMBER` steps until a line on its standard input says otherwise;
`python watched_process.py agent NODE FOLDER TOKEN HOST PORT NUMBER` reports until it is killed.
"""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
PATHS = [str(ROOT), str(ROOT / "actors"), str(ROOT / "checkpoint")]


def start(*arguments: object, before: list[str] | None = None) -> subprocess.Popen[str]:
    """One such process, once it says that it runs."""
    command = [*(before or []), sys.executable, __file__, *map(str, arguments)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    said = process.stdout.readline()
    if said != "ready\n":
        end(process)
        raise RuntimeError(f"{command} said {said!r}")
    return process


def tell(process: subprocess.Popen[str], word: str) -> None:
    assert process.stdin is not None
    process.stdin.write(word + "\n")
    process.stdin.flush()


def end(*processes: subprocess.Popen[str]) -> None:
    for process in processes:
        process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                stream.close()


def _work(seconds: float) -> None:
    until = time.thread_time() + seconds
    while time.thread_time() < until:
        pass


def worker(folder: str, number: str) -> None:
    """Steps of 20 ms, most of it processor time, with a beat every 4 ms of it."""
    from elastictrain.pulse import Pulse
    from elastictrain.signs import Activity

    pulse = Pulse.create(Path(folder), int(number))
    orders: list[str] = []
    threading.Thread(target=lambda: orders.extend(map(str.strip, sys.stdin)), daemon=True).start()

    def train() -> None:
        pulse.adopt()
        step = 0
        while True:
            step += 1
            pulse.begin_step(1, step)
            for _ in range(4):
                _work(0.004)
                pulse.beat()
            if "lock" in orders:
                lock = threading.Lock()
                lock.acquire()
                lock.acquire()
            while "spin" in orders:
                pass
            pulse.enter(Activity.EXCHANGE)
            time.sleep(0.004)
            pulse.enter(Activity.APPLY)
            pulse.end_step()

    print("ready", flush=True)
    thread = threading.Thread(target=train)
    thread.start()
    thread.join()


def agent(node: str, folder: str, token: str, host: str, port: str, number: str) -> None:
    from elastictrain_actors.agent import Agent

    one = Agent(node, Path(folder), token, number=int(number))
    assert one.follow(1, host, int(port), int(number))
    print("ready", flush=True)
    one.run()


def burn() -> None:
    print("ready", flush=True)
    while True:
        pass


def hear(host: str, token: str, node: str) -> None:
    """A controller's ear: says which port, then when the node is heard and when it is lost."""
    from elastictrain_actors.heartbeats import Heartbeats

    ear = Heartbeats(host, token, 1)
    ear.expect(node, 1)
    print("ready", flush=True)
    print(ear.port, flush=True)
    pause, said, worst_s = threading.Event(), "", 0.0
    orders: list[str] = []
    threading.Thread(target=lambda: orders.extend(map(str.strip, sys.stdin)), daemon=True).start()
    while "end" not in orders:
        silent = ear.silent()
        age_s = silent.get(node)
        now = "lost" if age_s is not None else "unheard" if node in ear.unheard() else "heard"
        if now != said:
            print(now, time.monotonic(), flush=True)
            said = now
        with ear._lock:
            worst_s = max(worst_s, ear._leases.age_s(node, ear._clock.now_s) or 0.0)
        pause.wait(0.02)
    print("worst", worst_s, flush=True)
    ear.close()


if __name__ == "__main__":
    sys.path[:0] = PATHS
    {"worker": worker, "agent": agent, "burn": burn, "hear": hear}[sys.argv[1]](*sys.argv[2:])
