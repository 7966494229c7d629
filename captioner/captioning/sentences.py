"""The whole sentences of a text: what is left of one that was cut at its length.

    whole_sentences("A dog runs. It wears a red coll")     "A dog runs."
    whole_sentences("A dog on a be")                       "A dog on a be", as no sentence ends in it

A sentence ends with a full stop, question or exclamation mark of its script, and the quotes or brackets that close
behind it. Where a full stop may be that of an abbreviation, an initial or a number, none ends: the text then ends one
sentence sooner, never within one. Knows text alone.
"""

import re

__all__ = ["whole_sentences"]

_SPACED = ".!?\u061f\u06d4\u0589\u0964\u0965\u104b\u1362\u1367\u17d4\u203c\u2047\u2048\u2049"
"""Marks with a space behind them: Latin, Arabic, Urdu, Armenian, Devanagari, Burmese, Ethiopic, Khmer, and doubled."""

_UNSPACED = "\u3002\uff01\uff1f\uff0e\uff61"  # Chinese and Japanese, whose sentences stand without a space
_CLOSING = "\"')\\]}\u2019\u201d\u00bb\u203a\u300d\u300f\u3011\u300b\u3009\uff09"
_END = re.compile(rf"(?:[{_UNSPACED}]+[{_CLOSING}]*|[{_SPACED}]+[{_CLOSING}]*(?=\s|$))")
_OPENING = "\"'([{\u2018\u201c\u00ab\u00a1\u00bf"
_SHORT_WORDS = (
    "mr mrs ms dr prof st mt jr sr vs no nos fig figs vol pp ca cf al approx dept gen col sgt capt lt rev hon"
    " inc ltd co corp ave blvd rd ft sq bzw ca usw evtl bspw sra sres dra ud uds mme mlle"
)
_ABBREVIATIONS = frozenset(_SHORT_WORDS.split())
_INITIALS = re.compile(r"(?:[^\W\d_]\.)*[^\W\d_]")  # J, U.S, e.g
_SHORT_NUMBER = re.compile(r"\W*\d{1,2}")  # of a list, or a date; years end sentences


def whole_sentences(text: str) -> str:
    """Return the text up to the end of its last whole sentence, or all of it where no sentence ends."""
    ends = [found for found in _END.finditer(text) if _is_end(text, found)]
    return text[: ends[-1].end()] if ends else text


def _is_end(text: str, found: re.Match[str]) -> bool:
    marks = found[0].rstrip(_CLOSING.replace("\\", ""))
    behind = text[found.end() :].lstrip()
    if behind[:1].islower() and text.lstrip()[:1].isupper():
        return False  # it begins its sentences in upper case
    if marks != ".":
        return not marks.startswith("..")  # three dots are a pause
    if not behind and text[: found.start()][-1:].isdigit():
        return False  # it may have been cut in a number
    words = text[: found.start()].rsplit(maxsplit=1)
    return not words or not _may_be_short(words[-1].lstrip(_OPENING))


def _may_be_short(word: str) -> bool:
    """Return whether a word may have a full stop of its own."""
    return (
        word.lower() in _ABBREVIATIONS
        or _INITIALS.fullmatch(word) is not None
        or _SHORT_NUMBER.fullmatch(word) is not None
    )
