"""References of the images of some rows, from a file of captions, matched as `jobs/evaluate.py` matches them."""

from collections.abc import Mapping, Sequence
from typing import Any

from captioner.errors import InputError
from captioner.evaluation import RULES, Captions, match
from captioner.evaluation.caption_files import CaptionRow
from captioner.evaluation.metrics import CaptionEncoder
from captioner.evaluation.side import Side
from captioner.storage.urls import redact

__all__ = ["references_of"]

_ROWS_PER_BATCH = 8192


def references_of(
    image_ids: Sequence[str], path: str, storage_options: Mapping[str, Any], column: str = ""
) -> dict[str, list[str]]:
    """Return the references of each image that has some, by the rule that finds most; InputError if none has.

    column: with the texts, of a caption table any prompt; empty for the usual ones."""
    encoder = CaptionEncoder()
    side = Side(path=path, storage_options=storage_options, column=column, flag="--reference-column")
    listed = side.read(list, _ROWS_PER_BATCH)
    mine = Captions.read((CaptionRow(image_id, "") for image_id in image_ids), encoder)
    theirs = Captions.read(iter(listed), encoder)
    best = min((match(mine, theirs, rule) for rule in RULES), key=lambda matching: matching.num_unmatched)
    if image_ids and not len(best.rows):
        raise InputError(
            f"{redact(path)} has a reference of none of {len(image_ids):,} images, such as {image_ids[0]}; expected"
            " captions of the same images"
        )
    texts: dict[int, list[str]] = {}
    for row, image in zip(listed, theirs.image.tolist(), strict=True):
        texts.setdefault(image, []).append(row.caption)
    owners = mine.image_ids.to_pylist()
    images = zip(mine.image[best.rows].tolist(), best.images.tolist(), strict=True)
    return {owners[own]: texts[other] for own, other in images}
