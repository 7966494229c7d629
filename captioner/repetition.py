"""Whether a caption goes round in circles: the share of its 4-grams that it said before.

    repetition("a red bus on the street with a red bus on the street")      0.33
    is_repetitive("a dog dog dog")                                          True

The share is `rep-4` of arXiv:1908.04319, on words in lower case. Knows text alone: the flag can be had again from the
caption, whatever model wrote it.
"""

import re

__all__ = ["REPETITIVE_SHARE", "is_repetitive", "repetition", "words"]

REPETITIVE_SHARE = 0.2
"""Least share of repeated 4-grams that makes a caption repetitive. "a cat on the left and a cat on the right" has an
eighth, a caption that says half of itself twice about a third, one that loops more."""

_GRAM_WORDS = 4
_LOOP_WORDS = 3  # as often in a row a word is a loop: a caption may be too short to have repeated 4-grams
_UNSPACED = "\u0e00-\u0eff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"  # Thai, Lao, kana, Han: each character is a word
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+")


def words(caption: str) -> list[str]:
    """Return the words of a caption in lower case, in any script, without punctuation."""
    return _WORD.findall(caption.lower())


def repetition(caption: str) -> float:
    """Return the share of a caption's 4-grams that stand in it before, 0 to 1; 0 where it has none."""
    return _repetition(words(caption))


def is_repetitive(caption: str) -> bool:
    """Return whether a fifth of the caption's 4-grams or more are repeated, or one word stands three times in a row."""
    own = words(caption)
    return _repetition(own) >= REPETITIVE_SHARE or _loops(own)


def _repetition(own: list[str]) -> float:
    grams = list(zip(*(own[place:] for place in range(_GRAM_WORDS)), strict=False))
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def _loops(own: list[str]) -> bool:
    return any(len(set(run)) == 1 for run in zip(*(own[place:] for place in range(_LOOP_WORDS)), strict=False))
