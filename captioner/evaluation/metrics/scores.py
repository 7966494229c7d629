"""Scores of captions against references: every entry of METRICS, with bootstrap intervals."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain

import numpy as np

from captioner.errors import InputError
from captioner.evaluation.metrics.corpus import Corpus, FloatArray, ImageChunk
from captioner.evaluation.metrics.table import METRICS, Metric, mean_of_known
from captioner.evaluation.metrics.words import CaptionEncoder, EncodedCaptions, IntArray

__all__ = ["ImageScores", "score_captions", "score_encoded"]


@dataclass(frozen=True)
class ImageScores:
    """What each image adds to the corpus' figures: sums that may be added over any set of images.

    statistics: float64[N, S], the columns of all metrics side by side. Metrics that no image has are left out."""

    statistics: FloatArray
    metrics: tuple[Metric, ...]
    columns: Mapping[str, slice]
    """The columns of each metric, by name."""

    def __len__(self) -> int:
        return len(self.statistics)

    def figures(self) -> dict[str, float]:
        """Return the figure of each metric for the whole corpus."""
        return dict(zip(self._names, self._figures(self.statistics.sum(0)).tolist(), strict=True))

    def intervals(
        self, *, num_resamples: int = 1000, confidence: float = 0.95, seed: int = 0, max_groups: int = 10_000
    ) -> dict[str, tuple[float, float]]:
        """Return the bootstrap interval of each figure: percentiles over images sampled with replacement.

        The n-gram weights of CIDEr-D stay those of the whole corpus. More than `max_groups` images are first summed in
        as many random groups, which are sampled instead: the same spread, at a cost that does not grow."""
        rng = np.random.default_rng(seed)
        groups = self._random_groups(rng, max_groups)
        num = len(groups)
        samples = (np.bincount(rng.integers(num, size=num), minlength=num) for _ in range(num_resamples))
        resampled = self._figures(np.stack([sample @ groups for sample in samples]))
        without = np.isnan(resampled)  # no sampled image has such a score
        resampled = np.where(without, self._figures(groups.sum(0)), resampled)
        low, high = np.quantile(resampled, [(1 - confidence) / 2, (1 + confidence) / 2], axis=0)
        return dict(zip(self._names, zip(low.tolist(), high.tolist(), strict=True), strict=True))

    def _random_groups(self, rng: np.random.Generator, max_groups: int) -> FloatArray:
        num_groups = min(len(self), max_groups)
        group = rng.permutation(len(self)) * num_groups // len(self)
        return np.stack([np.bincount(group, column, num_groups) for column in self.statistics.T], axis=1)

    def _figures(self, sums: FloatArray) -> FloatArray:
        """Return float64[..., M], a figure of each metric, from sums of statistics, float64[..., S]."""
        figures = [(metric.figure or mean_of_known)(sums[..., self.columns[metric.name]]) for metric in self.metrics]
        return np.stack(figures, axis=-1)

    @property
    def _names(self) -> tuple[str, ...]:
        return tuple(metric.name for metric in self.metrics)


def score_captions(
    captions: Sequence[str],
    references: Sequence[Sequence[str]],
    *,
    encoder: CaptionEncoder | None = None,
    images_per_chunk: int = 2048,
    ngrams_per_pass: int = 1 << 20,
) -> ImageScores:
    """Return the scores of one caption an image against its references.

    Raises InputError where an image has no reference with a word in it."""
    encoder = encoder or CaptionEncoder()
    owner = np.repeat(np.arange(len(references)), [len(own) for own in references])
    return score_encoded(
        encoder.encode(captions),
        encoder.encode(chain.from_iterable(references)),
        owner,
        images_per_chunk=images_per_chunk,
        ngrams_per_pass=ngrams_per_pass,
    )


def score_encoded(
    captions: EncodedCaptions,
    references: EncodedCaptions,
    owner: IntArray,
    *,
    known: Mapping[str, FloatArray] | None = None,
    images_per_chunk: int = 2048,
    ngrams_per_pass: int = 1 << 20,
) -> ImageScores:
    """Return the scores of captions against references.

    owner: int64[R], the number of the caption that each reference is for; negative for none. A reference without a word
    counts as none. known: float64[N] of each score that was computed elsewhere, NaN for an image without one. The last
    two bound what is held at once. Raises InputError where a caption is left without a reference."""
    used = np.flatnonzero((owner >= 0) & (references.lengths > 0))
    used = used[np.argsort(owner[used], kind="stable")]
    _check_references(len(captions), owner[used])
    corpus = Corpus(
        captions=captions,
        references=references,
        used=used,
        owner=owner[used],
        known=known or {},
        images_per_chunk=images_per_chunk,
        ngrams_per_pass=ngrams_per_pass,
    )
    return _score_corpus(corpus, tuple(METRICS.values()))


def _score_corpus(corpus: Corpus, metrics: tuple[Metric, ...]) -> ImageScores:
    distinct = dict.fromkeys(metric.score for metric in metrics)
    statistics = np.empty((len(corpus), 0))
    spans: dict[Callable[[ImageChunk], FloatArray], slice] = {}
    for chunk in corpus:
        blocks = {score: _statistics(score(chunk)) for score in distinct}
        if not spans:
            ends = np.cumsum([block.shape[1] for block in blocks.values()]).tolist()
            spans = dict(zip(distinct, map(slice, [0, *ends], ends), strict=False))
            statistics = np.empty((len(corpus), ends[-1]))
        statistics[chunk.first : chunk.first + len(chunk)] = np.concatenate(list(blocks.values()), axis=1)
    scores = ImageScores(statistics, metrics, {metric.name: spans[metric.score] for metric in metrics})
    figures = scores.figures()
    return replace(scores, metrics=tuple(metric for metric in metrics if not np.isnan(figures[metric.name])))


def _statistics(scores: FloatArray) -> FloatArray:
    """Return counts as they are, float64[B, K]; of scores float64[B] the score and 1, or 0 twice for a NaN."""
    if scores.ndim == 2:
        return scores
    is_known = ~np.isnan(scores)
    return np.stack([np.where(is_known, scores, 0), is_known], axis=1)


def _check_references(num_captions: int, owner: IntArray) -> None:
    if not num_captions:
        raise InputError("there is no caption to score; expected at least one")
    bare = np.flatnonzero(np.bincount(owner, minlength=num_captions) == 0)
    if len(bare):
        raise InputError(
            f"{len(bare)} of {num_captions} captions, from number {bare[0]} on, have no reference with a word in it;"
            " expected at least one an image: leave the others out"
        )
