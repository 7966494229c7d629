"""Drawn scenes with captions, as a user would have them: images beside a JSONL, or inside a tar or a Parquet file."""

import json
import tarfile
from io import BytesIO
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from captioner.demo import scenes

__all__ = ["pack_parquet", "pack_tar", "write_labels"]


def write_labels(folder: Path, num_images: dict[str, int]) -> Path:
    """Write so many images of each split, two captions each, and return the path of their labels."""
    with (folder / "labels.jsonl").open("w") as lines:
        for split, count in num_images.items():
            for example in scenes.examples(split, count):  # type: ignore[arg-type]
                (folder / example.image_id).write_bytes(example.image)
                row = {"image": example.image_id, "captions": example.captions[:2], "split": split}
                lines.write(json.dumps(row) + "\n")
    return folder / "labels.jsonl"


def pack_tar(labels: Path, target: Path) -> Path:
    """Write the images and captions of a JSONL to a tar, which is gzip if its name says so, and return its path."""
    with tarfile.open(target, "w:gz" if target.suffix == ".gz" else "w") as tar:
        for row in map(json.loads, labels.read_text().splitlines()):
            image = labels.parent / row["image"]
            described = json.dumps({name: row[name] for name in ("captions", "split")})
            for name, data in ((image.name, image.read_bytes()), (f"{image.stem}.json", described.encode())):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, BytesIO(data))
    return target


def pack_parquet(labels: Path, target: Path) -> Path:
    """Write the images and captions of a JSONL to a Parquet file of small row groups, and return its path."""
    rows = [json.loads(line) for line in labels.read_text().splitlines()]
    images = [(labels.parent / row["image"]).read_bytes() for row in rows]
    columns = {"image": images, **{name: [row[name] for row in rows] for name in ("captions", "split")}}
    pq.write_table(pa.table(columns), target, row_group_size=16)
    return target
