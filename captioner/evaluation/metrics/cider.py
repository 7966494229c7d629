"""CIDEr-D: agreement of a caption's n-grams with the references', the rarer the n-gram the more (arXiv:1411.5726)."""

import numpy as np

from captioner.evaluation.metrics.corpus import FloatArray, ImageChunk
from captioner.evaluation.metrics.ngrams import MAX_ORDER, sum_cells

__all__ = ["cider_d"]

_SIGMA = 6.0


def cider_d(chunk: ImageChunk) -> FloatArray:
    """Return float64[B], CIDEr-D of each image: clipped tf-idf cosines, reduced for another length, times 10."""
    num, num_refs = len(chunk), len(chunk.references)
    ngrams, overlap = chunk.ngrams, chunk.overlap
    weights = ngrams.count * chunk.idf[ngrams.ngram]
    cells = ngrams.caption * MAX_ORDER + ngrams.order
    norms = np.sqrt(sum_cells(cells, weights**2, (num + num_refs, MAX_ORDER)))
    shared = np.minimum(weights[overlap.in_caption], weights[overlap.in_reference]) * weights[overlap.in_reference]
    dots = sum_cells(cells[overlap.in_reference] - num * MAX_ORDER, shared, (num_refs, MAX_ORDER))
    scale = norms[:num][chunk.owner] * norms[num:]
    cosines = np.divide(dots, scale, out=np.zeros_like(dots), where=scale > 0)
    difference = chunk.captions.lengths[chunk.owner] - chunk.references.lengths
    similar = cosines.mean(1) * np.exp(-(difference**2) / (2 * _SIGMA**2))
    scores: FloatArray = 10 * np.bincount(chunk.owner, similar, num) / np.bincount(chunk.owner, minlength=num)
    return scores
