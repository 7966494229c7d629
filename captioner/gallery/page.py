"""One self-contained HTML file of cards: images inside, no request to anywhere, works from `file://`.

    write_page(Page(title="Validation images", cards=cards), "out.html")

The texts of the cards are data: JSON in the file, shown as text. Its Content-Security-Policy ensures that none of it
can run, and that nothing is loaded or sent: it allows the page's one style and one script by their hashes,
images from `data:` only, no other source of anything, and no string is ever parsed as HTML (trusted types).
"""

import base64
import hashlib
import html
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any, Literal

from captioner.gallery.cards import Card, Fact
from captioner.images.thumbnails import Thumbnail
from captioner.repetition import words
from captioner.schema import Reject
from captioner.storage import Place, open_store
from captioner.storage.faults import output_errors
from captioner.storage.urls import redact

__all__ = ["Page", "page_html", "write_page"]

_SCRIPTS = ("page.cards.js", "page.choice.js", "page.moves.js", "page.js")  # one script: a later one uses the earlier
_PLACEHOLDER = re.compile(r"\{\{(\w+)\}\}")
_ESCAPED = {ord(char): f"\\u{ord(char):04x}" for char in "<>&\u2028\u2029"}
_MAX_FACT = 500  # characters of one value: a column of vectors would be most of the page
_MAX_EXACT = 1 << 53  # greater integers are not what they were when JavaScript has read them
_APOSTROPHE = re.compile(r"(?<=\w)['\u2019](?=\w)")


@dataclass(frozen=True, kw_only=True)
class Page:
    """What a page shows."""

    title: str

    cards: Sequence[Card]

    lines: Sequence[str] = ()
    """Sentences below the title: what this is, and how it was chosen."""

    scores: Sequence[str] = ()
    """Facts that each card shows, not only its large view."""

    quiet_tags: Sequence[str] = ()
    """Tags to filter by that the cards do not show: what is true of most images, or plain to see."""

    layout: Literal["grid", "pairs"] = "grid"
    """`grid`: texts below images. `pairs`: a row an image, its texts beside each other."""


def write_page(page: Page, output: Place) -> int:
    """Write the page to `output`, on any store, whole or not at all; return its size in bytes."""
    data = page_html(page).encode()
    with output_errors(output):
        open_store(output).write_atomic(output, data)
    return len(data)


def page_html(page: Page) -> str:
    """Return the page as one HTML document."""
    style, script = _part("page.css"), "\n".join(map(_part, _SCRIPTS))
    parts = {
        "policy": _policy(style, script),
        "title": html.escape(_clean(page.title)),
        "style": style,
        "script": script,
        "data": _json_in_html(_described(page)),
    }
    return _PLACEHOLDER.sub(lambda found: parts[found.group(1)], _part("page.html"))


def _part(name: str) -> str:
    return files(__package__).joinpath(name).read_text(encoding="utf-8")


def _policy(style: str, script: str) -> str:
    return (
        f"default-src 'none'; img-src data:; style-src {_hash(style)}; script-src {_hash(script)};"
        " base-uri 'none'; form-action 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
    )


def _hash(source: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()}'"


def _json_in_html(value: Any) -> str:
    """Return JSON that ends no script element and opens none: without `<`, `>` and `&`."""
    text = json.dumps(value, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.translate(_ESCAPED)


def _described(page: Page) -> dict[str, Any]:
    return {
        "title": _clean(page.title),
        "lines": [_clean(line) for line in page.lines],
        "layout": page.layout,
        "scores": [_clean(score) for score in page.scores],
        "quiet": [_clean(tag) for tag in page.quiet_tags],
        "cards": [_card(card) for card in page.cards],
    }


def _card(card: Card) -> dict[str, Any]:
    return {
        "id": _clean(card.image_id),
        "path": _clean(card.path),
        "image": _image(card),
        "words": _num_words(card),
        "failed": _has_failed(card),
        "texts": [
            {
                "label": _clean(text.label),
                "missing": text.is_missing,
                "runs": [[kind, _clean(words)] for kind, words in text.runs],
            }
            for text in card.texts
        ],
        "facts": {_clean(name): _fact(value) for name, value in card.facts.items()},
        "tags": [_clean(tag) for tag in card.tags],
    }


def _has_failed(card: Card) -> bool:
    """Return whether neither image nor text of a model is there, or one of the texts beside each other is missing."""
    is_bare = isinstance(card.image, Reject) and all(text.is_reference for text in card.texts)
    return is_bare or any(text.is_missing for text in card.texts)


def _num_words(card: Card) -> int | None:
    """Return the number of words of the first text, in any script; null where it is none of the image's own."""
    first = next(iter(card.texts), None)
    if first is None or first.is_missing or first.is_reference or not first.runs:
        return None
    return len(words(_APOSTROPHE.sub("", "".join(found for _, found in first.runs))))


def _image(card: Card) -> dict[str, Any]:
    if isinstance(card.image, Thumbnail):
        data = base64.b64encode(card.image.data).decode()
        return {"data": data, "width": card.image.width, "height": card.image.height}
    return {"reason": str(card.image.reason), "detail": _clean(card.image.detail)}


def _fact(value: Fact) -> Fact:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, int) and abs(value) > _MAX_EXACT:
        return str(value)
    return _cut(_clean(value)) if isinstance(value, str) else value


def _cut(text: str) -> str:
    return text if len(text) <= _MAX_FACT else text[: _MAX_FACT - 1] + "…"


def _clean(text: str) -> str:
    """Return text that holds no credentials of a URL, and that a browser can show."""
    return _readable(redact(text))


def _readable(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()
