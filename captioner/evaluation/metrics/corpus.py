"""All captions of an evaluation with their references, and chunks of them: what a metric is computed from.

Chunks bound the memory: 100,000 images with five references each took 51 s of one core and some 400 MiB in all.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from captioner.evaluation.metrics.ngrams import (
    MAX_ORDER,
    DocumentFrequencies,
    FloatArray,
    KeyArray,
    NGrams,
    Overlap,
    count_ngrams,
    count_repeated,
    find_overlap,
    ngram_keys,
)
from captioner.evaluation.metrics.words import EncodedCaptions, IntArray

__all__ = ["Corpus", "FloatArray", "ImageChunk"]

_MAX_PASSES = 16


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """One caption an image and its references. Iterating gives them in chunks."""

    captions: EncodedCaptions
    references: EncodedCaptions
    used: IntArray
    """References that count, sorted by `owner`."""

    owner: IntArray
    """The caption that each of these is for."""

    known: Mapping[str, FloatArray] = field(default_factory=dict)
    """float64[N] of each score that was computed elsewhere, NaN for an image without one."""

    images_per_chunk: int
    ngrams_per_pass: int

    def __len__(self) -> int:
        return len(self.captions)

    def __iter__(self) -> Iterator["ImageChunk"]:
        for first in range(0, len(self), self.images_per_chunk):
            last = min(first + self.images_per_chunk, len(self))
            span = slice(*np.searchsorted(self.owner, [first, last]))
            yield ImageChunk(
                corpus=self,
                first=first,
                captions=self.captions.take(np.arange(first, last)),
                references=self.references.take(self.used[span]),
                owner=self.owner[span] - first,
            )

    @cached_property
    def document_frequencies(self) -> DocumentFrequencies:
        """Counted in passes, each over its share of all n-grams: those that one image alone has are held that long."""
        num_words = int((self.references.starts[self.used + 1] - self.references.starts[self.used]).sum())
        num_ngrams = MAX_ORDER * num_words
        bits = min(_MAX_PASSES, max(1, num_ngrams // self.ngrams_per_pass)).bit_length() - 1
        passes = [count_repeated([chunk.documents(part, bits) for chunk in self]) for part in range(1 << bits)]
        keys, counts = zip(*passes, strict=True)
        return DocumentFrequencies(np.concatenate(keys), np.concatenate(counts))


@dataclass(frozen=True, kw_only=True)
class ImageChunk:
    """B images of a corpus: a caption each, and their references, sorted by `owner`."""

    corpus: Corpus
    first: int
    """Where the chunk begins in the corpus."""

    captions: EncodedCaptions
    references: EncodedCaptions
    owner: IntArray
    """int64[R], the caption that each reference is for, 0 to B - 1."""

    def __len__(self) -> int:
        return len(self.captions)

    @property
    def first_references(self) -> IntArray:
        """int64[B], where the references of each image begin."""
        return np.searchsorted(self.owner, np.arange(len(self)))

    @cached_property
    def ngrams(self) -> NGrams:
        """n-grams of the captions, numbered 0 to B - 1, and of the references, from B on."""
        return count_ngrams(EncodedCaptions.concat([self.captions, self.references]))

    @cached_property
    def overlap(self) -> Overlap:
        """The n-grams that captions share with their references."""
        return find_overlap(self.ngrams, len(self), self.owner)

    @property
    def idf(self) -> FloatArray:
        """float64[G], the inverse document frequency of each n-gram; an image's references are a document."""
        idf: FloatArray = np.log(len(self.corpus)) - np.log(self.corpus.document_frequencies.of(self.ngrams.keys))
        return idf

    def known(self, name: str) -> FloatArray:
        """Return float64[B] of a score that was computed elsewhere, NaN for an image without one."""
        if name not in self.corpus.known:
            return np.full(len(self), np.nan)
        return self.corpus.known[name][self.first : self.first + len(self)]

    def documents(self, part: int, bits: int) -> KeyArray:
        """Return the n-grams of the references whose key begins with the `bits` of `part`, each once an image."""
        ngrams = [(keys, self.owner[caption]) for keys, caption in ngram_keys(self.references)]
        keys, owner = (np.concatenate(column) for column in zip(*ngrams, strict=True))
        wanted = np.flatnonzero(keys >> np.uint64(64 - bits) == part) if bits else np.arange(len(keys))
        wanted = wanted[np.lexsort((owner[wanted], keys[wanted]))]
        keys, owner = keys[wanted], owner[wanted]
        is_first = np.ones(len(keys), bool)
        is_first[1:] = (keys[1:] != keys[:-1]) | (owner[1:] != owner[:-1])
        return keys[is_first]
