"""n-grams of 1 to 4 words, counted by numpy: each n-gram is a key of 64 bits. Knows no metric."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from captioner.evaluation.metrics.words import EncodedCaptions, IntArray

__all__ = [
    "MAX_ORDER",
    "DocumentFrequencies",
    "FloatArray",
    "KeyArray",
    "NGrams",
    "Overlap",
    "count_ngrams",
    "count_repeated",
    "find_overlap",
    "ngram_keys",
    "sum_cells",
]

KeyArray = npt.NDArray[np.uint64]
FloatArray = npt.NDArray[np.float64]

MAX_ORDER = 4
"""Words of the longest n-gram."""


@dataclass(frozen=True)
class NGrams:
    """Distinct n-grams, and how often each occurs in each caption, sorted by caption.

    keys: uint64[G], sorted; caption, ngram (an index of keys), order (words less one), count: int64[K]."""

    keys: KeyArray
    caption: IntArray
    ngram: IntArray
    order: IntArray
    count: IntArray


class Overlap(NamedTuple):
    """Pairs of rows of one NGrams: an n-gram of a caption, and the same in a reference of that caption."""

    in_caption: IntArray
    in_reference: IntArray


def count_ngrams(captions: EncodedCaptions) -> NGrams:
    """Return the n-grams of 1 to 4 words of each caption."""
    by_order = [
        (keys, caption, np.full(len(keys), order)) for order, (keys, caption) in enumerate(ngram_keys(captions))
    ]
    keys, caption, order_of = (np.concatenate(column) for column in zip(*by_order, strict=True))
    distinct, first, ngram = np.unique(keys, return_index=True, return_inverse=True)
    cell, count = np.unique(caption * len(distinct) + ngram, return_counts=True)
    captions_of, ngrams = np.divmod(cell, max(1, len(distinct)))
    return NGrams(distinct, captions_of, ngrams, order_of[first][ngrams], count)


def ngram_keys(captions: EncodedCaptions) -> Iterator[tuple[KeyArray, IntArray]]:
    """Yield the keys of all n-grams of 1, 2, 3 and 4 words, and the caption of each."""
    caption = np.repeat(np.arange(len(captions)), captions.lengths)
    num_left = captions.starts[1:][caption] - np.arange(len(caption))  # words from here to the caption's end
    key = np.zeros(len(caption), np.uint64)
    for order in range(MAX_ORDER):
        position = np.flatnonzero(num_left > order)
        key[position] = _mix(key[position], captions.words[position + order])
        yield key[position], caption[position]


def _mix(keys: KeyArray, words: npt.NDArray[np.int32]) -> KeyArray:
    """Return the key of each n-gram with one more word: 64 well-mixed bits (the finalizer of SplitMix64).

    The chance that any two of ten million n-grams share a key is below one in 100,000."""
    mixed = keys + words.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ mixed >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ mixed >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return mixed ^ mixed >> np.uint64(31)


def find_overlap(ngrams: NGrams, num_captions: int, owner: IntArray) -> Overlap:
    """Return the n-grams that captions share with their references.

    The first `num_captions` captions of `ngrams` are those scored, the others are references. owner: int64[R]."""
    boundary = int(np.searchsorted(ngrams.caption, num_captions))
    in_caption = ngrams.caption[:boundary] * len(ngrams.keys) + ngrams.ngram[:boundary]
    wanted = owner[ngrams.caption[boundary:] - num_captions] * len(ngrams.keys) + ngrams.ngram[boundary:]
    position = np.searchsorted(in_caption, wanted)
    is_shared = np.concatenate([in_caption, [-1]])[position] == wanted
    return Overlap(position[is_shared], boundary + np.flatnonzero(is_shared))


@dataclass(frozen=True)
class DocumentFrequencies:
    """The number of images whose references contain an n-gram, of those that several images have.

    Most n-grams occur in one image only, which weighs as none. keys: uint64[K], sorted; counts: int32[K]."""

    keys: KeyArray
    counts: npt.NDArray[np.int32]

    def of(self, keys: KeyArray) -> IntArray:
        """Return the number of images of each key, 1 for one that no two have."""
        position = np.searchsorted(self.keys, keys)
        is_known = np.append(self.keys, np.uint64(0))[position] == keys
        return np.where(is_known, np.append(self.counts, 1)[position], 1)


def count_repeated(documents: list[KeyArray]) -> tuple[KeyArray, npt.NDArray[np.int32]]:
    """Return the keys that occur more than once, sorted, and how often. Empties `documents`, to hold each key once."""
    keys = np.concatenate(documents)
    documents.clear()
    keys.sort()
    firsts = np.flatnonzero(np.append(True, keys[1:] != keys[:-1])[: len(keys)])
    counts = np.diff(np.append(firsts, len(keys)))
    repeated = np.flatnonzero(counts > 1)
    return keys[firsts[repeated]], counts[repeated].astype(np.int32)


def sum_cells(cells: IntArray, values: FloatArray, shape: tuple[int, int]) -> FloatArray:
    """Return float64[shape] with the sum of the values of each cell (row * columns + column)."""
    return np.bincount(cells, values, shape[0] * shape[1]).astype(np.float64).reshape(shape)  # int64 where all is empty
