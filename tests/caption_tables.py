"""Caption tables as a job leaves them, without a job: real frozen inputs, real parts, made-up captions."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from captioner.config import InputConfig
from captioner.inputs import freeze
from captioner.inputs.units import Frozen
from captioner.schema import ASKED, captioned_schema, row_key
from captioner.storage import Location
from captioner.tables import CaptionTable, Stamp
from tests.sample_images import encoded

_SCORES = {"num_tokens": 4, "finish_reason": "stop", "mean_logprob": -0.5, "min_logprob": -1.0, "is_repetitive": False}
_SIZE = {"width": 48, "height": 40, "size_bytes": 900}


def write_images(folder: Path, num_images: int, size: tuple[int, int] = (48, 40)) -> Path:
    """Write JPEGs 000.jpg, 001.jpg, ..., each another image."""
    folder.mkdir(parents=True)
    for seed in range(num_images):
        (folder / f"{seed:03d}.jpg").write_bytes(encoded(seed=seed, size=size))
    return folder


def begin_table(
    url: str,
    images: str,
    *,
    options: Mapping[str, Any] | None = None,
    input_options: Mapping[str, Any] | None = None,
    identity: Mapping[str, Any] | None = None,
    **columns: Any,
) -> tuple[CaptionTable, Frozen]:
    """Begin a table of these images: its input is frozen, it has no row yet."""
    table = CaptionTable(Location(url, options))
    config = InputConfig(storage_options=dict(input_options or options or {}), **columns)
    frozen = freeze(images, config, table.run_folder)
    table.claim({"input": images, "model": {"name": "demo", "fingerprint": "abc"}, **(identity or {})})
    return table, frozen


def caption_row(position: int, image_id: str, caption: str, unit: int = 0, **columns: Any) -> dict[str, Any]:
    """Return a row as it leaves the model."""
    row = {"key": row_key(unit, position), "image_id": image_id, "attempt": 1, "caption": caption}
    return {**row, **_SCORES, **_SIZE, **columns}


def failure_row(position: int, image_id: str, reason: str, detail: str = "why", unit: int = 0) -> dict[str, Any]:
    """Return a row of an image that failed."""
    return {"key": row_key(unit, position), "image_id": image_id, "attempt": 1, "reason": reason, "detail": detail}


def add_part(
    table: CaptionTable, rows: Sequence[Mapping[str, Any]], kept: Sequence[pa.Field] = (), run_id: str = "run-1"
) -> None:
    """Write rows as one part, as the sink of a job does."""
    answers = table.answers()
    made = pa.Table.from_pylist([dict(row) for row in rows], captioned_schema(kept, answers))
    table.write(made, Stamp(run_id, table.digest), kept, table.families()[:1])


def add_answers(table: CaptionTable, prompt: str, asked: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> None:
    """Write the answers to a prompt that is added to a table, or its failures, as one part, as the sink of a job does.

    asked: `Prompt.identity`. rows: as `caption_row` or `failure_row` makes them, with the answers."""
    identity = table.identity() or {}
    table.claim({**identity, "prompts": identity.get("prompts", {}) | {prompt: asked}})
    families = [family for family in table.families() if family.prompt == prompt]
    schema = captioned_schema([ASKED], families[0].answers)
    made = pa.Table.from_pylist([{**row, ASKED.name: [prompt]} for row in rows], schema)
    table.write(made, Stamp(f"run-{prompt}", table.digest), (), families)
