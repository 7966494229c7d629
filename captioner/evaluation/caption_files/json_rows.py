"""Captions as JSON: an object a line, COCO's captions and results, Karpathy's datasets."""

from collections.abc import Iterator
from typing import Any

from captioner.errors import InputError
from captioner.evaluation.caption_files.records import ColumnNames, Record, image_name
from captioner.inputs.json_objects import found_in
from captioner.inputs.text_files import decoded, open_text
from captioner.storage import Store
from captioner.storage.json_text import parse_json
from captioner.storage.urls import shown

__all__ = ["read_json_lines", "read_json_rows"]


def read_json_lines(store: Store, url: str, wanted: ColumnNames) -> Iterator[Record]:
    """Yield the objects of a file that has one a line. A line that is none is a problem, not an error."""
    with open_text(store, url) as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield _json_line(line, f"{shown(url)}, line {number}", shown(url), wanted)


def _json_line(line: str, place: str, where: str, wanted: ColumnNames) -> Record:
    try:
        found = _parse(line, place)
    except InputError as error:
        return Record(problem=str(error))
    return _record(found, where, wanted)


def read_json_rows(store: Store, url: str, wanted: ColumnNames) -> Iterator[Record]:
    """Yield the captions of a COCO file, with the images' file names if it has them, or of a Karpathy dataset."""
    where = shown(url)
    text = decoded(store.read_bytes(url), url)
    if _is_lines(text):
        yield from read_json_lines(store, url, wanted)
        return
    match _parse(text, where):
        case {"annotations": [*annotations], "images": [*images]}:
            names = {image_name(image["id"]): str(image["file_name"]) for image in images if _is_named(image)}
            for record in (_record(found, where, wanted) for found in annotations):
                yield record._replace(file_name=names.get(image_name(record.image_id), ""))
        case {"images": [*images]}:
            yield from (_karpathy(image, where) for image in images)
        case {"annotations": [*results]} | [*results]:
            yield from (_record(found, where, wanted) for found in results)
        case dict(one) if wanted.are_in(one):
            yield _record(one, where, wanted)
        case dict(captions) if captions and all(map(_is_captions, captions.values())):
            yield from (Record(name, _texts(found)) for name, found in captions.items())
        case found:
            raise InputError(
                f"{where} has neither annotations nor images: it is {found_in(found)}; expected COCO's"
                ' captions_*.json, {"image": "caption"}, {"image": ["caption", ...]}, or an object with image_id and'
                " caption a line"
            )


def _is_captions(found: Any) -> bool:
    """Return whether this is a caption or a list of them, as texts or, as pycocoevalcap has them, in objects."""
    texts = _texts(found)
    return isinstance(texts, str) or (isinstance(texts, list) and all(isinstance(text, str) for text in texts))


def _texts(found: Any) -> Any:
    return [one.get("caption") if isinstance(one, dict) else one for one in found] if isinstance(found, list) else found


def _is_lines(text: str) -> bool:
    """Return whether a file holds an object a line, as Hugging Face's .json do, and not one value."""
    first, _, rest = text.lstrip().partition("\n")
    if not (first.startswith("{") and rest.strip()):
        return False
    try:
        return isinstance(parse_json(first), dict)
    except ValueError:
        return False


def _is_named(image: Any) -> bool:
    return isinstance(image, dict) and "id" in image and "file_name" in image


def _karpathy(image: Any, where: str) -> Record:
    match image:
        case {"filename": str(file_name), "sentences": [*sentences]}:
            path = "/".join(part for part in (image.get("filepath"), file_name) if part)
            texts = [_sentence(found) for found in sentences]
            return Record(image.get("cocoid", file_name), texts, path, image.get("split"))
    return Record(problem=f"{where} has an image without filename and sentences; expected Karpathy's dataset")


def _sentence(found: Any) -> Any:
    match found:
        case {"raw": str(raw)}:
            return raw
        case {"tokens": [*tokens]}:
            return " ".join(map(str, tokens))
    return found


def _record(found: Any, where: str, wanted: ColumnNames) -> Record:
    if not isinstance(found, dict):
        return Record(problem=f"{where} holds {str(found)[:40]!r}; expected objects with image_id and caption")
    if isinstance(found.get("conversations"), list) and not wanted.flags:
        return _conversation(found, where)
    try:
        return Record(**{field: found[column] for field, column in wanted.choose(found, where).items()})
    except InputError as error:
        return Record(problem=str(error))


def _conversation(found: dict[str, Any], where: str) -> Record:
    """Return LLaVA's conversation about an image as its caption, if the model says one thing."""
    image = found.get("image")
    answers = [
        turn.get("value") for turn in found["conversations"] if isinstance(turn, dict) and turn.get("from") == "gpt"
    ]
    if len(answers) == 1 and isinstance(image, str):
        return Record(image, answers[0], image)
    return Record(
        problem=f"{where} has a conversation about {str(image)[:40]!r} with {len(answers)} answers; expected an image"
        " and one answer, which is its caption. Write the others as an object with image and caption a line"
    )


def _parse(text: str, where: str) -> Any:
    try:
        return parse_json(text)
    except ValueError as error:
        raise InputError(f"{where} is not JSON: {error}; expected image_id and caption") from error
