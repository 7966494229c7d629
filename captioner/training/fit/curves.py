"""Curves of a fit as SVG: loss, and the metrics of the validation captions, each in a panel of its own scale.

Knows rows of metrics.jsonl; nothing of files. Matplotlib is imported when curves are drawn: it takes half a second.
"""

import io
import math
from collections.abc import Sequence
from typing import Any

from captioner.training.fit.row import Row

__all__ = ["curves_svg"]

_PANELS = {
    "loss per token": {"loss": "training", "val_loss": "validation"},
    "CIDEr-D": {"cider_d": "CIDEr-D"},
    "BLEU-4, ROUGE-L": {"bleu_4": "BLEU-4", "rouge_l": "ROUGE-L"},
}
"""Title -> column of metrics.jsonl -> label of its line."""

_COLORS = ("#1770ec", "#b95b0a")
_INK = "#757575"  # as the lines 4.5 to 1 on white and on black alike: the page behind the curves shows through
_STYLE: Any = {  # a mapping of literal names, which differ by version
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlecolor": _INK,
    "axes.titlelocation": "left",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "grid.alpha": 0.3,
    "grid.color": _INK,
    "legend.frameon": False,
    "legend.labelcolor": "linecolor",
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "captioner",  # the same ids each time
    "text.color": _INK,
    "text.parse_math": False,  # a title is the name of a folder
    "xtick.color": _INK,
    "ytick.color": _INK,
}


def curves_svg(history: Sequence[Row], title: str = "") -> str:
    """Return the curves of all rows, the same text for the same rows; a panel without a finite number is left out."""
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    panels = {name: _finite(history, labels) for name, labels in _PANELS.items()}
    panels = {name: lines for name, lines in panels.items() if lines}
    with mpl.rc_context(_STYLE):
        width, height = 7.6, 0.6 + 2.6 * len(panels)
        figure = Figure(figsize=(width, height))
        FigureCanvasSVG(figure)
        figure.suptitle(title, y=1 - 0.1 / height, fontweight="bold")
        if panels:
            # margins in inches: a layout that measures every text draws all twice, in 0.17 s in place of 0.07
            edges = {"left": 0.75 / width, "right": 1 - 0.1 / width, "bottom": 0.5 / height, "top": 1 - 0.65 / height}
            all_axes = figure.subplots(len(panels), sharex=True, squeeze=False, gridspec_kw=edges)[:, 0]
            for axes, (name, lines) in zip(all_axes, panels.items(), strict=True):
                _draw(axes, name, lines)
            all_axes[-1].set_xlabel("step")
        return _svg_of(figure, title)


def _finite(history: Sequence[Row], labels: dict[str, str]) -> dict[str, list[tuple[float, float]]]:
    """Return label -> steps and values, of each column that has a finite value."""
    lines = {
        label: [(row["step"], row[column]) for row in history if math.isfinite(row.get(column, math.nan))]
        for column, label in labels.items()
    }
    return {label: points for label, points in lines.items() if points}


def _draw(axes: Any, name: str, lines: dict[str, list[tuple[float, float]]]) -> None:
    for color, (label, points) in zip(_COLORS, lines.items(), strict=False):
        steps, values = zip(*points, strict=True)
        has_marks = label != "training"  # it has a point every few steps; the others one an evaluation
        axes.plot(steps, values, color=color, label=label, marker="o" if has_marks else None, markersize=4)
    axes.set_title(name, fontsize="medium")
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0, top=None if max(value for points in lines.values() for _, value in points) > 1e-9 else 1)
    axes.grid(axis="y")
    if len(lines) > 1:
        axes.legend()


def _svg_of(figure: Any, title: str) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Title": title, "Creator": None})
    return buffer.getvalue()
