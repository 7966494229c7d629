"""The column whose texts a page shows: `caption`, or the answers to another prompt in its place, with their own scores.

Knows the columns of prompts; no page.
"""

import json
from collections.abc import Mapping
from typing import Any

from captioner.caption_columns import CAPTION_COLUMNS
from captioner.errors import ConfigError
from captioner.prompts import CAPTION, details_name
from captioner.tables import CaptionTable

__all__ = ["answer_text", "check_is_prompt", "with_texts_of"]

_SCORES = [column.name for column in CAPTION_COLUMNS if column.name != CAPTION]


def check_is_prompt(column: str, table: CaptionTable) -> None:
    """Raise ConfigError for a column that holds no answers of this table."""
    names = {field.name for field in table.answers()}
    prompts = [CAPTION, *sorted(name for name in names if details_name(name) in names)]
    if column not in prompts:
        raise ConfigError(
            f"--caption-column is {column}; expected a prompt that {table.location} answers: {', '.join(prompts)}."
            " To get another one, add it to the file --prompts of its caption job"
        )


def with_texts_of(column: str, row: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a row with the answer in `column` in place of its caption, None where it has none."""
    if column == CAPTION:
        return row
    details = row.get(details_name(column)) or {}
    value = row.get(column)
    own = (*_SCORES, "candidates")  # of an answer, as `caption` has them
    named = {name: detail for name, detail in details.items() if name not in own}
    return {
        **{name: found for name, found in row.items() if name not in (column, details_name(CAPTION))},
        **{name: details.get(name) for name in own},
        CAPTION: None if value is None else answer_text(value),
        details_name(column): named or None,
    }


def answer_text(value: Any) -> str:
    """Return an answer as a text: as it is, or JSON."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
