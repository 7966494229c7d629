"""Every metric that an evaluation computes: to add one, write its file and enter it in METRICS."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from captioner.evaluation.metrics.bleu import bleu, bleu_counts
from captioner.evaluation.metrics.cider import cider_d
from captioner.evaluation.metrics.clip_score import clip_score, ref_clip_score
from captioner.evaluation.metrics.corpus import FloatArray, ImageChunk
from captioner.evaluation.metrics.rouge import rouge_l

__all__ = ["METRICS", "Metric", "mean_of_known"]


def mean_of_known(sums: FloatArray) -> FloatArray:
    """Return the mean score from the sums of scores and of images that have one, float64[..., 2]; NaN for no image."""
    totals, counts = sums[..., 0], sums[..., 1]
    return np.divide(totals, counts, out=np.full_like(totals, np.nan), where=counts > 0)


@dataclass(frozen=True)
class Metric:
    """A figure of a corpus of captions; higher is better."""

    name: str
    """Name in the summary and in `--min NAME=VALUE`."""

    title: str
    """Name in the table for people."""

    best: float
    """Highest value; the lowest is 0."""

    score: Callable[[ImageChunk], FloatArray]
    """Without `figure`: returns float64[B], the score of each image, NaN where it has none; the figure is their mean.
    With `figure`: returns float64[B, K], counts to sum over the images; metrics with the same `score` share them."""

    figure: Callable[[FloatArray], FloatArray] | None = None
    """Returns float64[...], the figure, from sums of counts, float64[..., K]."""


METRICS = {
    metric.name: metric
    for metric in (
        Metric("bleu_1", "BLEU-1", 1, bleu_counts, bleu(1)),
        Metric("bleu_2", "BLEU-2", 1, bleu_counts, bleu(2)),
        Metric("bleu_3", "BLEU-3", 1, bleu_counts, bleu(3)),
        Metric("bleu_4", "BLEU-4", 1, bleu_counts, bleu(4)),
        Metric("rouge_l", "ROUGE-L", 1, rouge_l),
        Metric("cider_d", "CIDEr-D", 10, cider_d),
        Metric("clip_score", "CLIPScore", 2.5, clip_score),
        Metric("ref_clip_score", "RefCLIPScore", 2.5, ref_clip_score),
    )
}
