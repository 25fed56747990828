"""`elastictrain whatif` for people: sentences, a table of what each worker has cost, and a heat map workers x steps."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from elastictrain.errors import ClusterError, ConfigError
from elastictrain.planner.split import Split, split_affine
from elastictrain.stragglers.whatif import Answer, Floats, Timings, work_of

if TYPE_CHECKING:
    from rich.table import Table

RECENT_STEPS = 50
"""Of these the planner takes the speeds of now."""
MOST_ROWS, MOST_COLUMNS = 200, 600
"""The heat map shows the slowest of neighbours where there are more."""
DARKEST = 2.0
"""Slowness from which all cells are alike, so that one bad hiccup does not make everything else pale."""
WORDS = {
    "compute": "computes slowly", "hiccup": "single long steps", "collector": "Python's garbage collector",
    "data": "waits for data", "host": "is held up before the exchange",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Replan:
    """Lanes of the workers that are there now, and as the planner would deal them out at their present speeds.
    `before_s`, `after_s`: until the last one comes to the exchange.
    """

    workers: tuple[int, ...]
    lanes: tuple[int, ...]
    split: Split
    before_s: float
    lane_s: tuple[float, ...]

    @property
    def after_s(self) -> float:
        return self.split.makespan


def replan(timings: Timings, recent: int = RECENT_STEPS) -> Replan:
    """What the planner would do now: the exact split of the lanes at the speeds of the last steps.

    Taken are the last steps with the workers and the lanes of the very last one: as they were dealt out, whoever has
    computed them.
    """
    there = ~np.isnan(timings.dealt[-1])
    now = timings.dealt[-1, there]
    alike = np.array([bool(np.array_equal(row[there], now)) for row in timings.dealt[-recent:]])
    part = np.nonzero(alike)[0] + len(timings.steps) - len(alike)
    work = work_of(timings)[np.ix_(part, np.nonzero(there)[0])]
    compute = timings.compute_s[np.ix_(part, np.nonzero(there)[0])]
    before = timings.before_s[np.ix_(part, np.nonzero(there)[0])]
    lane = np.median(compute / work, axis=0)
    fixed = np.median(np.maximum(before - compute, 0.0), axis=0)
    lanes = [int(n) for n in now]
    split = split_affine(sum(lanes), fixed.tolist(), lane.tolist(), least=[1] * len(lanes), before=lanes)
    workers = tuple(worker for worker, here in zip(timings.workers, there, strict=True) if here)
    before_s = float(max(fixed + lane * now))
    return Replan(workers, tuple(lanes), split, before_s, tuple(lane.tolist()))


def sentences(answer: Answer, plan: Replan) -> list[str]:
    """What the run would have been, and what to do."""
    count, more = len(answer.steps), answer.actual_s - answer.healthy_s
    left = f" ({answer.left_out} more say nothing of speed: checkpoints, evaluations, first steps)"
    first = (
        f"{count} steps took {answer.actual_s:.4g} s; without anybody's slowness {answer.healthy_s:.4g} s: "
        f"{more / answer.actual_s:.1%} of the time was lost to it{left if answer.left_out else ''}."
    )
    said = [first]
    for cost in answer.costs[:1]:
        share = cost.without_s / more if more > 0 else 0.0
        why = ", ".join(f"{WORDS[cause]} ({seconds:.3g} s)" for cause, seconds in cost.causes[:2])
        said.append(f"Worker {cost.worker} cost most: alone healthy it would have saved {share:.0%} of that. It {why}.")
    if answer.link_s > 0.005 * answer.actual_s:
        said.append(f"Transfers above their usual time cost {answer.link_s:.3g} s; they are nobody's alone.")
    uneven = answer.healthy_s - answer.even_s
    if uneven > 0.005 * answer.actual_s:
        said.append(f"Work that was dealt out unevenly (lanes, lengths of sequences) cost {uneven:.3g} s more.")
    return [*said, advice(plan)]


def advice(plan: Replan) -> str:
    """What the planner would do now."""
    gain = 1 - plan.after_s / plan.before_s
    changed = [
        f"worker {worker}: {new} instead of {old}"
        for worker, old, new in zip(plan.workers, plan.lanes, plan.split.parts, strict=True)
        if old != new
    ]
    if not changed or gain <= 0.005:
        return "At the present speeds the planner would leave the lanes where they are."
    shown = "; ".join(changed[:8]) + (f"; and {len(changed) - 8} more" if len(changed) > 8 else "")
    return (
        f"At the present speeds the planner would move lanes ({shown}): {plan.after_s:.3g} s instead of "
        f"{plan.before_s:.3g} s until the last one comes to the exchange, {gain:.1%} less; the bits stay the same."
    )


def cost_table(answer: Answer, rows: int = 10) -> Table:
    """What each worker has cost, the most first."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(title="What slowness has cost", title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("worker", justify="right", no_wrap=True)
    for name in ("saved without it, s", "lost by it alone, s", "steps"):
        table.add_column(name, justify="right")
    table.add_column("why", overflow="fold")
    for cost in answer.costs[:rows]:
        why = ", ".join(f"{cause} {seconds:.3g} s" for cause, seconds in cost.causes)
        table.add_row(str(cost.worker), f"{cost.without_s:.4g}", f"{cost.alone_s:.4g}", str(cost.steps), why)
    if len(answer.costs) > rows:
        table.caption = f"and {len(answer.costs) - rows} more"
    return table


def picture_of(answer: Answer, *, title: str) -> Any:
    """The heat map as a matplotlib Figure. Raises ConfigError when matplotlib is missing."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.colors import LinearSegmentedColormap
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError(
            f"the picture needs matplotlib ({error}); install it with: pip install 'elastictrain[plot]'"
        ) from error
    cells, row_group, steps = shrunk(answer)
    figure = Figure(figsize=(11, 3.2 + min(0.28 * len(cells), 6)), layout="constrained")
    FigureCanvasAgg(figure)
    heat, line = figure.subplots(2, 1, height_ratios=[max(1.0, 0.16 * len(cells)), 1.0], sharex=True)
    shades = ["#f7f7f7", "#fddbc7", "#f4a582", "#d6604d", "#67001f"]
    colours = LinearSegmentedColormap.from_list("slowness", shades).with_extremes(bad="#b8c4d0")
    edges = [steps[0], *(step + 1 for step in steps[1:]), answer.steps[-1] + 1]
    drawn = heat.pcolormesh(
        edges, np.arange(len(cells) + 1), np.ma.masked_invalid(cells), cmap=colours, vmin=1.0,
        vmax=min(max(1.5, float(np.nanmax(cells))), DARKEST), rasterized=True,
    )  # fmt: skip
    heat.invert_yaxis()
    _name_rows(heat, answer, row_group, len(cells))
    bar = figure.colorbar(drawn, ax=heat, pad=0.01, aspect=12, extend="max")
    heat.set_title("times as long as when healthy (grey: not there)", fontsize=8, loc="right")  # a bar may be too short
    bar.ax.tick_params(labelsize=8)
    line.plot(answer.steps, answer.step_s, color="#d6604d", lw=1.0, label="as it was")
    line.plot(answer.steps, answer.healthy_step_s, color="#0072b2", lw=1.0, label="without slowness")
    line.set_ylim(0, float(np.quantile(answer.step_s, 0.995)) * 1.15)
    line.set_ylabel("seconds a step", fontsize=8)
    line.set_xlabel("step")
    line.tick_params(labelsize=8)
    line.legend(fontsize=8, frameon=False, ncols=2, loc="lower right", bbox_to_anchor=(1.0, 1.0), borderaxespad=0.1)
    line.spines[["top", "right"]].set_visible(False)
    figure.suptitle(
        f"{title}: {answer.actual_s:.4g} s as it was, {answer.healthy_s:.4g} s without slowness", fontsize=10, x=0.01,
        ha="left",
    )  # fmt: skip
    return figure


def draw_whatif(answer: Answer, out: Path, *, title: str) -> Path:
    """Write the heat map, as SVG for a name that ends so, else as PNG: for every worker and step, how many times as
    long as when healthy it took; below it the steps as they were and as they would have been.

    Raises ConfigError when matplotlib is missing, ClusterError when the file cannot be written.
    """
    figure = picture_of(answer, title=title)
    buffer = io.BytesIO()
    kind = "svg" if out.suffix.lower() == ".svg" else "png"
    figure.savefig(buffer, format=kind, dpi=130)
    try:
        out.write_bytes(buffer.getvalue())
    except OSError as error:
        raise ClusterError(f"{out}: cannot be written: {error.strerror or error}") from error
    return out


def _name_rows(panel: Any, answer: Answer, group: int, rows: int) -> None:
    every = -(-rows // 32)
    names = [
        f"worker {answer.workers[row * group]}" if group == 1 else f"workers {answer.workers[row * group]} …"
        for row in range(0, rows, every)
    ]
    panel.set_yticks([row + 0.5 for row in range(0, rows, every)], names, fontsize=8)


def shrunk(answer: Answer) -> tuple[Floats, int, list[int]]:
    """Cells [rows, columns] that can be seen, workers per row, and the first step of each column.

    A cell is the greatest slowness of what lies in it, so that one slow worker among thousands is still seen.
    """
    values = answer.slowness.T
    workers, steps = values.shape
    down, across = -(-workers // MOST_ROWS), -(-steps // MOST_COLUMNS)
    rows, columns = -(-workers // down), -(-steps // across)
    padded = np.full((rows * down, columns * across), -np.inf)
    padded[:workers, :steps] = np.where(np.isnan(values), -np.inf, values)
    cells = padded.reshape(rows, down, columns, across).max(axis=(1, 3))
    return np.where(np.isinf(cells), np.nan, cells), down, [answer.steps[n * across] for n in range(columns)]
