"""Rows of a caption table as cards: a caption below its image, or those of two tables beside each other.

Knows the columns of the table; reads and writes nothing. A row is a mapping from column to value, as Arrow gives it.
"""

from collections.abc import Iterator, Mapping, Sequence
from decimal import Decimal
from typing import Any

from captioner.gallery.cards import Card, Fact, Text
from captioner.gallery.differences import difference
from captioner.gallery.page_images import PageImage
from captioner.gallery.shown_column import answer_text
from captioner.gallery.wording import FAILED, NO_ANSWER, doubt_words, finish_word
from captioner.prompts import details_name
from captioner.schema import SCORES, Reject, RejectReason
from captioner.storage.urls import redact

__all__ = ["CHANGED", "SAME", "Row", "caption_card", "pair_card"]

Row = Mapping[str, Any]

CHANGED, SAME = "changed", "same"

_SHOWN_ELSEWHERE = {"image_id", "caption", "candidates"}


def caption_card(row: Row, image: PageImage, references: Sequence[str] = (), path: str = "") -> Card:
    """Return the card of one image: its caption, or why there is none. path: where the image was read from."""
    is_failed = row.get("reason") is not None
    texts = [] if is_failed else [_text({"caption": "", **row}), *_answers(row)]
    return Card(
        image_id=_name(row),
        path=path,
        image=_reject(row) if is_failed else image,
        texts=[*texts, *(Text.of(text, "reference", is_reference=True) for text in references)],
        facts=dict(_facts(row)),
        tags=list(dict.fromkeys(_tags(row))),
    )


def _answers(row: Row) -> Iterator[Text]:
    """Yield the answers to named prompts, each below its name."""
    for name in filter(lambda name: details_name(name) in row, row):
        if (value := row[name]) is not None and name != "caption":
            yield Text.of(answer_text(value), name)


def pair_card(rows: tuple[Row, Row], labels: tuple[str, str], image: PageImage, change: float, path: str = "") -> Card:
    """Return the card of one image in two tables: both captions, with what differs marked."""
    before, after = rows
    facts: dict[str, Fact] = {"change": change}
    for name in SCORES:
        for row, label in zip(rows, labels, strict=True):
            if row.get(name) is not None:
                facts[f"{name}, {label}"] = row[name]
    return Card(
        image_id=_name(before),
        path=path,
        image=image,
        texts=_pair_texts(rows, labels),
        facts={**facts, **{f"{name}, {labels[0]}": value for name, value in _facts(before) if name not in SCORES}},
        tags=list(dict.fromkeys([*_change(rows, change), *_tags(before), *_tags(after)])),
    )


def _change(rows: tuple[Row, Row], change: float) -> list[str]:
    """Return the tag of what became of a caption; none where one of the two is missing."""
    if any(row.get("caption") is None for row in rows):
        return []
    return [CHANGED if change else SAME]


def _pair_texts(rows: tuple[Row, Row], labels: tuple[str, str]) -> list[Text]:
    if any(row.get("caption") is None for row in rows):
        return [_text(row, label) for row, label in zip(rows, labels, strict=True)]
    found = difference(*(redact(row["caption"]) for row in rows))  # pieces of a URL cannot be redacted
    return [Text(found.first, labels[0]), Text(found.second, labels[1])]


def _text(row: Row, label: str = "") -> Text:
    """Return the caption of a row, or why there is none."""
    if row.get("reason") is not None:
        reason = str(row["reason"]).replace("_", " ")
        return Text([("same", f"{reason}: {row.get('detail') or ''}")], label, is_missing=True)
    if row.get("caption") is None:
        return Text([("same", NO_ANSWER)], label, is_missing=True)
    return Text.of(str(row["caption"]), label)


def _reject(row: Row) -> Reject:
    try:
        reason = RejectReason(row["reason"])
    except ValueError:  # a query may call anything a reason
        reason = RejectReason.MISSING
    return Reject(reason, str(row.get("detail") or ""))


def _name(row: Row) -> str:
    return str(row.get("image_id") or row.get("key") or "")


def _tags(row: Row) -> Iterator[str]:
    if row.get("reason") is not None:
        yield from (FAILED, str(row["reason"]))
    elif "caption" in row and row["caption"] is None:
        yield NO_ANSWER
    if row.get("finish_reason") is not None:
        yield finish_word(str(row["finish_reason"]))
    if row.get("is_repetitive"):
        yield "repetitive"
    yield from doubt_words(row.get("why"))


def _facts(row: Row) -> Iterator[tuple[str, Fact]]:
    first = [name for name in SCORES if name in row]
    for name in (*first, *(name for name in row if name not in {*first, *_SHOWN_ELSEWHERE})):
        if details_name(name) in row:  # an answer, which is a text of the card
            continue
        if isinstance(row[name], Mapping) and name.endswith(details_name("")):
            yield from ((f"{name}.{key}", _fact(value)) for key, value in row[name].items() if key != "candidates")
        else:
            yield name, _named_fact(name, row[name])
    yield from _candidates(row.get("candidates"))


def _candidates(found: Any) -> Iterator[tuple[str, Fact]]:
    """Yield the captions that were not chosen, each with the score that ranked it; a query's own column unchanged."""
    if found is None:
        return
    if not (isinstance(found, list) and all(isinstance(one, Mapping) and "caption" in one for one in found)):
        yield "candidates", _fact(found)
        return
    for number, candidate in enumerate(found[1:], 2):
        scores = [candidate[name] for name in SCORES if candidate.get(name) is not None]
        yield f"caption {number}", f"{candidate['caption']} ({scores[0]:.3f})" if scores else str(candidate["caption"])


def _named_fact(name: str, value: Any) -> Fact:
    if name == "key":
        return str(value)
    if name == "finish_reason" and isinstance(value, str) and finish_word(value) != value:
        return f"{finish_word(value)} ({value})"
    return _fact(value)


def _fact(value: Any) -> Fact:
    if isinstance(value, Decimal):
        return float(value)
    if isinstance(value, bytes):
        return f"{len(value):,} bytes"
    return value if value is None or isinstance(value, str | int | float | bool) else str(value)
