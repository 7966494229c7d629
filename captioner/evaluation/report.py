"""`jobs/evaluate.py`: how good captions are against references, and whether that is good enough.

Reads both sides part by part; what stays in memory is what `matching` holds and some fourteen numbers an image. Knows
no metric by name.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from captioner.config import EvaluateConfig
from captioner.evaluation.clip import ClipScorer
from captioner.evaluation.gates import MATCHED_SHARE, Gate, gates_of
from captioner.evaluation.matching import RULES, Captions, Matching, match_sides
from captioner.evaluation.metrics import METRICS, CaptionEncoder, score_encoded
from captioner.evaluation.side import Side
from captioner.terminal import say

__all__ = ["BatchSizes", "evaluate"]


@dataclass(frozen=True, kw_only=True)
class BatchSizes:
    """How much of an evaluation is held at once. No figure depends on it; intervals do on the bootstrap's groups."""

    rows_per_batch: int = 8192
    images_per_chunk: int = 2048
    ngrams_per_pass: int = 1 << 20
    bootstrap_groups: int = 10_000


def evaluate(config: EvaluateConfig, sizes: BatchSizes | None = None) -> Mapping[str, Any]:
    """Return the figures as a summary, `ok` unless one is below its --min; the table for people goes to stderr.

    Raises InputError where a side cannot be read, or no caption has a reference; BundleError or ConfigError for a model
    that cannot score; ConfigError for a gate that no evaluation could pass."""
    sizes = sizes or BatchSizes()
    gates = gates_of(config)
    clip = ClipScorer.of(config, gates)
    encoder = CaptionEncoder()

    def read(side: Side, columns: Sequence[str]) -> Captions:
        return side.read(
            lambda rows: Captions.read(rows, encoder, columns, rows_per_batch=sizes.rows_per_batch),
            sizes.rows_per_batch,
        )

    captions = read(Side.captions(config), clip.columns_of_captions)
    references = read(Side.references(config), clip.columns_of_references).with_words()
    matching = match_sides(captions, references, config)
    position = np.full(references.num_images, -1)
    position[matching.images] = np.arange(len(matching.images))
    owner = position[references.image]
    scores = score_encoded(
        captions.texts.take(matching.rows),
        references.texts,
        owner,
        known=clip.scores(captions.rows.take(matching.rows), references.rows, owner),
        images_per_chunk=sizes.images_per_chunk,
        ngrams_per_pass=sizes.ngrams_per_pass,
    )
    intervals = scores.intervals(
        num_resamples=config.num_resamples, seed=config.seed, max_groups=sizes.bootstrap_groups
    )
    summary = _summary(captions, references, matching, scores.figures(), intervals, gates) | clip.summary()
    say(_lines(summary, matching))
    return summary


def _summary(
    captions: Captions,
    references: Captions,
    matching: Matching,
    figures: Mapping[str, float],
    intervals: Mapping[str, tuple[float, float]],
    gates: Sequence[Gate],
) -> dict[str, Any]:
    matched_share = 1 - matching.num_unmatched / len(captions.image)
    below = [gate.text for gate in gates if not gate.passes({**figures, MATCHED_SHARE: matched_share})]
    num_images = len(matching.rows)
    return {
        "ok": not below,
        "images": num_images,
        **{name: round(value, 6) for name, value in figures.items()},
        "intervals": {name: [round(bound, 6) for bound in bounds] for name, bounds in intervals.items()},
        "below": below,
        "matched_by": matching.rule,
        "captions": len(captions.image),
        "captions_unmatched": matching.num_unmatched,
        "captions_repeated": matching.num_repeated,
        "references": len(references.image),
        "reference_images": references.num_images,
        "reference_images_without_caption": references.num_images - num_images,
    }


def _lines(summary: Mapping[str, Any], matching: Matching) -> Iterator[str]:
    """Yield the lines for people: which captions were compared, and the figures."""
    yield f"{summary['images']:,} images have a caption and references, matched by {RULES[matching.rule]}"
    examples = ", ".join(matching.unmatched_examples)
    yield from _counted(summary["captions_unmatched"], "captions without references", f", such as {examples}")
    yield from _counted(summary["captions_repeated"], "captions of an image that had one: the first counts", "")
    yield from _counted(summary["reference_images_without_caption"], "images with references but no caption", "")
    unread = summary.get("images_unread", {})
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in unread.items())
    yield from _counted(sum(unread.values()), "images without CLIPScore, as they cannot be read again", f": {reasons}")
    yield ""
    yield f"{'':12}{'':>8}   95 % interval"
    for name, (low, high) in summary["intervals"].items():
        yield f"{METRICS[name].title:12}{summary[name]:8.3f}   {low:.3f} .. {high:.3f}"
    yield ""
    yield from (f"below {gate}" for gate in summary["below"])


def _counted(count: int, noun: str, examples: str) -> Iterator[str]:
    if count:
        yield f"  {count:,} {noun}{examples}"
