"""`coco`: images and annotations as in COCO's captions_*.json, which pycocotools and jobs/evaluate.py read.

An image's `id` is its row key, its `file_name` the image_id.
"""

import shutil
import tempfile
from collections.abc import Iterator
from typing import IO, Any

from captioner.export.formats.documents import encoded, write_members
from captioner.export.request import ExportFormat, Shard

__all__ = ["COCO"]

_INFO = {"description": "Captions of jobs/export.py"}


def _write(shard: Shard) -> None:
    def write(file: IO[bytes]) -> None:
        with tempfile.TemporaryFile() as annotations:  # both lists come from one pass
            opening = b'{"info": ' + encoded(_INFO) + b', "licenses": [], "images": ['
            write_members(file, _images(shard, annotations), opening, b"],\n")
            annotations.seek(0)
            file.write(b'"annotations": [')
            shutil.copyfileobj(annotations, file)
            file.write(b"\n]}\n")

    shard.publish(COCO.file_of(shard.number), write)


def _images(shard: Shard, annotations: IO[bytes]) -> Iterator[bytes]:
    number = 0
    for batch in shard.rows:
        for row in batch.to_pylist():
            for text in row["texts"]:
                number += 1
                annotation = {"id": number, "image_id": row["key"], "caption": text}
                annotations.write((b",\n" if number > 1 else b"\n") + encoded(annotation))
            yield encoded(_image(row))


def _image(row: dict[str, Any]) -> dict[str, Any]:
    return {"id": row["key"], "file_name": row["image_id"], "width": row["width"], "height": row["height"]}


COCO = ExportFormat(
    name="coco",
    help="COCO's captions_*.json",
    columns=lambda request: {"image_id": "image_id", "width": "width", "height": "height", "texts": request.texts},
    write=_write,
    file="captions-{:05d}.json",
    has_several=True,
)
