"""What stands on a page: one card an image, with its picture, its texts and what is known of it.

Knows neither tables nor HTML; whoever has pictures and texts makes cards of them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from captioner.images.thumbnails import Thumbnail
from captioner.rows import Reject

__all__ = ["Card", "Fact", "Run", "Text"]

Fact = str | int | float | bool | None

Run = tuple[Literal["same", "removed", "added"], str]
"""Some words of a text, and whether the text beside it has them too."""


@dataclass(frozen=True)
class Text:
    """One text of an image: a caption, a reference, or why there is none."""

    runs: Sequence[Run]

    label: str = ""
    """Whose text it is, where there are several."""

    is_missing: bool = False
    """True if this says why there is no text."""

    is_reference: bool = False
    """True if a person wrote it, to compare with: an image that has no other text has none."""

    @classmethod
    def of(cls, text: str, label: str = "", *, is_reference: bool = False) -> "Text":
        """Return a text without marks of what differs."""
        return cls([("same", text)] if text else [], label, is_reference=is_reference)


@dataclass(frozen=True, kw_only=True)
class Card:
    """One image on a page."""

    image_id: str

    picture: Thumbnail | Reject
    """The picture, or why there is none."""

    texts: Sequence[Text]
    """What stands below or beside it, the most important first."""

    facts: Mapping[str, Fact] = field(default_factory=dict)
    """What is known of it by name. Numbers can be sorted by; the large view shows all."""

    tags: Sequence[str] = ()
    """What it can be filtered by: a reason, a finish_reason."""
