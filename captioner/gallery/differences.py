"""The difference between captions of one image, word by word.

Knows texts only. Words are separated by spaces; in scripts without spaces each character is one.
"""

import itertools
import re
from collections.abc import Sequence
from difflib import SequenceMatcher
from typing import NamedTuple

from captioner.gallery.cards import Span

__all__ = ["Difference", "change", "difference", "unmatched"]

_WORD = re.compile(
    r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff\u0e00-\u0eff]\s*"  # kana, Han, Thai
    r"|\w+(?:['\u2019-]\w+)*\s*|[^\w\s]\s*|\s+"
)


class Difference(NamedTuple):
    """Two texts as spans of words: those of the first alone `removed`, those of the second alone `added`."""

    first: list[Span]
    second: list[Span]


def difference(first: str, second: str) -> Difference:
    """Return what differs between two texts; spaces and their number do not count."""
    words, others = _WORD.findall(first.strip()), _WORD.findall(second.strip())
    matcher = _matcher(words, others)
    before: list[Span] = []
    after: list[Span] = []
    for kind, start, stop, other_start, other_stop in matcher.get_opcodes():
        if start < stop:
            before.append(("same" if kind == "equal" else "removed", "".join(words[start:stop])))
        if other_start < other_stop:
            after.append(("same" if kind == "equal" else "added", "".join(others[other_start:other_stop])))
    return Difference(before, after)


def change(first: str, second: str) -> float:
    """Return how much of two texts differs: 0 for equal words, 1 for none in common."""
    if first == second:
        return 0.0
    return 1 - _matcher(_WORD.findall(first.strip()), _WORD.findall(second.strip())).ratio()


def unmatched(text: str, others: Sequence[str]) -> list[Span]:
    """Return a text in spans: `same` where one of the others has the words in their order, upper case or lower, else
    `added`."""
    words = _WORD.findall(text.strip())
    folded = [word.casefold() for word in words]
    is_matched = [False] * len(words)
    for other in others:
        matcher = _matcher(folded, [word.casefold() for word in _WORD.findall(other)])
        for start, _, length in matcher.get_matching_blocks():
            is_matched[start : start + length] = [True] * length
    places = itertools.groupby(range(len(words)), is_matched.__getitem__)
    return [("same" if is_same else "added", "".join(words[place] for place in run)) for is_same, run in places]


def _matcher(words: list[str], others: list[str]) -> SequenceMatcher[str]:
    return SequenceMatcher(None, [word.strip() for word in words], [word.strip() for word in others], autojunk=False)
