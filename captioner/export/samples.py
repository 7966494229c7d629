"""Samples of an image and its texts, for formats that hold the images themselves.

A sample is named by its row key, `000003-000000012`: unit and position. So no name collides, leaves its folder or has
dots, whatever images are called; the image_id stands beside it as a column.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from captioner.export.request import Shard
from captioner.images.formats import guess
from captioner.inputs.suffixes import IMAGE_SUFFIXES
from captioner.schema import Reject, split_key
from captioner.storage import urls

__all__ = ["image_suffix", "sample_name", "samples"]

_SUFFIX_OF = {"JPEG": ".jpg", "JPEG2000": ".jp2", "TIFF": ".tif"}


def sample_name(key: int) -> str:
    """Return the name of a sample; names sort as keys do."""
    unit, position = split_key(key)
    return f"{unit:06d}-{position:09d}"


def image_suffix(image_id: str, data: bytes) -> str:
    """Return the suffix of an image's file: that of its name, else what its bytes seem to be."""
    named = urls.suffix(image_id)
    if named in IMAGE_SUFFIXES:
        return named
    found = guess(data).name
    made = _SUFFIX_OF.get(found, f".{found.lower()}")
    return made if made in IMAGE_SUFFIXES else ".jpg"


def samples(shard: Shard) -> Iterator[tuple[Mapping[str, Any], bytes]]:
    """Yield each row of a shard with the bytes of its image, empty where images are not wanted.

    A row whose image cannot be read any more is refused and counted. Raises JobError where another try may help."""
    for batch in shard.rows:
        rows: list[dict[str, Any]] = batch.to_pylist()
        if not shard.request.config.images:
            yield from ((row, b"") for row in rows)
            continue
        images = shard.request.images.read(batch.column("key").to_numpy())
        for row, (key, image) in zip(rows, images, strict=True):
            assert row["key"] == key
            if isinstance(image, Reject):
                shard.refused[f"image_{image.reason}"] += 1
            else:
                yield row, image
