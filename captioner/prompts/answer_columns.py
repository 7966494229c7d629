"""The columns that named prompts add to a caption table. They follow from the table's identity alone.

    tags           string, or what a flat JSON schema says; null where a constrained answer is not whole
    tags_details   struct of num_tokens, finish_reason, mean_logprob, ..., text_number, num_cut_values

The prompt `caption` fills the columns that every table has, and adds `caption_details` alone. A table without named
prompts is one of the prompt `caption` where its decoding has something to say in details: how often a caption was drawn
again, and whether it was trimmed. Knows Arrow types and what an identity says of a prompt; no answers.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from captioner.caption_columns import CAPTION_COLUMNS
from captioner.prompts.json_column import column_type
from captioner.schema import FinishReason

__all__ = [
    "CAPTION",
    "SCORE_COLUMNS",
    "answer_counts",
    "answer_fields",
    "answer_type",
    "answered_prompts",
    "details_name",
    "is_prompt_name",
    "num_tokens",
]

CAPTION = "caption"
"""The prompt that fills the column which galleries show and `evaluate` measures."""

SCORE_COLUMNS = [column for column in CAPTION_COLUMNS if column.name not in ("caption", "clip_score")]
"""What the details of an answer say beside its text; CLIPScore is of the caption alone."""

_NAME = re.compile(r"[a-z][a-z0-9_]{0,62}")
_SCORES = [pa.field(column.name, column.type) for column in SCORE_COLUMNS]
_OF_QUESTION = [pa.field("text_number", pa.int32()), pa.field("num_cut_values", pa.int32())]
_OF_DECODING = {
    "redraw_repetitive": pa.field("num_redraws", pa.int32()),
    "trim_to_sentence": pa.field("is_trimmed", pa.bool_()),
}
"""Details that there are where a setting of the decoding is on."""

_CANDIDATES = pa.field("candidates", pa.list_(pa.struct([pa.field("caption", pa.string()), *_SCORES])))


def is_prompt_name(name: str) -> bool:
    """Return whether a prompt may have this name, as far as its letters go."""
    return _NAME.fullmatch(name) is not None and not name.endswith(details_name(""))


def details_name(prompt: str) -> str:
    """Return the name of the column that says how an answer came about."""
    return f"{prompt}_details"


def answer_type(constraint: Mapping[str, Any] | None) -> pa.DataType:
    """Return the type of a prompt's answers."""
    return column_type(constraint["json_schema"]) if constraint and "json_schema" in constraint else pa.string()


def answered_prompts(identity: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Return the prompts whose columns a table has: name -> `Prompt.identity`. identity: of the table."""
    decoding = identity.get("decoding", {})
    has_details = any(decoding.get(name) for name in _OF_DECODING)
    named: Mapping[str, Mapping[str, Any]] = identity.get("prompts", {})
    return ({CAPTION: {"decoding": decoding}} if has_details and CAPTION not in named else {}) | dict(named)


def answer_fields(prompts: Mapping[str, Mapping[str, Any]]) -> list[pa.Field]:
    """Return the columns of prompts, by name. prompts: as `answered_prompts` returns them."""
    return [field for name in sorted(prompts) for field in _fields(name, prompts[name])]


def _fields(name: str, identity: Mapping[str, Any]) -> list[pa.Field]:
    decoding = identity.get("decoding", {})
    told = [*_OF_QUESTION, *(field for setting, field in _OF_DECODING.items() if decoding.get(setting))]
    if name == CAPTION:
        return [pa.field(details_name(name), pa.struct(told), nullable=False)]
    constraint = identity.get("constraint")
    has_candidates = decoding.get("num_captions", 1) > 1 or decoding.get("redraw_repetitive", 0) > 0
    details = pa.struct([*_SCORES, *told, *([_CANDIDATES] if has_candidates else [])])
    return [
        pa.field(name, answer_type(json.loads(constraint) if constraint else None), nullable=bool(constraint)),
        pa.field(details_name(name), details, nullable=False),
    ]


def num_tokens(captions: pa.Table, answers: Sequence[pa.Field]) -> int:
    """Return the tokens of all answers in rows of a table."""
    columns = [captions.column("num_tokens"), *(_details(captions, name, "num_tokens") for name in _names(answers))]
    return sum(pc.sum(column).as_py() or 0 for column in columns)


def answer_counts(captions: pa.Table, prompts: Sequence[str], answers: Sequence[pa.Field]) -> dict[str, dict[str, int]]:
    """Return, for each prompt of rows of a table, how many answers were `cut` at their length, how many are `null`, and
    where the decoding may do so, how many were `redrawn` and `trimmed`."""
    own = {CAPTION: captions.column("finish_reason")} if CAPTION in prompts else {}
    reasons = own | {name: _details(captions, name, "finish_reason") for name in _names(answers)}
    return {
        name: {
            "cut": _count(pc.equal(found, pa.scalar(str(FinishReason.LENGTH)))),
            "null": captions.column(name).null_count,
            **_ending_counts(captions, name, answers),
        }
        for name, found in reasons.items()
    }


def _ending_counts(captions: pa.Table, prompt: str, answers: Sequence[pa.Field]) -> dict[str, int]:
    told = {field.name for field in next((one.type for one in answers if one.name == details_name(prompt)), [])}
    counts = {}
    if "num_redraws" in told:
        counts["redrawn"] = _count(pc.greater(_details(captions, prompt, "num_redraws"), 0))
    if "is_trimmed" in told:
        counts["trimmed"] = _count(_details(captions, prompt, "is_trimmed"))
    return counts


def _count(facts: pa.ChunkedArray) -> int:
    """Return how many are true."""
    return pc.sum(facts).as_py() or 0


def _names(answers: Sequence[pa.Field]) -> list[str]:
    """Return the prompts whose answers are columns of their own."""
    return [field.name for field in answers if not field.name.endswith(details_name(""))]


def _details(captions: pa.Table, prompt: str, name: str) -> pa.ChunkedArray:
    return pc.struct_field(captions.column(details_name(prompt)), name)
