"""Named prompts: what `--prompts FILE` says, the texts that it holds, and what a text becomes for one image.

Knows YAML, texts and the values of an image's columns; no tokens, models, images or tables.
"""

from captioner.prompts.answer_columns import (
    CAPTION,
    SCORE_COLUMNS,
    answer_counts,
    answer_fields,
    answer_type,
    answered_prompts,
    details_name,
    is_prompt_name,
    num_tokens,
)
from captioner.prompts.json_column import column_type, parse_answer
from captioner.prompts.prompts_file import read_prompts
from captioner.prompts.spec import Prompt, WeightedText
from captioner.prompts.text import PromptText, Segment
from captioner.prompts.weighted_choice import weighted_choice

__all__ = [
    "CAPTION",
    "SCORE_COLUMNS",
    "Prompt",
    "PromptText",
    "Segment",
    "WeightedText",
    "answer_counts",
    "answer_fields",
    "answer_type",
    "answered_prompts",
    "column_type",
    "details_name",
    "is_prompt_name",
    "num_tokens",
    "parse_answer",
    "read_prompts",
    "weighted_choice",
]
