"""ROUGE-L: the F-measure of the longest common subsequence with the references (Lin, 2004)."""

from itertools import pairwise

import numpy as np

from captioner.evaluation.metrics.corpus import FloatArray, ImageChunk

__all__ = ["rouge_l"]

_BETA = 1.2


def rouge_l(chunk: ImageChunk) -> FloatArray:
    """Return float64[B], the ROUGE-L of each image."""
    references = chunk.references.to_lists()
    bounds = [*chunk.first_references.tolist(), len(references)]
    own = (references[first:stop] for first, stop in pairwise(bounds))
    pairs = zip(chunk.captions.to_lists(), own, strict=True)
    return np.array([_rouge_l(caption, references) for caption, references in pairs], np.float64)


def _rouge_l(caption: list[int], references: list[list[int]]) -> float:
    """Return the F-measure of the best precision and the best recall, which may be of two references (as COCO does)."""
    common = [_longest_common(caption, reference) for reference in references]
    if not any(common):
        return 0.0
    precision = max(common) / len(caption)
    recall = max(shared / len(reference) for shared, reference in zip(common, references, strict=True))
    return (1 + _BETA**2) * precision * recall / (recall + _BETA**2 * precision)


def _longest_common(first: list[int], second: list[int]) -> int:
    """Return the length of the longest common subsequence. A row of its table is the bits of one integer.

    After Hyyrö (2004), "Bit-parallel LCS-length computation revisited"."""
    positions: dict[int, int] = {}
    for position, word in enumerate(first):
        positions[word] = positions.get(word, 0) | 1 << position
    all_ones = row = (1 << len(first)) - 1
    for word in second:
        matches = row & positions.get(word, 0)
        row = (row + matches | row - matches) & all_ones
    return len(first) - row.bit_count()
