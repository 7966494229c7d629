"""Gates of an evaluation: figures that must not be below a value, by `--min NAME=VALUE` or the older `--min-cider`.

Knows the metrics by their table; the share of matched captions is a gate too, but no metric.
"""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from captioner.config import EvaluateConfig
from captioner.errors import ConfigError
from captioner.evaluation.metrics import METRICS

__all__ = ["MATCHED_SHARE", "Gate", "describe_metrics", "gates_of"]

MATCHED_SHARE = "matched_share"
"""Share of the captions that have references."""

_FLAGS = {
    "--min-bleu-4": ("min_bleu_4", "bleu_4"),
    "--min-rouge-l": ("min_rouge_l", "rouge_l"),
    "--min-cider": ("min_cider", "cider_d"),
    "--min-clip-score": ("min_clip_score", "clip_score"),
    "--min-matched": ("min_matched", MATCHED_SHARE),
}
"""Flags for one figure each: the field of the config, and the figure."""


class Gate(NamedTuple):
    """A figure, and the lowest value of it that passes."""

    figure: str
    lowest: float
    text: str
    """The gate as it was written on the command line."""

    def passes(self, figures: Mapping[str, float]) -> bool:
        """Return whether the figure is there and high enough."""
        return figures.get(self.figure, float("nan")) >= self.lowest


def gates_of(config: EvaluateConfig) -> list[Gate]:
    """Return every gate that is set. Raises ConfigError for an unknown metric, or a value that it cannot have."""
    return [*_from_flags(config), *_from_min(config)]


def describe_metrics() -> str:
    """Return the help on `--min`: each metric with its range."""
    ranges = ", ".join(f"{metric.name} (0 to {metric.best:g})" for metric in METRICS.values())
    return f"--min NAME=VALUE takes {ranges}."


def _from_flags(config: EvaluateConfig) -> Iterator[Gate]:
    for flag, (field, figure) in _FLAGS.items():
        lowest: float | None = getattr(config, field)
        if lowest is not None:
            best = 1 if figure == MATCHED_SHARE else METRICS[figure].best
            yield _checked(Gate(figure, lowest, f"{flag} {lowest}"), f"{flag} is {lowest}", best)


def _from_min(config: EvaluateConfig) -> Iterator[Gate]:
    for text in (part.strip() for argument in config.min for part in argument.split(",")):
        name, _, value = text.partition("=")
        if name not in METRICS:
            raise ConfigError(f"--min is {text}; expected NAME=VALUE, NAME one of {', '.join(METRICS)}")
        try:
            lowest = float(value)
        except ValueError:
            raise ConfigError(f"--min is {text}; expected a number, as in {name}=0.5") from None
        yield _checked(Gate(name, lowest, f"--min {text}"), f"--min is {text}", METRICS[name].best)


def _checked(gate: Gate, seen: str, best: float) -> Gate:
    if not 0 <= gate.lowest <= best:
        raise ConfigError(f"{seen}; expected 0 to {best:g}")
    return gate
