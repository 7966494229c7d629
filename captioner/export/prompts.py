"""The prompt that each run of a table was given, from its record: as the user gave it, else the model's template; of
named prompts the one that the exported text answers."""

from collections.abc import Mapping, Sequence
from typing import Any

from captioner.prompts import CAPTION, PromptText
from captioner.tables import CaptionTable

__all__ = ["prompts_of"]


def prompts_of(table: CaptionTable, columns: Sequence[str]) -> dict[str, str]:
    """Return run -> prompt; a run whose record does not say it, or cannot be read, or whose images were asked
    different texts, is left out.

    columns: of the exported text; the first one that is an answer says which prompt, by default `caption`."""
    named = (table.identity() or {}).get("prompts", {})
    answered = next((column for column in columns if column in {CAPTION, *named}), CAPTION)
    if answered in named:
        text = _constant_text(named[answered])
        return dict.fromkeys(sorted(table.run_ids()), text) if text else {}
    found = {run_id: _prompt(table.recorded(run_id)) for run_id in sorted(table.run_ids())}
    return {run_id: prompt for run_id, prompt in found.items() if prompt}


def _constant_text(asked: Any) -> str:
    """Return the text of a named prompt that every image is asked; empty where it differs from image to image."""
    text = _text(asked, "text")
    is_constant = "max_value_tokens" not in (asked or {})  # which only prompts with columns have
    pieces = PromptText.parse(text, CAPTION).fill({}) if is_constant else []
    return "".join("{image}" if piece.is_image else piece.text for piece in pieces)


def _prompt(record: Mapping[str, Any]) -> str:
    config = record.get("config")
    given = _text(config.get("model") if isinstance(config, Mapping) else None, "prompt")
    return given or _text(record.get("model"), "template")


def _text(values: Any, name: str) -> str:
    found = values.get(name) if isinstance(values, Mapping) else None
    return found if isinstance(found, str) else ""
