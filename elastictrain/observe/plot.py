"""The loss plot of a run, with what happened to it marked."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from elastictrain.errors import ClusterError, ConfigError
from elastictrain.observe.marks import Mark, marks
from elastictrain.observe.metrics import MetricsRow
from elastictrain.observe.rundir import RunDirectory

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette (2008): told apart by colour-blind readers too; the dash pattern says it a second time.
STYLE: dict[str, tuple[str, Any]] = {
    "loss": ("#d55e00", "-"),
    "join": ("#009e73", "--"),
    "drain": ("#e69f00", "-."),
    "restore": ("#cc79a7", ":"),
    "skipped": ("#666666", ":"),
    "notice": ("#6a3d9a", (0, (1, 3))),
}
NAMES = {"loss": "worker lost", "join": "joined", "drain": "drained", "restore": "back to checkpoint",
         "skipped": "step skipped", "notice": "notice"}  # fmt: skip
LOSS_COLOUR, WORLD_COLOUR = "#0072b2", "#444444"
EVALUATION_COLOURS = ("#56b4e9", "#009e73", "#cc79a7", "#e69f00")
INK = "#333333"


def plot_run(run: RunDirectory, out: str | Path | None = None) -> Path:
    """Write `loss.png` (or `out`): loss over steps, faults as vertical lines, the world size below, evaluation if any.

    Raises ConfigError when matplotlib is missing or nothing has been trained yet, ClusterError when it cannot be
    written. Uses matplotlib without pyplot, so that no global state changes.
    """
    rows = run.metrics()
    if not rows:
        raise ConfigError(f"RUN {str(run.path)!r}: nothing to plot: no step has been published yet")
    picture = draw(rows, marks(run.events(), rows), title=run.path.name)
    buffer = io.BytesIO()
    picture.savefig(buffer, format="png", dpi=140)
    path = Path(out) if out is not None else run.loss_png
    try:
        path.write_bytes(buffer.getvalue())
    except OSError as error:
        raise ClusterError(f"{path}: cannot be written: {error.strerror or error}") from error
    return path


def draw(rows: Sequence[MetricsRow], faults: Sequence[Mark], *, title: str) -> Figure:
    """The figure itself; `rows` must not be empty."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError(
            f"the loss plot needs matplotlib ({error}); install it with: pip install 'elastictrain[plot]'"
        ) from error
    evaluated = _evaluation(rows)
    figure = Figure(figsize=(10, 5.2 + 1.1 * len(evaluated)), layout="constrained")
    FigureCanvasAgg(figure)
    heights = [5.0, *(1.5 for _ in evaluated), 1.0]
    panels = figure.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    top, bottom = panels[0], panels[-1]
    _draw_loss(top, rows)
    for panel, colour, (name, points) in zip(panels[1:-1], EVALUATION_COLOURS, evaluated.items(), strict=False):
        _draw_evaluation(panel, name, points, colour)
    _draw_world(bottom, rows)
    _draw_marks(list(panels), faults)
    first, last = rows[0].step, rows[-1].step
    top.set_xlim(first - 0.5, max(last, first + 1) + 0.5)
    for panel in panels:
        panel.tick_params(colors=INK, labelsize=9)
        panel.spines[["top", "right"]].set_visible(False)
    bottom.set_xlabel("step", color=INK)
    top.set_title(title, loc="left", fontsize=12, color=INK, pad=10)
    _legend(top)
    return figure


def _draw_loss(panel: Axes, rows: Sequence[MetricsRow]) -> None:
    steps = [row.step for row in rows]
    losses = [float("nan") if row.loss is None else row.loss for row in rows]
    smooth = _smoothed(losses)
    if smooth is None:
        panel.plot(steps, losses, color=LOSS_COLOUR, lw=1.6, label="loss", marker="." if len(steps) < 60 else None)
    else:
        panel.plot(steps, losses, color=LOSS_COLOUR, lw=0.8, alpha=0.3)
        panel.plot(steps, smooth, color=LOSS_COLOUR, lw=1.8, label="loss (running mean; each step in pale)")
    panel.set_ylabel("loss", color=INK)
    panel.grid(axis="y", color="#e6e6e6", lw=0.8)
    panel.set_axisbelow(True)


def _smoothed(losses: Sequence[float]) -> list[float] | None:
    """Exponential running mean over about a hundredth of the run; None for a run that is short enough to be read."""
    if len(losses) < 200:
        return None
    weight, mean, smooth = 2 / (len(losses) / 100 + 1), losses[0], []
    for loss in losses:
        if loss == loss:
            mean = loss if mean != mean else mean + weight * (loss - mean)
        smooth.append(mean)
    return smooth


def _draw_evaluation(panel: Axes, name: str, points: Sequence[tuple[int, float]], colour: str) -> None:
    """A panel of its own for each metric: their scales have nothing to do with each other."""
    panel.plot([step for step, _ in points], [value for _, value in points], color=colour, lw=1.4, marker="o", ms=3.5)
    lines = [word if len(word) <= 14 else word[:13] + "…" for word in name.split("_")]
    panel.set_ylabel("\n".join(lines[:3]), color=INK)
    panel.grid(axis="y", color="#e6e6e6", lw=0.8)
    panel.set_axisbelow(True)
    panel.margins(y=0.15)


def _draw_world(panel: Axes, rows: Sequence[MetricsRow]) -> None:
    from matplotlib.ticker import MaxNLocator

    edges = [row.step - 0.5 for row in rows] + [rows[-1].step + 0.5]
    panel.stairs([row.world for row in rows], edges, color=WORLD_COLOUR, lw=1.4, fill=True, alpha=0.18)
    panel.stairs([row.world for row in rows], edges, color=WORLD_COLOUR, lw=1.4)
    panel.set_ylim(0, max(row.world for row in rows) + 0.6)
    panel.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=4))
    panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    panel.set_ylabel("workers", color=INK)


def _draw_marks(panels: Sequence[Axes], faults: Sequence[Mark]) -> None:
    named: set[str] = set()
    crowded = len(faults) > 12
    for mark in faults:
        colour, dashes = STYLE[mark.family]
        for panel in panels:
            label = NAMES[mark.family] if panel is panels[0] and mark.family not in named else None
            panel.axvline(mark.step, color=colour, ls=dashes, lw=1.2, alpha=0.85, zorder=1.5, label=label)
        named.add(mark.family)
        if not crowded and mark.family != "skipped":
            panels[0].annotate(
                mark.label, (mark.step, 0.98), xycoords=("data", "axes fraction"), xytext=(3, 0),
                textcoords="offset points", rotation=90, va="top", ha="left", fontsize=7.5, color=colour,
                bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 0.8},
            )  # fmt: skip


def _legend(panel: Axes) -> None:
    panel.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=6, fontsize=8, frameon=False, borderaxespad=0.2)


def _evaluation(rows: Sequence[MetricsRow]) -> dict[str, list[tuple[int, float]]]:
    """The points of each metric; of many metrics the first four."""
    found: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        for name, value in (row.evaluation or {}).items():
            if value is not None:
                found.setdefault(name, []).append((row.step, value))
    return dict(list(found.items())[: len(EVALUATION_COLOURS)])
