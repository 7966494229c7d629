"""The words of captions as numbers: a tokenizer, and arrays of four bytes a word that hold millions of captions."""

import re
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

__all__ = ["CaptionEncoder", "EncodedCaptions", "IntArray", "tokenize"]

IntArray = npt.NDArray[np.int64]

_CAPTIONS_PER_COPY = 1 << 16

_TYPOGRAPHY = str.maketrans("\u2018\u2019\u2010\u2011_", "''-- ")  # curly apostrophes, two hyphens
_CONTRACTION = re.compile(
    r"(?<=\w)(?:n't|'(?:s|m|d|ll|re|ve))\b|(?<=\bcan)not\b|(?<=\bgon)na\b|(?<=\bwan)na\b|(?<=\bgot)ta\b"
)
_TOKEN = re.compile(
    r"\b(?:st|rd|ave|blvd|dr|mr|mrs|ms|jr|sr|etc|vs|inc|co|corp|ft|mt)\.(?!\w)"  # abbreviations keep their period
    r"|\b(?:[a-z]\.){2,}(?!\w)"  # u.s., p.m.
    r"|(?<!\w)'(?:s|m|d|ll|re|ve)\b"
    r"|\w+(?:[-/&']\w+|(?<=\d)[.,:]\d+)*"  # twin-hulled, o'clock, 5:55, 1,000
    r"""|[^\w\s.,:;?!'"`()\[\]{}\u00ab\u00bb\u2013-\u2026-]"""  # symbols other than punctuation: #, $, %
)


def tokenize(caption: str) -> list[str]:
    """Return the words of an English caption: lower case, contractions split, without punctuation.

    Follows the rules of the Penn Treebank that occur in captions; tokenized text stays as it is. Brackets count as
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
        for first in range(0, len(chosen), _CAPTIONS_PER_COPY):
            own = starts[first : first + _CAPTIONS_PER_COPY + 1]
            shift = self.starts[chosen[first : first + _CAPTIONS_PER_COPY]] - own[:-1]
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
    """Numbers words in order of appearance. Captions can be compared only if one encoder encoded them."""

    def __init__(self, tokenize: Callable[[str], list[str]] = tokenize) -> None:
        self._numbers: dict[str, int] = {}
        self._tokenize = tokenize

    def encode(self, captions: Iterable[str]) -> EncodedCaptions:
        """Return the captions' words as numbers."""
        words, starts = array("i"), array("q", [0])
        number = self._numbers.setdefault
        for caption in captions:
            words.extend([number(word, len(self._numbers)) for word in self._tokenize(caption)])
            starts.append(len(words))
        return EncodedCaptions(np.frombuffer(words, np.int32), np.frombuffer(starts, np.int64))


def _starts(lengths: IntArray) -> IntArray:
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
