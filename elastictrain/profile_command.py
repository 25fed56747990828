"""The command `elastictrain profile`."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from elastictrain.planner.measured import NodeReading, PairReading
    from elastictrain.planner.profiles import Cluster

Done = Callable[[str], object]


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command()(profile)


def profile(
    out: Annotated[Path, typer.Option("--out", "-o", help="YAML to write, for `elastictrain plan --cluster`.")] = Path(
        "cluster.yaml"
    ),
    address: Annotated[
        str, typer.Option(help="Ray cluster to measure: auto, or host:port of its head; one task per node.")
    ] = "auto",
    local: Annotated[bool, typer.Option("--local", help="Only this machine, without Ray.")] = False,
    seconds: Annotated[
        float, typer.Option(min=1, max=3600, help="For each node (all at once); links come on top.")
    ] = 40,
    disk: Annotated[
        Path | None,
        typer.Option(help="Folder on every node whose disk is measured; default: the one for temporary files."),
    ] = None,
    force: Annotated[bool, typer.Option(help="Replace a file that is there.")] = False,
) -> None:
    """Measure the nodes and the links between them, and write down what the planner needs to know."""
    from rich.console import Console

    from elastictrain.errors import ClusterError, ConfigError
    from elastictrain.planner.measured import cluster_of
    from elastictrain.planner.profiles import dump_cluster

    if out.exists() and not force:
        raise ConfigError(f"--out {out}: there is such a file already; name another one, or replace it with --force")
    if not out.absolute().parent.is_dir():
        raise ConfigError(f"--out {out}: there is no folder {out.absolute().parent}")
    disk = disk or Path(tempfile.gettempdir())
    nodes, pairs = _local(seconds, disk) if local else _on_ray(address, seconds, disk)
    cluster = cluster_of(nodes, pairs)
    try:
        out.write_text(dump_cluster(cluster), encoding="utf-8")
    except OSError as error:
        raise ClusterError(f"{out}: cannot be written: {error.strerror or error}") from error
    console = Console()
    for sentence in found(cluster):
        console.print(sentence, highlight=False)
    console.print(f"Written: {out}. Next: elastictrain plan JOB.yaml --cluster {out}", highlight=False)


def found(cluster: Cluster) -> list[str]:
    """What was measured, as sentences."""
    said = []
    for number, group in enumerate(cluster.groups):
        device = cluster.device(group)
        best = ", ".join(f"{flops / 1e12:.3g} TFLOP/s {dtype}" for dtype, flops in device.peak_flops.items())
        memory = f"{device.memory_bytes / 2**30:.3g} GiB at {device.bandwidth_bytes_s / 1e9:.3g} GB/s"
        slow = "" if group.slowdown == 1 else f", {group.slowdown:g} times as slow as the quickest of its kind"
        said.append(f"Group {number}: {group.nodes} x {group.per_node} {device.name} ({best}; {memory}){slow}.")
    said += [
        f"{link.name}: {link.alpha_s * 1e6:.3g} us, {link.beta_bytes_s / 1e9:.3g} GB/s ({link.source})."
        for link in cluster.links
    ]
    return said


def _local(seconds: float, disk: Path) -> tuple[list[NodeReading], list[PairReading]]:
    from elastictrain.engine.measure import PARTS, measure_node

    with _progress(len(PARTS)) as done:
        return [measure_node(seconds, disk, part_done=done)], []


def _on_ray(address: str, seconds: float, disk: Path) -> tuple[list[NodeReading], list[PairReading]]:
    from elastictrain.errors import ClusterError
    from elastictrain_actors.profiling import measure_cluster, nodes_of, parts_of

    with nodes_of(address) as nodes:
        if not nodes:
            raise ClusterError(f"Ray at {address} has no node with a CPU to measure on")
        with _progress(parts_of(len(nodes))) as done:
            return measure_cluster(nodes, seconds, str(disk), done=done)


@contextmanager
def _progress(total: int) -> Iterator[Done]:
    """A bar on standard error: parts measured, of how many, and the last one."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("measuring", total=total)
        yield lambda what: bar.update(task, advance=1, description=what)
