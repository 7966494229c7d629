"""Drawn scenes with captions in a folder, as a user would have them: images beside a JSONL."""

import json
from pathlib import Path

from captioner.demo import scenes


def write_labels(folder: Path, num_images: dict[str, int]) -> Path:
    """Write so many images of each split, two captions each, and return the path of their labels."""
    with (folder / "labels.jsonl").open("w") as lines:
        for split, count in num_images.items():
            for example in scenes.examples(split, count):  # type: ignore[arg-type]
                (folder / example.image_id).write_bytes(example.image)
                row = {"image": example.image_id, "captions": example.captions[:2], "split": split}
                lines.write(json.dumps(row) + "\n")
    return folder / "labels.jsonl"
