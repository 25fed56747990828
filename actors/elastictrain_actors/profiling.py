"""Measure the nodes of a Ray cluster: one actor on each, all nodes at once, then the links between pairs of them."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from elastictrain.errors import CapacityError, ClusterError
from elastictrain.planner.measured import NodeReading, PairReading, Times, pairs_to_measure
from elastictrain_actors.head import join_cluster
from elastictrain_actors.runtime_env import package_folders

START_S = 120.0
"""A node that has not begun by then is busy, or out of reach."""
PARTS = ("products", "memory", "disk", "within")
PAIR_SECONDS = 1.0


class Prober:
    """Runs on a node, with all of its devices, in a process of its own. `cpus`: of the node, as Ray counts them."""

    def __init__(self, cpus: int) -> None:
        self._cpus = cpus

    def part(self, name: str, seconds: float, folder: str) -> dict[str, object]:
        from elastictrain.engine.measure import measure_part

        return measure_part(name, seconds, Path(folder), cpus=self._cpus)

    def door(self) -> tuple[str, int]:
        """Where the other end of a link is to come."""
        from elastictrain.engine.measure import free_port

        return str(ray.util.get_node_ip_address()), free_port()

    def end(self, host: str, port: int, end: int, seconds: float) -> Times:
        from elastictrain.engine.measure import measure_pair

        return measure_pair(host, port, end, str(ray.util.get_node_ip_address()), seconds)


@contextmanager
def nodes_of(address: str) -> Iterator[list[dict[str, Any]]]:
    """Ray's nodes that live; connected while they are looked at. Raises ClusterError."""
    here_before = ray.is_initialized()
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    if not here_before:
        modules = [str(folder) for folder in package_folders()]
        try:
            join_cluster(address, runtime_env={"py_modules": modules, "excludes": ["**/__pycache__"]},
                         log_to_driver=False, logging_level=logging.ERROR)  # fmt: skip
        except (OSError, ValueError, RuntimeError) as error:
            raise ClusterError(
                f"cannot connect to Ray at {address}: {error}; start it with `ray start --head`, or measure this "
                "machine with --local"
            ) from error
    try:
        yield [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]
    finally:
        if not here_before:
            ray.shutdown()


def measure_cluster(
    nodes: Sequence[dict[str, Any]], seconds: float, folder: str, *, done: Callable[[str], object]
) -> tuple[list[NodeReading], list[PairReading]]:
    """Measure all nodes. `done` is called with what was measured, `parts_of(len(nodes))` times in all.

    Raises CapacityError for a node that is busy, ClusterError for one that goes away or cannot be reached.
    """
    probers = [_prober(node) for node in nodes]
    names = [str(node["NodeManagerHostname"]) for node in nodes]
    try:
        fields: list[dict[str, Any]] = [{} for _ in nodes]
        for part in PARTS:
            asked = [prober.part.remote(part, seconds / len(PARTS), folder) for prober in probers]
            for n, answer in enumerate(asked):
                fields[n] |= _get(answer, START_S + seconds, f"node {names[n]}")
                done(f"{part} of {names[n]}")
        readings = [NodeReading(**found) for found in fields]
        return readings, _pairs(probers, names, done)
    finally:
        for prober in probers:
            ray.kill(prober)


def parts_of(nodes: int) -> int:
    """How many things are measured: for a progress bar."""
    return len(PARTS) * nodes + len(pairs_to_measure(nodes))


def _pairs(probers: Sequence[Any], names: Sequence[str], done: Callable[[str], object]) -> list[PairReading]:
    """Pairs alone one after the other; those of a pattern all at once."""
    found: list[PairReading] = []
    wanted = pairs_to_measure(len(probers))
    rounds = [[pair] for pair in wanted if pair[2] == "alone"]
    rounds += [[pair for pair in wanted if pair[2] == pattern] for pattern in ("contiguous", "strided")]
    for together in rounds:
        asked = []
        for a, b, pattern in together:
            host, port = _get(probers[a].door.remote(), START_S, f"node {names[a]}")
            ends = [probers[n].end.remote(host, port, end, PAIR_SECONDS) for end, n in enumerate((a, b))]
            asked.append((a, b, pattern, ends))
        for a, b, pattern, ends in asked:
            who = f"the link {names[a]} – {names[b]}"
            times, _ = (_get(end, START_S, who) for end in ends)
            found.append(PairReading(a, b, pattern, times))
            done(f"{who}, {pattern}")
    return found


def _prober(node: dict[str, Any]) -> Any:
    cpus = max(1, int(node["Resources"]["CPU"]))
    where = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
    options = {"num_cpus": 1, "num_gpus": node["Resources"].get("GPU", 0), "scheduling_strategy": where}
    return ray.remote(Prober).options(**options).remote(cpus)


def _get(answer: Any, timeout_s: float, who: str) -> Any:
    try:
        return ray.get(answer, timeout=timeout_s)
    except ray.exceptions.GetTimeoutError as error:
        raise CapacityError(
            f"{who} did not answer within {timeout_s:.0f} s: its devices are in use, or it is out of reach; measure "
            "when nothing else runs there"
        ) from error
    except ray.exceptions.RayTaskError as error:
        cause = getattr(error, "cause", None)
        raise ClusterError(f"{who} could not be measured: {cause or error}") from error
    except ray.exceptions.RayError as error:
        raise ClusterError(f"{who} went away while it was measured: {str(error).splitlines()[0]}") from error
