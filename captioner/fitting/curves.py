"""A plot of a fit as SVG: loss above, metrics of the validation captions below. Text alone, no library.

Knows rows of metrics.jsonl; nothing of files.
"""

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from captioner.fitting.state import Row

__all__ = ["curves_svg"]

_WIDTH, _PANEL, _LEFT, _RIGHT, _TOP, _GAP = 760, 230, 64, 96, 34, 52
_COLOURS = ("#2563a8", "#c2410c", "#15803d", "#7c3aed")
_STYLE = (
    "text{font:12px system-ui,sans-serif;fill:#333}.t{font-weight:600}.g{stroke:#e4e4e4}.a{stroke:#999}"
    "path{fill:none;stroke-width:1.8}"
)


@dataclass(frozen=True)
class _Line:
    name: str
    points: list[tuple[float, float]]
    has_dots: bool = False


def curves_svg(history: Sequence[Row], title: str = "") -> str:
    """Return a plot of all rows: training and validation loss, and the metrics where captions were scored."""
    losses = [_line(history, "loss", "training"), _line(history, "val_loss", "validation", has_dots=True)]
    metrics = [_line(history, name, label, has_dots=True) for name, label in _METRICS.items()]
    panels = [("loss per token", losses), ("validation captions", metrics)]
    drawn = [(name, [line for line in lines if line.points]) for name, lines in panels]
    drawn = [(name, lines) for name, lines in drawn if lines]
    height = _TOP + len(drawn) * (_PANEL + _GAP)
    last = max((row["step"] for row in history), default=1.0)
    body = "".join(
        _panel(name, lines, _TOP + place * (_PANEL + _GAP), last) for place, (name, lines) in enumerate(drawn)
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" width="{_WIDTH}" height="{height}"'
        f' role="img"><title>{html.escape(title)}</title><style>{_STYLE}</style>'
        f'<rect width="100%" height="100%" fill="#fff"/>'
        f'<text class="t" x="{_LEFT}" y="20">{html.escape(title)}</text>{body}</svg>\n'
    )


_METRICS = {"cider_d": "CIDEr-D", "rouge_l": "ROUGE-L", "bleu_4": "BLEU-4"}


def _line(history: Sequence[Row], name: str, label: str, *, has_dots: bool = False) -> _Line:
    points = [(row["step"], row[name]) for row in history if math.isfinite(row.get(name, math.nan))]
    return _Line(label, points, has_dots)


def _panel(name: str, lines: list[_Line], top: float, last_step: float) -> str:
    highest = max(y for line in lines for _, y in line.points)
    ticks = _ticks(highest)
    right, bottom = _WIDTH - _RIGHT, top + _PANEL

    def x(step: float) -> float:
        return _LEFT + (right - _LEFT) * step / last_step

    def y(value: float) -> float:
        return bottom - _PANEL * value / ticks[-1]

    parts = [f'<text x="{_LEFT}" y="{top + 12:.0f}">{html.escape(name)}</text>']
    for tick in ticks:
        parts.append(f'<line class="g" x1="{_LEFT}" x2="{right}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>')
        parts.append(f'<text x="{_LEFT - 8}" y="{y(tick) + 4:.1f}" text-anchor="end">{tick:g}</text>')
    parts += [
        f'<text x="{x(step):.1f}" y="{bottom + 18}" text-anchor="middle">{step:g}</text>'
        for step in _ticks(last_step)[:-2] or [0.0]
    ]
    parts.append(f'<text x="{right}" y="{bottom + 18}" text-anchor="middle">step {last_step:g}</text>')
    parts.append(f'<line class="a" x1="{_LEFT}" x2="{right}" y1="{bottom}" y2="{bottom}"/>')
    labels = _spread([y(line.points[-1][1]) for line in lines])
    for colour, line, label_y in zip(_COLOURS, lines, labels, strict=False):
        places = [(x(step), y(value)) for step, value in line.points]
        parts.append(f'<path stroke="{colour}" d="M{" L".join(f"{a:.1f},{b:.1f}" for a, b in places)}"/>')
        if line.has_dots:
            parts += [f'<circle cx="{a:.1f}" cy="{b:.1f}" r="3" fill="{colour}"/>' for a, b in places]
        parts.append(
            f'<text x="{right + 8}" y="{label_y + 4:.1f}" style="fill:{colour}">{html.escape(line.name)}</text>'
        )
    return "".join(parts)


def _spread(places: list[float]) -> list[float]:
    """Return the places of labels, moved down where one would lie on another."""
    found = list(places)
    for above, below in pairwise(sorted(range(len(places)), key=lambda place: places[place])):
        found[below] = max(found[below], found[above] + 15)
    return found


def _ticks(highest: float) -> list[float]:
    """Return some round numbers from 0 to at least `highest`."""
    if highest < 1e-9:  # BLEU of nothing right is 1e-11
        return [0.0, 1.0]
    unit = 10 ** math.floor(math.log10(highest / 4))
    step = next(unit * factor for factor in (1, 2, 5, 10) if highest / (unit * factor) <= 5)
    return [round(step * place, 12) for place in range(math.ceil(highest / step - 1e-9) + 1)]
