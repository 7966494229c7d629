"""`hf-folder`: an image folder for Hugging Face's datasets: images as they are, `metadata.jsonl` in each folder.

`metadata.jsonl` comes last, so that a folder that has it is whole. The file of an image is named by its row key.
`candidates` are there only where --columns names them: datasets takes the type of a column from one of the files, and a
column that is null in all of it may have no lists in another.
"""

from collections.abc import Mapping
from typing import IO

from captioner.export.formats.documents import encoded
from captioner.export.formats.json_lines import json_sql, strict_json
from captioner.export.request import ExportFormat, Request, Shard
from captioner.export.samples import image_suffix, sample_name, samples

__all__ = ["HF_FOLDER"]


def _columns(request: Request) -> Mapping[str, str]:
    unless_named = () if request.config.columns else ("candidates",)
    line = json_sql(request, without=("image", "file_name", "text", *unless_named))
    return {"image_id": "image_id", "text": request.text, "line": line}


def _write(shard: Shard) -> None:
    metadata = HF_FOLDER.file_of(shard.number)
    folder = metadata.rpartition("/")[0]

    def write(file: IO[bytes]) -> None:
        for row, image in samples(shard):
            named = {"text": row["text"]}
            if image:
                name = sample_name(row["key"]) + image_suffix(row["image_id"], image)
                shard.store.write_atomic(shard.request.output / f"{folder}/{name}", image)
                named = {"file_name": name, **named}
            rest = strict_json(row["line"])[1:]
            file.write(encoded(named)[:-1] + (b"," if rest != "}" else b"") + rest.encode() + b"\n")

    shard.publish(metadata, write)


HF_FOLDER = ExportFormat(
    name="hf-folder",
    help="folders of images with metadata.jsonl, as datasets' imagefolder reads them",
    columns=_columns,
    write=_write,
    file="train/{:05d}/metadata.jsonl",
    has_columns=True,
    has_several=True,
    reads_images=True,
    goes_to_hub=True,
)
