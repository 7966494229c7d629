"""The content of a page: one card an image, with its thumbnail, its texts and its facts.

Knows neither tables nor HTML.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from captioner.images.thumbnails import Thumbnail
from captioner.schema import Reject

__all__ = ["Card", "Fact", "Span", "Text"]

Fact = str | int | float | bool | None

Span = tuple[Literal["same", "removed", "added"], str]
"""Some words of a text, and whether the text beside it has them too."""


@dataclass(frozen=True)
class Text:
    """One text of an image: a caption, a reference, or the reason why there is none."""

    runs: Sequence[Span]

    label: str = ""
    """Whose text it is, where there are several."""

    is_missing: bool = False
    """True if this says why there is no text."""

    is_reference: bool = False
    """True if it is not the model's but written by people, to compare with."""

    @classmethod
    def of(cls, text: str, label: str = "", *, is_reference: bool = False) -> "Text":
        """Return a text without marks of what differs."""
        return cls([("same", text)] if text else [], label, is_reference=is_reference)


@dataclass(frozen=True, kw_only=True)
class Card:
    """One image on a page."""

    image_id: str

    image: Thumbnail | Reject
    """The image, or why there is none."""

    texts: Sequence[Text]
    """The texts below or beside it, the most important first."""

    facts: Mapping[str, Fact] = field(default_factory=dict)
    """Values by name. Numbers can be sorted by; the large view shows all."""

    tags: Sequence[str] = ()
    """What it can be filtered by: why it failed, whether it is cut off, what makes it doubtful."""

    path: str = ""
    """Where the image lies, to copy; empty where that is not known."""
