"""A raylet's part in a test of `lose_node`: starts what a node would have, lets one worker lose the node, and prints
what became of each process, as one line of JSON. A script, because only a parent is told that its child stopped.

python -m tests.support.node_family FOLDER HOW
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

from elastictrain.faults import lose_node as fault
from elastictrain.pulse import Pulse, PulseFile, pulse_paths

SILENT_S = 0.5
ROLES = ("worker", "agent", "stranger", "loser")


def child(role: str, folder: Path, how: str) -> None:
    """One process of the node: says that it is there, then waits for a line (the loser), or for the end."""
    from elastictrain_actors.node_loss import lose_node

    kept: list[object] = []
    if role in ("worker", "loser"):
        kept.append(Pulse.create(folder, ROLES.index(role)))
    elif role == "agent":
        kept += [PulseFile(path) for path in pulse_paths(folder)]
    print("ready", flush=True)
    sys.stdin.readline()
    if role == "loser":
        lose_node(folder, fault(ROLES.index(role), 1, how=how, silent_s=SILENT_S))  # type: ignore[arg-type]
        print("back", flush=True)
    sys.stdin.read()


def main(folder: Path, how: str) -> dict[str, object]:
    script = [sys.executable, "-m", "tests.support.node_family", str(folder), how]
    family = {}
    for role in ROLES:  # one after the other: the agent reads the worker's pulse
        family[role] = subprocess.Popen([*script, role], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert family[role].stdout.readline() == "ready\n"  # type: ignore[union-attr]
    assert family["loser"].stdin is not None
    family["loser"].stdin.write("go\n")
    family["loser"].stdin.flush()
    found: dict[str, object] = {}
    for role in ("loser", "worker", "agent"):
        said = os.waitid(os.P_PID, family[role].pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
        assert said is not None
        found[role] = signal.Signals(said.si_status).name
    found["stranger"] = Path(f"/proc/{family['stranger'].pid}/stat").read_text().rpartition(") ")[2][0]
    if how == "stop":
        for role in ("loser", "worker", "agent"):
            os.waitid(os.P_PID, family[role].pid, os.WCONTINUED)
        found["said"] = family["loser"].stdout.readline()  # type: ignore[union-attr]
    for one in family.values():
        one.kill()
        one.wait()
    return found


if __name__ == "__main__":
    if len(sys.argv) > 3:
        child(sys.argv[3], Path(sys.argv[1]), sys.argv[2])
    else:
        print(json.dumps(main(Path(sys.argv[1]), sys.argv[2])))
