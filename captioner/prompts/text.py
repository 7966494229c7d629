"""The text of a prompt: plain text with the values of an image's columns in it.

    {column}                            the value of that column, of a list all; empty where the image has none
    {?column: The page says: {column}.} the text in it, where the column has a value; else nothing
    {{  }}                              a brace

A value is data, whatever it says: it comes out as a segment of its own, so that who makes tokens of it can keep special
tokens out. Does not know which columns there are.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from captioner.errors import ConfigError

__all__ = ["IMAGE", "PromptText", "Segment"]

IMAGE = "image"
"""The one name in braces that is no column: where the image stands."""

_TOKEN = re.compile(r"\{\{|\}\}|\{\?\s*(?P<condition>[^{}:\s]+)\s*:|\{(?P<column>[^{}?:]*)\}|\{|\}")


class Segment(NamedTuple):
    """A piece of a prompt for one image."""

    text: str
    is_data: bool = False
    """Whether it is the value of a column rather than words of the prompt."""

    is_image: bool = False
    """Whether it is the place of the image; its text is empty then."""


@dataclass(frozen=True)
class _Piece:
    """Words, or the name of a column; both under a condition, the name of another or the same column, or none."""

    text: str
    is_column: bool
    condition: str | None


@dataclass(frozen=True)
class PromptText:
    """The text of a prompt, parsed."""

    text: str
    pieces: tuple[_Piece, ...]

    @classmethod
    def parse(cls, text: str, where: str) -> "PromptText":
        """Return the text, parsed. Raises ConfigError, naming `where`, for a brace that is not closed or opened."""
        return cls(text, tuple(_pieces(text, where)))

    @property
    def columns(self) -> frozenset[str]:
        """Names of the columns whose values it holds or asks for."""
        named = {piece.text for piece in self.pieces if piece.is_column}
        asked = {piece.condition for piece in self.pieces if piece.condition is not None}
        return frozenset(named | asked) - {IMAGE}

    @property
    def num_images(self) -> int:
        """How often the image stands in it."""
        return sum(piece.is_column and piece.text == IMAGE for piece in self.pieces)

    @property
    def largest(self) -> list[Segment]:
        """What it would be with every value and every conditional text, piece by piece; values are empty."""
        return [_segment(piece, dict.fromkeys(self.columns, "")) for piece in self.pieces]

    def fill(self, values: Mapping[str, object]) -> list[Segment]:
        """Return the prompt for an image with these values of its columns, piece by piece.

        None, NaN and blank texts are no values; spaces around a value are left out; a list is its values with commas
        between. No segment but that of the image is empty."""
        texts = {name: _as_text(values.get(name)) for name in self.columns}
        wanted = [piece for piece in self.pieces if piece.condition is None or texts[piece.condition]]
        segments = [_segment(piece, texts) for piece in wanted]
        return [segment for segment in segments if segment.text or segment.is_image]


def _segment(piece: _Piece, values: Mapping[str, str]) -> Segment:
    if piece.is_column and piece.text == IMAGE:
        return Segment("", is_image=True)
    return Segment(values[piece.text], is_data=True) if piece.is_column else Segment(piece.text)


def _pieces(text: str, where: str) -> Iterator[_Piece]:
    condition: str | None = None
    words, place = "", 0
    while match := _TOKEN.search(text, place):
        words += text[place : match.start()]
        place = match.end()
        if match[0] in ("{{", "}}") and not (match[0] == "}}" and condition is not None):
            words += match[0][0]
            continue
        if words:
            yield _Piece(words, is_column=False, condition=condition)
            words = ""
        if match["condition"] is not None:
            _require(condition is None, where, f"{match[0]} stands in another condition", "one after the other")
            condition = match["condition"]
        elif match["column"] is not None:
            name = match["column"].strip()
            _require(bool(name), where, "{} names no column", "a name in it, or {{}} for braces")
            yield _Piece(name, is_column=True, condition=condition)
        else:
            is_end = match[0].startswith("}") and condition is not None
            _require(is_end, where, f"a {match[0]} without its pair", "{column}, or {{ and }} for braces")
            condition, place = None, match.start() + 1
    _require(condition is None, where, f"{{?{condition}: has no end", "a } behind its text")
    if words + text[place:]:
        yield _Piece(words + text[place:], is_column=False, condition=None)


def _as_text(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(filter(None, map(_as_text, value)))
    if value is None or value != value:  # NaN is no value
        return ""
    return str(value).strip()  # the file beside an image ends in a line break


def _require(holds: bool, where: str, problem: str, expected: str) -> None:
    if not holds:
        raise ConfigError(f"{where}: {problem}; expected {expected}")
