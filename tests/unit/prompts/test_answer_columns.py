"""The columns that prompts add to a table, from its identity."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa

from captioner.config import DecodingConfig
from captioner.prompts import answer_counts, answer_fields, num_tokens, read_prompts
from captioner.schema import captions_schema
from captioner.tables.identity import to_json

FILE = """
tags: {text: List., do_sample: true, num_captions: 3}
caption: Describe.
is_photo: {text: "A photograph?", choice: [yes, no]}
info:
  text: JSON.
  json_schema:
    type: object
    additionalProperties: false
    properties: {n: {type: integer}, a: {type: array, items: {type: string}}}
"""
SCORES = ["num_tokens", "finish_reason", "mean_logprob", "min_logprob", "is_repetitive"]


def fields(tmp_path: Path) -> list[pa.Field]:
    (tmp_path / "prompts.yaml").write_text(FILE)
    prompts = read_prompts(tmp_path / "prompts.yaml", DecodingConfig(), frozenset())
    on_disk: dict[str, Any] = json.loads(to_json({prompt.name: prompt.identity for prompt in prompts}))
    return answer_fields(on_disk)


def test_the_columns_follow_from_an_identity_on_disk_and_stand_by_name(tmp_path: Path) -> None:
    found = {field.name: field for field in fields(tmp_path)}
    assert list(found) == [
        "caption_details",
        "info",
        "info_details",
        "is_photo",
        "is_photo_details",
        "tags",
        "tags_details",
    ]
    assert found["info"].type == pa.struct([("n", pa.int64()), ("a", pa.list_(pa.string()))])
    assert [found[name].nullable for name in ("info", "is_photo", "tags")] == [True, True, False]
    assert not any(found[name].nullable for name in found if name.endswith("_details"))
    asked = ["text_number", "num_cut_values"]
    assert [one.name for one in found["caption_details"].type] == asked
    assert [one.name for one in found["is_photo_details"].type] == [*SCORES, *asked]
    assert [one.name for one in found["tags_details"].type] == [*SCORES, *asked, "candidates"]


def test_answers_stand_between_the_fixed_columns_and_those_of_the_user(tmp_path: Path) -> None:
    names = captions_schema([pa.field("alt", pa.string())], fields(tmp_path)).names
    assert names[names.index("candidates") + 1] == "caption_details"
    assert names[-3:] == ["tags_details", "alt", "run_id"]


def test_tokens_and_answers_that_were_cut_or_are_null_are_counted(tmp_path: Path) -> None:
    answers = [one for one in fields(tmp_path) if one.name.startswith(("caption", "is_photo"))]
    cut, whole = ({"num_tokens": num, "finish_reason": reason} for num, reason in [(5, "length"), (2, "stop")])
    rows = pa.table(
        {
            "caption": ["a", "b"],
            "num_tokens": pa.array([3, 4], pa.int32()),
            "finish_reason": ["stop", "stop"],
            "is_photo": ["yes", None],
            "is_photo_details": [whole, cut],
        }
    )
    assert num_tokens(rows, answers) == 14
    counts = {"caption": {"cut": 0, "null": 0}, "is_photo": {"cut": 1, "null": 1}}
    assert answer_counts(rows, ["caption", "is_photo"], answers) == counts
    assert answer_counts(rows, [], []) == {}
