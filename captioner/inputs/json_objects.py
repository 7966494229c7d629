"""Objects in JSON files, one a line or in a list. Knows no key of theirs but COCO's `images`."""

from collections.abc import Iterator
from typing import Any, NamedTuple

from captioner.errors import InputError
from captioner.inputs.text_files import decoded, open_text
from captioner.storage import Store, urls
from captioner.storage.json_text import parse_json

__all__ = ["JsonRow", "found_in", "read_objects"]


class JsonRow(NamedTuple):
    """An object, and where it stands, for messages."""

    place: str
    values: dict[str, Any]


def read_objects(store: Store, url: str) -> Iterator[JsonRow]:
    """Yield the objects of a file: one a line, those in a list, or COCO's `images`. A list is read whole.

    Raises InputError naming the line, or what was found, for anything else; StoreError."""
    if urls.suffix(url) != ".json":
        yield from _of_lines(store, url)
        return
    where = urls.shown(url)
    text = decoded(store.read_bytes(url), url)
    try:
        found = parse_json(text)
    except ValueError as error:
        if "Extra data" not in str(error):
            raise InputError(f"{where} is not JSON: {error}; expected objects, in a list or one a line") from error
        yield from _of_lines(store, url)
        return
    match found:
        case [*items] | {"images": [*items]}:
            yield from (_row(item, f"{where}, item {number}") for number, item in enumerate(items, 1))
        case dict() if all(not isinstance(value, list | dict) for value in found.values()):
            yield JsonRow(where, found)  # one line alone
        case _:
            raise InputError(f"{where} is {found_in(found)}; expected objects, in a list or one a line")


def found_in(value: Any) -> str:
    """Return in words which JSON value this is: `an object of dog, cat`."""
    match value:
        case dict():
            names = ", ".join(f"{name[:20]} ({_kind(item)})" for name, item in list(value.items())[:5])
            return f"an object of {names or 'nothing'}{', ...' if len(value) > 5 else ''}"
        case [first, *_]:
            return f"a list of {len(value):,}, the first {_kind(first)}"
        case []:
            return "an empty list"
    return _kind(value)


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def _of_lines(store: Store, url: str) -> Iterator[JsonRow]:
    with open_text(store, url) as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                place = f"{urls.shown(url)}, line {number}"
                try:
                    yield _row(parse_json(line), place)
                except ValueError as error:
                    raise InputError(f"{place} is not JSON: {error}; expected an object a line") from error


def _row(found: Any, place: str) -> JsonRow:
    if not isinstance(found, dict):
        raise InputError(f'{place} is {found_in(found)}; expected an object, such as {{"url": ...}}')
    return JsonRow(place, found)
