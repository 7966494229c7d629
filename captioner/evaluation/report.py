"""What `jobs/evaluate.py` says: how good captions are against references, and whether that is good enough.

Reads both sides part by part; what stays in memory is what `matching` says and some twelve numbers an image. Knows
nothing of metrics but their names.
"""

import math
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from captioner.caption_files import read_captions
from captioner.config import EvaluateConfig
from captioner.evaluation.clip import ClipJudge
from captioner.evaluation.matching import RULES, Captions, Matching, match_sides
from captioner.metrics import METRICS, CaptionEncoder, ImageScores, score_encoded

__all__ = ["evaluate"]

_TITLES = dict(zip(METRICS, ("BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "ROUGE-L", "CIDEr-D"), strict=True)) | {
    "clip_score": "CLIPScore",
    "ref_clip_score": "RefCLIPScore",
}


def evaluate(config: EvaluateConfig) -> Mapping[str, Any]:
    """Return the figures as a summary, `ok` unless one is below its --min; the table for people goes to stderr.

    Raises InputError where a side cannot be read, or no caption has a reference; BundleError or ConfigError for a model
    that cannot score."""
    judge = ClipJudge.of(config)
    encoder = CaptionEncoder()
    captions = Captions.read(read_captions(config.captions, config.storage_options), encoder, judge.wanted_of_captions)
    wanted = judge.wanted_of_references
    references = Captions.read(read_captions(config.references, config.storage_options), encoder, wanted).spoken()
    matching = match_sides(captions, references, config)
    place = np.full(references.num_images, -1)
    place[matching.images] = np.arange(len(matching.images))
    owner = place[references.image]
    scores = score_encoded(captions.texts.take(matching.rows), references.texts, owner)
    for name, values in judge.scores(captions.rows.take(matching.rows), references.rows, owner).items():
        scores = scores if np.isnan(values).all() else scores.with_mean(name, values)
    summary = _summary(captions, references, matching, scores, config) | judge.said()
    for line in _lines(summary, matching):
        print(line, file=sys.stderr)
    return summary


# What is said


def _summary(
    captions: Captions, references: Captions, matching: Matching, scores: ImageScores, config: EvaluateConfig
) -> dict[str, Any]:
    figures = scores.figures()
    intervals = scores.intervals(num_resamples=config.num_resamples, seed=config.seed)
    share = 1 - matching.num_unmatched / len(captions.image)
    below = [f"{flag} {lowest}" for flag, value, lowest in _gates(config, figures, share) if not value >= lowest]
    return {
        "ok": not below,
        "images": len(scores),
        **{name: round(value, 6) for name, value in figures.items()},
        "intervals": {name: [round(bound, 6) for bound in bounds] for name, bounds in intervals.items()},
        "below": below,
        "matched_by": matching.rule,
        "captions": len(captions.image),
        "captions_unmatched": matching.num_unmatched,
        "captions_repeated": matching.num_repeated,
        "references": len(references.image),
        "reference_images": references.num_images,
        "reference_images_without_caption": references.num_images - len(scores),
    }


def _gates(config: EvaluateConfig, figures: Mapping[str, float], share: float) -> Iterator[tuple[str, float, float]]:
    """Yield flag, value and lowest value that passes, of each gate that is set."""
    values = {
        "--min-bleu-4": (figures["bleu_4"], config.min_bleu_4),
        "--min-rouge-l": (figures["rouge_l"], config.min_rouge_l),
        "--min-cider": (figures["cider_d"], config.min_cider),
        "--min-clip-score": (figures.get("clip_score", math.nan), config.min_clip_score),
        "--min-matched": (share, config.min_matched),
    }
    for flag, (value, lowest) in values.items():
        if lowest is not None:
            yield flag, value, lowest


def _lines(summary: Mapping[str, Any], matching: Matching) -> Iterator[str]:
    """Yield what people read: what was compared with what, and the figures."""
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
        yield f"{_TITLES[name]:12}{summary[name]:8.3f}   {low:.3f} .. {high:.3f}"
    yield ""
    yield from (f"below {gate}" for gate in summary["below"])


def _counted(count: int, what: str, examples: str) -> Iterator[str]:
    if count:
        yield f"  {count:,} {what}{examples}"
