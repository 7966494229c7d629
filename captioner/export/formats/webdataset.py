"""`webdataset`: tars of samples: the image as it is, `.txt` with a caption a line, `.json` with the columns."""

from collections.abc import Mapping
from typing import IO

from captioner.export.formats.json_lines import json_sql, strict_json
from captioner.export.request import ExportFormat, Request, Shard
from captioner.export.samples import image_suffix, sample_name, samples
from captioner.export.tar_writer import TarWriter
from captioner.export.text import one_a_line

__all__ = ["WEBDATASET"]


def _columns(request: Request) -> Mapping[str, str]:
    return {"image_id": "image_id", "texts": request.texts, "line": json_sql(request)}


def _write(shard: Shard) -> None:
    def write(file: IO[bytes]) -> None:
        tar = TarWriter(file)
        for row, image in samples(shard):
            name = sample_name(row["key"])
            if image:
                tar.add(name + image_suffix(row["image_id"], image), image)
            tar.add(f"{name}.txt", one_a_line(row["texts"]))
            tar.add(f"{name}.json", strict_json(row["line"]).encode())
        tar.close()

    shard.publish(WEBDATASET.file_of(shard.number), write)


WEBDATASET = ExportFormat(
    name="webdataset",
    help="tars of images, read again as they are, with .txt and .json; with --no-images these alone",
    columns=_columns,
    write=_write,
    file="captions-{:05d}.tar",
    has_columns=True,
    has_several=True,
    reads_images=True,
)
