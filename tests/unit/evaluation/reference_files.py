"""The same references in a file of each format."""

import csv
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from captioner.evaluation.caption_files import CaptionRow

REFERENCES = {
    "7": ["a dog sits on a wall", "the dog is on the wall"],
    "8": ["two red cars in the street", "cars"],
    "9": ["a cat is asleep on a mat", "the cat sleeps"],
}
ROWS = [CaptionRow(image_id, caption) for image_id, own in REFERENCES.items() for caption in own]


def write_rows(folder: Path, columns: tuple[str, str], delimiter: str) -> Path:
    path = folder / ("references.csv" if delimiter == "," else "references.tsv")
    with path.open("w", newline="") as file:
        writer = csv.writer(file, delimiter=delimiter)
        writer.writerows([("split", *columns), *(("val", row.image_id, row.caption) for row in ROWS)])
    return path


def write_jsonl(folder: Path, *, is_list: bool) -> Path:
    whole: list[dict[str, Any]] = [{"image_id": int(name), "captions": own} for name, own in REFERENCES.items()]
    single: list[dict[str, Any]] = [{"image": row.image_id, "caption": row.caption} for row in ROWS]
    lines = [json.dumps(found) for found in (whole if is_list else single)]
    path = folder / "references.jsonl"
    path.write_text("\n\n".join(lines) + "\n")
    return path


def write_parquet(folder: Path, name: str, columns: Mapping[str, Any]) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(dict(columns)), path)
    return path


def write_list_parquet(folder: Path) -> Path:
    columns = {"image_id": [float(name) for name in REFERENCES], "caption": list(REFERENCES.values())}
    return write_parquet(folder, "references.parquet", columns)


def write_image_parquet(folder: Path) -> Path:
    columns = {"file_name": list(REFERENCES), "caption": list(REFERENCES.values())}
    return write_parquet(folder, "references.parquet", {"image": [b"\xff\xd8"] * len(REFERENCES), **columns})


def write_parquet_folder(folder: Path) -> Path:
    for position, (image_id, own) in enumerate(REFERENCES.items()):
        write_parquet(folder, f"table/part-{position}.parquet", {"image_id": [image_id] * len(own), "caption": own})
    (folder / "table" / "_SUCCESS.parquet").write_text("a marker")
    return folder / "table"


def write_caption_table(folder: Path) -> Path:
    write_parquet_folder(folder / "out").rename(folder / "out" / "captions")
    write_parquet(folder, "out/failures/part-0.parquet", {"image_id": ["10"], "reason": ["missing"]})
    return folder / "out"


def write_token(folder: Path) -> Path:
    path = folder / "Flickr8k.token.txt"
    path.write_text("".join(f"{row.image_id}#{number}\t{row.caption}\n" for number, row in enumerate(ROWS)))
    return path


def write_json(folder: Path, value: Any) -> Path:
    path = folder / "references.json"
    path.write_text(json.dumps(value))
    return path


def annotations() -> list[dict[str, Any]]:
    return [{"image_id": int(row.image_id), "id": 0, "caption": row.caption} for row in ROWS]


def coco() -> dict[str, Any]:
    images = [{"id": int(name), "file_name": f"COCO_val_{name:0>12}.jpg"} for name in REFERENCES]
    return {"info": {}, "images": [*images, {"id": 10}], "annotations": annotations()}


def karpathy(*, has_cocoid: bool) -> dict[str, Any]:
    def image(name: str, own: list[str]) -> dict[str, Any]:
        sentences = [{"raw": own[0], "tokens": []}, {"tokens": own[1].split()}]
        ids = {"cocoid": int(name), "filename": f"{name}.jpg"} if has_cocoid else {"filename": name}
        return {**ids, "split": "test", "sentences": sentences}

    return {"dataset": "coco", "images": [image(name, own) for name, own in REFERENCES.items()]}
