"""Caption metrics as coco-caption computes them, without Java: BLEU-1..4, ROUGE-L, CIDEr-D; CLIPScore from features.

    scores = score_captions(["a dog on a wall"], [["a dog sits on a wall", "the dog is outside"]])
    scores.figures()["cider_d"], scores.intervals()["cider_d"]

Captions are held as word numbers laid end to end, four bytes a word, and n-grams are counted by numpy: 100,000 images
with five references each took 51 s of one core and some 400 MiB in all; a test holds the bytes an image. Knows
captions and arrays; no file, no image id, no model.
"""

import re
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from captioner.errors import InputError

if TYPE_CHECKING:  # torch takes seconds to import, and a table of captions needs none of it
    from torch import Tensor

__all__ = [
    "METRICS",
    "CaptionEncoder",
    "EncodedCaptions",
    "ImageScores",
    "clip_scores",
    "ref_clip_scores",
    "score_captions",
    "score_encoded",
    "tokenize",
]

METRICS = ("bleu_1", "bleu_2", "bleu_3", "bleu_4", "rouge_l", "cider_d")

IntArray = npt.NDArray[np.int64]
KeyArray = npt.NDArray[np.uint64]
FloatArray = npt.NDArray[np.float64]

_MAX_ORDER = 4  # words of the longest n-gram
_ROUGE_BETA = 1.2
_CIDER_SIGMA = 6.0
_BLEU_TINY, _BLEU_SMALL = 1e-15, 1e-9  # coco-caption's guards against 0 / 0
_CLIP_WEIGHT = 2.5
_IMAGES_A_CHUNK = 2048
_BOOTSTRAP_GROUPS = 10_000
_CAPTIONS_A_COPY = 1 << 16
_GRAMS_A_PASS = 1 << 20
_MOST_PASSES = 16

# Columns of ImageScores.statistics
_MATCHES, _TOTALS = slice(0, _MAX_ORDER), slice(_MAX_ORDER, 2 * _MAX_ORDER)
_REFERENCE_LENGTH, _ROUGE_L, _CIDER_D, _IMAGES = range(2 * _MAX_ORDER, 2 * _MAX_ORDER + 4)


# Tokens

_TYPOGRAPHY = str.maketrans("\u2018\u2019\u2010\u2011_", "''-- ")  # curly apostrophes, two hyphens
_CONTRACTION = re.compile(
    r"(?<=\w)(?:n't|'(?:s|m|d|ll|re|ve))\b|(?<=\bcan)not\b|(?<=\bgon)na\b|(?<=\bwan)na\b|(?<=\bgot)ta\b"
)
_TOKEN = re.compile(
    r"\b(?:st|rd|ave|blvd|dr|mr|mrs|ms|jr|sr|etc|vs|inc|co|corp|ft|mt)\.(?!\w)"  # abbreviations keep their period
    r"|\b(?:[a-z]\.){2,}(?!\w)"  # u.s., p.m.
    r"|(?<!\w)'(?:s|m|d|ll|re|ve)\b"
    r"|\w+(?:[-/&']\w+|(?<=\d)[.,:]\d+)*"  # twin-hulled, o'clock, 5:55, 1,000
    r"""|[^\w\s.,:;?!'"`()\[\]{}\u00ab\u00bb\u2013-\u2026-]"""  # signs that are no punctuation: #, $, %
)


def tokenize(caption: str) -> list[str]:
    """Return the words of an English caption: lower case, contractions split, without punctuation.

    The rules of the Penn Treebank that captions meet; text that is tokenised already stays as it is. Brackets count as
    punctuation, where coco-caption by an oversight keeps `-lrb-` as a word."""
    return _TOKEN.findall(_CONTRACTION.sub(r" \g<0>", caption.lower().translate(_TYPOGRAPHY)))


@dataclass(frozen=True)
class EncodedCaptions:
    """Captions as word numbers, laid end to end. words: int32[T]; starts: int64[C + 1], the last one is T."""

    words: npt.NDArray[np.int32]
    starts: IntArray

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def lengths(self) -> IntArray:
        """Words of each caption, int64[C]."""
        return np.diff(self.starts)

    def take(self, chosen: IntArray) -> "EncodedCaptions":
        """Return some of the captions, in the order of `chosen`."""
        starts = _starts(self.starts[chosen + 1] - self.starts[chosen])  # not of all captions: there may be millions
        words = np.empty(starts[-1], np.int32)
        for first in range(0, len(chosen), _CAPTIONS_A_COPY):
            own = starts[first : first + _CAPTIONS_A_COPY + 1]
            shift = self.starts[chosen[first : first + _CAPTIONS_A_COPY]] - own[:-1]
            words[own[0] : own[-1]] = self.words[np.arange(own[0], own[-1]) + np.repeat(shift, np.diff(own))]
        return EncodedCaptions(words, starts)

    def to_lists(self) -> list[list[int]]:
        """Return each caption as a list."""
        words, starts = self.words.tolist(), self.starts.tolist()
        return [words[start:stop] for start, stop in pairwise(starts)]

    @staticmethod
    def concat(parts: Sequence["EncodedCaptions"]) -> "EncodedCaptions":
        """Return the captions of all parts, which must come from one encoder."""
        lengths = np.concatenate([np.zeros(0, np.int64), *(part.lengths for part in parts)])
        return EncodedCaptions(np.concatenate([np.zeros(0, np.int32), *(p.words for p in parts)]), _starts(lengths))


class CaptionEncoder:
    """Numbers words in the order in which they come; what is compared must come from the same encoder."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}

    def encode(self, captions: Iterable[str]) -> EncodedCaptions:
        """Return the captions' words as numbers."""
        words, starts = array("i"), array("q", [0])
        number = self._numbers.setdefault
        for caption in captions:
            words.extend([number(word, len(self._numbers)) for word in tokenize(caption)])
            starts.append(len(words))
        return EncodedCaptions(np.frombuffer(words, np.int32), np.frombuffer(starts, np.int64))


def _starts(lengths: IntArray) -> IntArray:
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])


# Scores


@dataclass(frozen=True)
class ImageScores:
    """What each image adds to the corpus' figures: sums that may be added over any set of images.

    statistics: float64[N, 12 + 2K]: matched and all n-grams of 1..4 words, words of the reference nearest in length,
    ROUGE-L, CIDEr-D, and 1; then, of each of K further scores, its value and 1, or 0 twice where it is not known.
    """

    statistics: FloatArray
    further: tuple[str, ...] = ()
    """Names of the K further scores."""

    def __len__(self) -> int:
        return len(self.statistics)

    @property
    def names(self) -> tuple[str, ...]:
        """Every figure: METRICS, and the means of the further scores."""
        return METRICS + self.further

    def with_mean(self, name: str, values: FloatArray) -> "ImageScores":
        """Return the same with the mean of one more score. values: float64[N], NaN for an image that has none."""
        known = ~np.isnan(values)
        columns = np.stack([np.where(known, values, 0), known], axis=1)
        return ImageScores(np.concatenate([self.statistics, columns], axis=1), (*self.further, name))

    def figures(self) -> dict[str, float]:
        """Return each of `names` for the whole corpus; 1 is the best BLEU and ROUGE-L, 10 the best CIDEr-D.

        The mean of a score that no image has is NaN."""
        return dict(zip(self.names, _figures(self.statistics.sum(0)).tolist(), strict=True))

    def intervals(
        self, *, num_resamples: int = 1000, confidence: float = 0.95, seed: int = 0
    ) -> dict[str, tuple[float, float]]:
        """Return the bootstrap interval of each figure: images are drawn with replacement, percentiles are read off.

        The n-gram weights of CIDEr-D stay those of the whole corpus. More than 10,000 images are first summed in as
        many random groups, which are then what is drawn: the same spread, at a cost that does not grow."""
        rng = np.random.default_rng(seed)
        groups = self._random_groups(rng)
        num = len(groups)
        draws = (np.bincount(rng.integers(num, size=num), minlength=num) for _ in range(num_resamples))
        resampled = _figures(np.stack([draw @ groups for draw in draws]))
        resampled = np.where(np.isnan(resampled), _figures(groups.sum(0)), resampled)  # drawn without such a score
        low, high = np.quantile(resampled, [(1 - confidence) / 2, (1 + confidence) / 2], axis=0)
        return dict(zip(self.names, zip(low.tolist(), high.tolist(), strict=True), strict=True))

    def _random_groups(self, rng: np.random.Generator) -> FloatArray:
        num_groups = min(len(self), _BOOTSTRAP_GROUPS)
        group = rng.permutation(len(self)) * num_groups // len(self)
        return np.stack([np.bincount(group, column, num_groups) for column in self.statistics.T], axis=1)


def _figures(sums: FloatArray) -> FloatArray:
    """Return METRICS and the further means, float64[..., 6 + K], from sums of statistics, float64[..., 12 + 2K]."""
    precisions = (sums[..., _MATCHES] + _BLEU_TINY) / (sums[..., _TOTALS] + _BLEU_SMALL)
    means = np.exp(np.cumsum(np.log(precisions), axis=-1) / np.arange(1, _MAX_ORDER + 1))
    num_words = sums[..., _TOTALS][..., :1]
    ratio = (num_words + _BLEU_TINY) / (sums[..., _REFERENCE_LENGTH, None] + _BLEU_SMALL)
    bleu = means * np.exp(np.minimum(0, 1 - 1 / ratio))
    totals, counts = sums[..., _IMAGES + 1 :: 2], sums[..., _IMAGES + 2 :: 2]
    further = np.divide(totals, counts, out=np.full_like(totals, np.nan), where=counts > 0)
    return np.concatenate([bleu, sums[..., [_ROUGE_L, _CIDER_D]] / sums[..., [_IMAGES]], further], axis=-1)


def score_captions(captions: Sequence[str], references: Sequence[Sequence[str]]) -> ImageScores:
    """Return the scores of one caption an image against its references.

    Raises InputError where an image has no reference with a word in it."""
    encoder = CaptionEncoder()
    owner = np.repeat(np.arange(len(references)), [len(own) for own in references])
    return score_encoded(encoder.encode(captions), encoder.encode(chain.from_iterable(references)), owner)


def score_encoded(captions: EncodedCaptions, references: EncodedCaptions, owner: IntArray) -> ImageScores:
    """Return the scores of captions against references.

    owner: int64[R], the number of the caption that each reference is for; negative for none. A reference without a word
    counts as none. Document frequencies are those of the references used, an image being a document. Raises InputError
    where a caption is left without a reference."""
    used = np.flatnonzero((owner >= 0) & (references.lengths > 0))
    used = used[np.argsort(owner[used], kind="stable")]
    _check_references(len(captions), owner[used])
    chunks = _Chunks(captions, references, used, owner[used])
    frequencies = _DocumentFrequencies.of_references(chunks)
    statistics = np.empty((len(captions), _IMAGES + 1))
    for number, chunk in enumerate(chunks):
        first = number * _IMAGES_A_CHUNK
        statistics[first : first + len(chunk.captions)] = chunk.statistics(frequencies, len(captions))
    return ImageScores(statistics)


def _check_references(num_captions: int, owner: IntArray) -> None:
    if not num_captions:
        raise InputError("there is no caption to score; expected at least one")
    bare = np.flatnonzero(np.bincount(owner, minlength=num_captions) == 0)
    if len(bare):
        raise InputError(
            f"{len(bare)} of {num_captions} captions, from number {bare[0]} on, have no reference with a word in it;"
            " expected at least one an image: leave the others out"
        )


@dataclass(frozen=True)
class _Chunk:
    """Some images: a caption each, and their references, sorted by `owner`."""

    captions: EncodedCaptions
    references: EncodedCaptions
    owner: IntArray

    def statistics(self, frequencies: "_DocumentFrequencies", num_images: int) -> FloatArray:
        """Return float64[B, 12] as ImageScores has it."""
        num = len(self.captions)
        both = EncodedCaptions.concat([self.captions, self.references])
        grams = _count_grams(both, np.arange(len(both)))
        overlap = _overlap(grams, num, self.owner)
        idf = np.log(num_images) - np.log(frequencies.of(grams.keys))
        statistics = np.ones((num, _IMAGES + 1))
        statistics[:, _MATCHES] = _clipped_matches(grams, overlap, num)
        statistics[:, _TOTALS] = np.maximum(0, self.captions.lengths[:, None] - np.arange(_MAX_ORDER))
        statistics[:, _REFERENCE_LENGTH] = self._closest_lengths()
        statistics[:, _ROUGE_L] = self._rouge_l()
        statistics[:, _CIDER_D] = self._cider_d(grams, overlap, idf)
        return statistics

    def documents(self, part: int, bits: int) -> KeyArray:
        """Return the n-grams of the references whose key begins with the `bits` of `part`, each once an image."""
        shift = np.uint64(64 - bits)
        grams = [(keys, self.owner[caption]) for keys, caption in _gram_keys(self.references)]
        keys, owner = (np.concatenate(column) for column in zip(*grams, strict=True))
        wanted = np.flatnonzero(keys >> shift == part) if bits else np.arange(len(keys))
        wanted = wanted[np.lexsort((owner[wanted], keys[wanted]))]
        keys, owner = keys[wanted], owner[wanted]
        is_first = np.ones(len(keys), bool)
        is_first[1:] = (keys[1:] != keys[:-1]) | (owner[1:] != owner[:-1])
        return keys[is_first]

    def _closest_lengths(self) -> IntArray:
        """Return the length of each image's reference that is nearest to the caption's, the shorter of two."""
        lengths = self.references.lengths
        ranked = np.abs(lengths - self.captions.lengths[self.owner]) << 32 | lengths
        nearest: IntArray = np.minimum.reduceat(ranked, self._first_references()) & (1 << 32) - 1
        return nearest

    def _first_references(self) -> IntArray:
        return np.searchsorted(self.owner, np.arange(len(self.captions)))

    def _rouge_l(self) -> list[float]:
        references = self.references.to_lists()
        bounds = [*self._first_references().tolist(), len(references)]
        own = (references[first:stop] for first, stop in pairwise(bounds))
        return [_rouge_l(caption, refs) for caption, refs in zip(self.captions.to_lists(), own, strict=True)]

    def _cider_d(self, grams: "_Grams", overlap: "_Overlap", idf: FloatArray) -> FloatArray:
        """Return CIDEr-D of each image (arXiv:1411.5726): clipped tf-idf cosines, less for another length, times 10."""
        num, num_refs = len(self.captions), len(self.references)
        weights = grams.count * idf[grams.gram]
        cells = grams.owner * _MAX_ORDER + grams.order
        norms = np.sqrt(_summed(cells, weights**2, (num + num_refs, _MAX_ORDER)))
        shared = np.minimum(weights[overlap.in_caption], weights[overlap.in_reference]) * weights[overlap.in_reference]
        dots = _summed(cells[overlap.in_reference] - num * _MAX_ORDER, shared, (num_refs, _MAX_ORDER))
        scale = norms[:num][self.owner] * norms[num:]
        cosines = np.divide(dots, scale, out=np.zeros_like(dots), where=scale > 0)
        difference = self.captions.lengths[self.owner] - self.references.lengths
        similar = cosines.mean(1) * np.exp(-(difference**2) / (2 * _CIDER_SIGMA**2))
        return 10 * np.bincount(self.owner, similar, num) / np.bincount(self.owner, minlength=num)


@dataclass(frozen=True)
class _Chunks:
    captions: EncodedCaptions
    references: EncodedCaptions
    used: IntArray
    owner: IntArray

    @property
    def num_reference_words(self) -> int:
        """Words of all references that are used."""
        return int((self.references.starts[self.used + 1] - self.references.starts[self.used]).sum())

    def __iter__(self) -> Iterator[_Chunk]:
        for first in range(0, len(self.captions), _IMAGES_A_CHUNK):
            last = min(first + _IMAGES_A_CHUNK, len(self.captions))
            span = slice(*np.searchsorted(self.owner, [first, last]))
            references = self.references.take(self.used[span])
            yield _Chunk(self.captions.take(np.arange(first, last)), references, self.owner[span] - first)


def _summed(cells: IntArray, values: FloatArray, shape: tuple[int, int]) -> FloatArray:
    return np.bincount(cells, values, shape[0] * shape[1]).astype(np.float64).reshape(shape)  # int64 where all is empty


def _rouge_l(caption: list[int], references: list[list[int]]) -> float:
    """Return the F-measure of the best precision and the best recall, which may be of two references (as COCO does)."""
    common = [_longest_common(caption, reference) for reference in references]
    if not any(common):
        return 0.0
    precision = max(common) / len(caption)
    recall = max(shared / len(reference) for shared, reference in zip(common, references, strict=True))
    return (1 + _ROUGE_BETA**2) * precision * recall / (recall + _ROUGE_BETA**2 * precision)


def _longest_common(first: list[int], second: list[int]) -> int:
    """Return the length of the longest common subsequence, a row of its table being the bits of one integer.

    After Hyyrö (2004), "Bit-parallel LCS-length computation revisited"."""
    places: dict[int, int] = {}
    for place, word in enumerate(first):
        places[word] = places.get(word, 0) | 1 << place
    all_ones = row = (1 << len(first)) - 1
    for word in second:
        met = row & places.get(word, 0)
        row = (row + met | row - met) & all_ones
    return len(first) - row.bit_count()


# n-grams


@dataclass(frozen=True)
class _Grams:
    """Distinct n-grams, and how often each stands in each owner, sorted by owner.

    keys: uint64[G], sorted; owner, gram (an index of keys), order (words less one), count: int64[K]."""

    keys: KeyArray
    owner: IntArray
    gram: IntArray
    order: IntArray
    count: IntArray


class _Overlap(NamedTuple):
    """Pairs of rows of one _Grams: an n-gram of a caption, and the same in a reference of that caption."""

    in_caption: IntArray
    in_reference: IntArray


def _count_grams(captions: EncodedCaptions, owner: IntArray) -> _Grams:
    """Return the n-grams of 1 to 4 words. owner: int64[C], to which each caption's count."""
    by_order = [
        (keys, caption, np.full(len(keys), order)) for order, (keys, caption) in enumerate(_gram_keys(captions))
    ]
    keys, caption, order_of = (np.concatenate(column) for column in zip(*by_order, strict=True))
    distinct, first, gram = np.unique(keys, return_index=True, return_inverse=True)
    cell, count = np.unique(owner[caption] * len(distinct) + gram, return_counts=True)
    owners, grams = np.divmod(cell, max(1, len(distinct)))
    return _Grams(distinct, owners, grams, order_of[first][grams], count)


def _gram_keys(captions: EncodedCaptions) -> Iterator[tuple[KeyArray, IntArray]]:
    """Yield the keys of all n-grams of 1, 2, 3 and 4 words, and the caption of each."""
    caption = np.repeat(np.arange(len(captions)), captions.lengths)
    num_left = captions.starts[1:][caption] - np.arange(len(caption))  # words from here to the caption's end
    key = np.zeros(len(caption), np.uint64)
    for order in range(_MAX_ORDER):
        place = np.flatnonzero(num_left > order)
        key[place] = _mix(key[place], captions.words[place + order])
        yield key[place], caption[place]


def _mix(keys: KeyArray, words: npt.NDArray[np.int32]) -> KeyArray:
    """Return the key of each n-gram with one more word: 64 well-mixed bits (the finaliser of SplitMix64).

    That any two of ten million n-grams share a key has a chance below one in 100,000."""
    mixed = keys + words.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ mixed >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ mixed >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return mixed ^ mixed >> np.uint64(31)


def _overlap(grams: _Grams, num_captions: int, owner: IntArray) -> _Overlap:
    """Return where captions and their references meet; captions own the first rows, references the others."""
    boundary = int(np.searchsorted(grams.owner, num_captions))
    in_caption = grams.owner[:boundary] * len(grams.keys) + grams.gram[:boundary]
    wanted = owner[grams.owner[boundary:] - num_captions] * len(grams.keys) + grams.gram[boundary:]
    place = np.searchsorted(in_caption, wanted)
    is_met = np.concatenate([in_caption, [-1]])[place] == wanted
    return _Overlap(place[is_met], boundary + np.flatnonzero(is_met))


def _clipped_matches(grams: _Grams, overlap: _Overlap, num_captions: int) -> FloatArray:
    """Return float64[B, 4]: n-grams of each caption that stand in a reference, each as often as there at most."""
    most = np.zeros(len(grams.count), np.int64)
    np.maximum.at(most, overlap.in_caption, grams.count[overlap.in_reference])
    met = np.flatnonzero(most)
    cells = grams.owner[met] * _MAX_ORDER + grams.order[met]
    return _summed(cells, np.minimum(most, grams.count)[met].astype(np.float64), (num_captions, _MAX_ORDER))


@dataclass(frozen=True)
class _DocumentFrequencies:
    """In the references of how many images an n-gram stands, of those that stand in several.

    Most stand in one alone, which weighs as in none. keys: uint64[K], sorted; counts: int32[K]."""

    keys: KeyArray
    counts: npt.NDArray[np.int32]

    @classmethod
    def of_references(cls, chunks: _Chunks) -> "_DocumentFrequencies":
        """Count in passes, each over its share of all n-grams: those that stand in one image are held that long."""
        num_grams = _MAX_ORDER * chunks.num_reference_words
        bits = min(_MOST_PASSES, max(1, num_grams // _GRAMS_A_PASS)).bit_length() - 1
        passes = [_several([chunk.documents(part, bits) for chunk in chunks]) for part in range(1 << bits)]
        keys, counts = zip(*passes, strict=True)
        return cls(np.concatenate(keys), np.concatenate(counts))

    def of(self, keys: KeyArray) -> IntArray:
        """Return the number of images of each key, 1 for one that no two have."""
        place = np.searchsorted(self.keys, keys)
        is_known = np.append(self.keys, np.uint64(0))[place] == keys
        return np.where(is_known, np.append(self.counts, 1)[place], 1)


def _several(documents: list[KeyArray]) -> tuple[KeyArray, npt.NDArray[np.int32]]:
    """Return what comes more than once, sorted, and how often."""
    met = np.concatenate(documents)
    documents.clear()
    met.sort()
    firsts = np.flatnonzero(np.append(True, met[1:] != met[:-1])[: len(met)])
    counts = np.diff(np.append(firsts, len(met)))
    several = np.flatnonzero(counts > 1)
    return met[firsts[several]], counts[several].astype(np.int32)


# CLIPScore


def clip_scores(image_features: "Tensor", caption_features: "Tensor") -> FloatArray:
    """Return CLIPScore of each image and its caption: 2.5 times their cosine, at least 0 (arXiv:2104.08718).

    image_features, caption_features: float[B, D] of CLIP's two projections, normalised or not. The paper's captions
    begin with "A photo depicts ". Returns float64[B]."""
    return _CLIP_WEIGHT * np.maximum(0, _cosines(image_features, caption_features))


def ref_clip_scores(
    scores: FloatArray, caption_features: "Tensor", reference_features: Sequence["Tensor"]
) -> FloatArray:
    """Return RefCLIPScore: the harmonic mean of CLIPScore and the caption's cosine with its nearest reference.

    scores: float64[B], CLIPScore of each caption. reference_features: for each image float[R, D] of its references.
    Returns float64[B]."""
    pairs = zip(caption_features, reference_features, strict=True)
    nearest = np.array([max(0.0, _cosines(caption[None], own).max()) for caption, own in pairs])
    total = scores + nearest
    means: FloatArray = np.divide(2 * scores * nearest, total, out=np.zeros_like(total), where=total > 0)
    return means


def _cosines(first: "Tensor", second: "Tensor") -> FloatArray:
    first, second = first.detach().double(), second.detach().double()
    lengths = first.norm(dim=-1) * second.norm(dim=-1)
    cosines = (first * second).sum(-1) / lengths.clamp(min=1e-12)
    return np.asarray(cosines.cpu(), np.float64)
