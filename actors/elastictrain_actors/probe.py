"""Ask a cluster which of our requirements its nodes lack: a small job, run before the real one.

The script stands alone (elastictrain is not there yet): it looks on the head and, by one task per node, on every node
that lives now. Nodes that an autoscaler starts later are taken to be like them.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence

from elastictrain.errors import ClusterError
from elastictrain_actors.dependencies import name_of

MARK = "elastictrain-probe:"
PYTHON = (3, 11)

_SCRIPT = """
import json, sys
requirements = json.loads(sys.argv[1])
def missing(requirements):
    import sys
    from importlib import metadata
    from packaging.requirements import Requirement
    lacking = []
    for line in requirements:
        wanted = Requirement(line)
        try:
            if not wanted.specifier.contains(metadata.version(wanted.name), prereleases=True):
                lacking.append(line)
        except metadata.PackageNotFoundError:
            lacking.append(line)
    return sys.version_info[:2], lacking
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy as Node
ray.init(address="auto", logging_level="ERROR", log_to_driver=False)
look = ray.remote(num_cpus=0)(missing)
nodes = [node["NodeID"] for node in ray.nodes() if node["Alive"]]
asked = [look.options(scheduling_strategy=Node(node, soft=False)).remote(requirements) for node in nodes]
answers = [missing(requirements), *ray.get(asked, timeout=60)]
lacking = [line for line in requirements if any(line in answer[1] for answer in answers)]
print("MARK" + json.dumps({"lacking": lacking, "python": min(answer[0] for answer in answers)}))
""".replace("MARK", MARK)


def probe_command(requirements: Sequence[str]) -> str:
    """The shell command of the job that prints what is lacking."""
    return shlex.join(["python", "-c", _SCRIPT, json.dumps(list(requirements))])


def read_probe(log: str, *, assumed: Sequence[str]) -> list[str]:
    """The requirement lines that some node lacks.

    Raises ClusterError when there is no answer in the log, when a node lacks one of `assumed`, or Python is too old.
    """
    lines = [line for line in log.splitlines() if line.startswith(MARK)]
    if not lines:
        raise ClusterError(
            "the cluster could not be asked what is installed on its nodes (ship_dependencies: auto); set it to none "
            f"or pip to go on without asking. The end of the log:\n{log[-2000:]}"
        )
    answer = json.loads(lines[-1].removeprefix(MARK))
    if tuple(answer["python"]) < PYTHON:
        got, needed = (".".join(map(str, version)) for version in (answer["python"], PYTHON))
        raise ClusterError(f"the cluster has Python {got}; elastictrain needs {needed} or newer on every node")
    lacking = list(answer["lacking"])
    gone = [line for line in lacking if name_of(line) in assumed]
    if gone:
        raise ClusterError(
            f"a node of the cluster lacks {' and '.join(gone)}: install it on every node (it is too large to travel)"
        )
    return lacking
