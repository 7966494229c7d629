"""BLEU-1 to BLEU-4, from n-gram matches summed over the corpus (Papineni et al., 2002)."""

from collections.abc import Callable

import numpy as np

from captioner.evaluation.metrics.corpus import ImageChunk
from captioner.evaluation.metrics.ngrams import MAX_ORDER, FloatArray, sum_cells
from captioner.evaluation.metrics.words import IntArray

__all__ = ["bleu", "bleu_counts"]

_TINY, _SMALL = 1e-15, 1e-9  # coco-caption's guards against 0 / 0
_MATCHES, _TOTALS, _REFERENCE_LENGTH = slice(0, MAX_ORDER), slice(MAX_ORDER, 2 * MAX_ORDER), 2 * MAX_ORDER


def bleu_counts(chunk: ImageChunk) -> FloatArray:
    """Return float64[B, 9]: matched n-grams of 1 to 4 words, all of them, words of the reference nearest in length."""
    counts = np.empty((len(chunk), 2 * MAX_ORDER + 1))
    counts[:, _MATCHES] = _clipped_matches(chunk)
    counts[:, _TOTALS] = np.maximum(0, chunk.captions.lengths[:, None] - np.arange(MAX_ORDER))
    counts[:, _REFERENCE_LENGTH] = _closest_lengths(chunk)
    return counts


def bleu(order: int) -> Callable[[FloatArray], FloatArray]:
    """Return the function from sums of `bleu_counts`, float64[..., 9], to BLEU of n-grams up to `order` words."""

    def figure(sums: FloatArray) -> FloatArray:
        precisions = (sums[..., _MATCHES] + _TINY) / (sums[..., _TOTALS] + _SMALL)
        mean: FloatArray = np.exp(np.cumsum(np.log(precisions), axis=-1)[..., order - 1] / order)
        num_words = sums[..., _TOTALS][..., 0]
        ratio = (num_words + _TINY) / (sums[..., _REFERENCE_LENGTH] + _SMALL)
        return mean * np.exp(np.minimum(0, 1 - 1 / ratio))

    return figure


def _clipped_matches(chunk: ImageChunk) -> FloatArray:
    """Return float64[B, 4]: n-grams of each caption that a reference has, each at most as often as the reference."""
    ngrams, overlap = chunk.ngrams, chunk.overlap
    most = np.zeros(len(ngrams.count), np.int64)
    np.maximum.at(most, overlap.in_caption, ngrams.count[overlap.in_reference])
    shared = np.flatnonzero(most)
    cells = ngrams.caption[shared] * MAX_ORDER + ngrams.order[shared]
    return sum_cells(cells, np.minimum(most, ngrams.count)[shared].astype(np.float64), (len(chunk), MAX_ORDER))


def _closest_lengths(chunk: ImageChunk) -> IntArray:
    """Return the length of each image's reference that is nearest to the caption's, the shorter of two."""
    lengths = chunk.references.lengths
    ranked = np.abs(lengths - chunk.captions.lengths[chunk.owner]) << 32 | lengths
    nearest: IntArray = np.minimum.reduceat(ranked, chunk.first_references) & (1 << 32) - 1
    return nearest
