"""The picture of how long documents are."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from elastictrain.data.inspection import Lengths, histogram, quantiles
from elastictrain.errors import ClusterError, ConfigError
from elastictrain.observe.plot import INK, LOSS_COLOUR, STYLE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TOKENS_COLOUR = STYLE["loss"][0]


def plot_lengths(lengths: Lengths, out: str | Path, *, title: str, sequence_length: int | None = None) -> Path:
    """Write a PNG: how many documents there are of each length, and how much of the tokens lies in them.

    Raises ConfigError when matplotlib is missing or there are no documents, ClusterError when it cannot be written.
    """
    if not len(lengths):
        raise ConfigError("no documents to draw the lengths of")
    buffer = io.BytesIO()
    draw_lengths(lengths, title=title, sequence_length=sequence_length).savefig(buffer, format="png", dpi=140)
    path = Path(out)
    try:
        path.write_bytes(buffer.getvalue())
    except OSError as error:
        raise ClusterError(f"{path}: cannot be written: {error.strerror or error}") from error
    return path


def draw_lengths(lengths: Lengths, *, title: str, sequence_length: int | None = None) -> Figure:
    """The figure itself; `lengths` must not be empty."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError(
            f"the picture needs matplotlib ({error}); install it with: pip install 'elastictrain[plot]'"
        ) from error
    figure = Figure(figsize=(8.5, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    panel = figure.subplots()
    edges, counts = histogram(lengths, bins=40)
    panel.stairs(counts, edges, color=LOSS_COLOUR, fill=True, alpha=0.35)
    panel.stairs(counts, edges, color=LOSS_COLOUR, lw=1.2)
    panel.set_xscale("log")
    panel.set_xlim(edges[0], edges[-1])
    panel.set_ylim(0, counts.max() * 1.18)
    panel.set_xlabel("tokens of a document", color=INK)
    panel.set_ylabel("documents", color=LOSS_COLOUR)
    _draw_share(panel, lengths)
    found = quantiles(lengths)
    for name, words in (("p50", "half"), ("p95", "95 %")):
        panel.axvline(found[name], color=INK, lw=1.0, ls=":")
        _label(panel, found[name], f"{words} ≤ {found[name]:,}", INK)
    if sequence_length is not None and edges[0] <= sequence_length <= edges[-1]:
        panel.axvline(sequence_length, color=STYLE["join"][0], lw=1.4, ls="--")
        _label(panel, sequence_length, f"sequence length {sequence_length:,}", STYLE["join"][0])
    panel.tick_params(colors=INK, labelsize=9)
    panel.spines["top"].set_visible(False)
    panel.set_title(title, loc="left", fontsize=12, color=INK, pad=10)
    return figure


def _draw_share(panel: Axes, lengths: Lengths) -> None:
    """The share of all tokens in documents up to a length, on an axis of its own."""
    ascending = np.sort(np.maximum(lengths, 1))
    share = np.cumsum(ascending) / ascending.sum() * 100
    other = panel.twinx()
    other.plot(ascending, share, color=TOKENS_COLOUR, lw=1.4)
    other.set_ylim(0, 118)
    other.set_yticks([0, 25, 50, 75, 100])
    other.set_ylabel("% of tokens in documents up to there", color=TOKENS_COLOUR)
    other.tick_params(colors=INK, labelsize=9)
    other.spines["top"].set_visible(False)


def _label(panel: Axes, at: float, text: str, colour: str) -> None:
    panel.annotate(
        text, (at, 0.99), xycoords=("data", "axes fraction"), xytext=(3, 0), textcoords="offset points", rotation=90,
        va="top", ha="left", fontsize=8, color=colour,
        bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 0.8},
    )  # fmt: skip
