"""Answers to named prompts as the values of the columns that the prompts add to a table.

Knows answers and the columns' names; no model.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from captioner.caption_columns import Caption
from captioner.captioning.questions import Answer
from captioner.config import DecodingConfig
from captioner.prompts import CAPTION, SCORE_COLUMNS, Prompt, details_name

__all__ = ["answer_values", "caption_details"]


def answer_values(prompts: Sequence[Prompt], rows: Sequence[Mapping[str, Answer]]) -> dict[str, list[Any]]:
    """Return the columns of prompts: name -> a value for each row, null for a row without that answer.

    rows: prompt -> answer of each."""
    values: dict[str, list[Any]] = {}
    for prompt in prompts:
        answers = [of_row.get(prompt.name) for of_row in rows]
        values[details_name(prompt.name)] = [answer and _details(prompt, answer) for answer in answers]
        if prompt.name != CAPTION:
            values[prompt.name] = [answer and _value(prompt, answer) for answer in answers]
    return values


def caption_details(decoding: DecodingConfig, rows: Sequence[Caption | None]) -> dict[str, list[Any]]:
    """Return the details of captions without named prompts, where a table has any: as those of `caption`."""
    if not (decoding.redraw_repetitive or decoding.trim_to_sentence):
        return {}
    answers = [caption and Answer(caption, 0, 0) for caption in rows]
    return {details_name(CAPTION): [answer and _of_question(decoding, answer) for answer in answers]}


def _value(prompt: Prompt, answer: Answer) -> Any:
    return prompt.value(answer.caption.caption, is_whole=answer.caption.is_whole)


def _details(prompt: Prompt, answer: Answer) -> dict[str, Any]:
    question = _of_question(prompt.decoding, answer)
    if prompt.name == CAPTION:
        return question
    candidates = [{"caption": one.caption, **_scores(one)} for one in answer.caption.candidates]
    return _scores(answer.caption) | question | ({"candidates": candidates} if candidates else {})


def _of_question(decoding: DecodingConfig, answer: Answer) -> dict[str, Any]:
    num_tries = max(len(answer.caption.candidates), 1)
    return {
        "text_number": answer.text_number,
        "num_cut_values": answer.num_cut_values,
        **({"num_redraws": num_tries - decoding.num_captions} if decoding.redraw_repetitive else {}),
        **({"is_trimmed": answer.caption.is_trimmed} if decoding.trim_to_sentence else {}),
    }


def _scores(caption: Caption) -> dict[str, Any]:
    return {column.name: column.value(caption) for column in SCORE_COLUMNS}
