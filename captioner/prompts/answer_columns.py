"""The columns that named prompts add to a caption table. They follow from the table's identity alone.

    tags           string, or what a flat JSON schema says; null where a constrained answer is not whole
    tags_details   struct of num_tokens, finish_reason, mean_logprob, ..., text_number, num_cut_values

The prompt `caption` fills the columns that every table has, and adds `caption_details` alone. Knows Arrow types and
what an identity says of a prompt; no answers.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from captioner.caption_columns import CAPTION_COLUMNS
from captioner.prompts.json_column import column_type
from captioner.schema import FinishReason

__all__ = ["CAPTION", "SCORE_COLUMNS", "answer_counts", "answer_fields", "answer_type", "details_name", "num_tokens"]

CAPTION = "caption"
"""The prompt that fills the column which galleries show and `evaluate` measures."""

SCORE_COLUMNS = [column for column in CAPTION_COLUMNS if column.name not in ("caption", "clip_score")]
"""What the details of an answer say beside its text; CLIPScore is of the caption alone."""

_SCORES = [pa.field(column.name, column.type) for column in SCORE_COLUMNS]
_OF_QUESTION = [pa.field("text_number", pa.int32()), pa.field("num_cut_values", pa.int32())]
_CANDIDATES = pa.field("candidates", pa.list_(pa.struct([pa.field("caption", pa.string()), *_SCORES])))


def details_name(prompt: str) -> str:
    """Return the name of the column that says how an answer came about."""
    return f"{prompt}_details"


def answer_type(constraint: Mapping[str, Any] | None) -> pa.DataType:
    """Return the type of a prompt's answers."""
    return column_type(constraint["json_schema"]) if constraint and "json_schema" in constraint else pa.string()


def answer_fields(prompts: Mapping[str, Mapping[str, Any]]) -> list[pa.Field]:
    """Return the columns of prompts, by name. prompts: name -> `Prompt.identity`, as a table's identity has them."""
    return [field for name in sorted(prompts) for field in _fields(name, prompts[name])]


def _fields(name: str, identity: Mapping[str, Any]) -> list[pa.Field]:
    if name == CAPTION:
        return [pa.field(details_name(name), pa.struct(_OF_QUESTION), nullable=False)]
    constraint = identity.get("constraint")
    candidates = [_CANDIDATES] if identity.get("decoding", {}).get("num_captions", 1) > 1 else []
    details = pa.struct([*_SCORES, *_OF_QUESTION, *candidates])
    return [
        pa.field(name, answer_type(json.loads(constraint) if constraint else None), nullable=bool(constraint)),
        pa.field(details_name(name), details, nullable=False),
    ]


def num_tokens(captions: pa.Table, answers: Sequence[pa.Field]) -> int:
    """Return the tokens of all answers in rows of a table."""
    columns = [captions.column("num_tokens"), *(_details(captions, name, "num_tokens") for name in _names(answers))]
    return sum(pc.sum(column).as_py() or 0 for column in columns)


def answer_counts(captions: pa.Table, answers: Sequence[pa.Field]) -> dict[str, dict[str, int]]:
    """Return, for each prompt of rows of a table, how many answers were cut at their length, and how many are null."""
    if not answers:
        return {}
    reasons = {name: _details(captions, name, "finish_reason") for name in _names(answers)}
    return {
        name: {
            "cut": pc.sum(pc.equal(found, pa.scalar(str(FinishReason.LENGTH)))).as_py() or 0,
            "null": captions.column(name).null_count,
        }
        for name, found in {CAPTION: captions.column("finish_reason"), **reasons}.items()
    }


def _names(answers: Sequence[pa.Field]) -> list[str]:
    """Return the prompts whose answers are columns of their own."""
    return [field.name for field in answers if not field.name.endswith(details_name(""))]


def _details(captions: pa.Table, prompt: str, name: str) -> pa.ChunkedArray:
    return pc.struct_field(captions.column(details_name(prompt)), name)
