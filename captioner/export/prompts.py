"""The prompt that each run of a table was given, from its record: as the user gave it, else the model's template."""

from collections.abc import Mapping
from typing import Any

from captioner.tables import CaptionTable

__all__ = ["prompts_of"]


def prompts_of(table: CaptionTable) -> dict[str, str]:
    """Return run -> prompt; a run whose record does not say it, or cannot be read, is left out."""
    found = {run_id: _prompt(table.recorded(run_id)) for run_id in sorted(table.run_ids())}
    return {run_id: prompt for run_id, prompt in found.items() if prompt}


def _prompt(record: Mapping[str, Any]) -> str:
    config = record.get("config")
    given = _text(config.get("model") if isinstance(config, Mapping) else None, "prompt")
    return given or _text(record.get("model"), "template")


def _text(values: Any, name: str) -> str:
    found = values.get(name) if isinstance(values, Mapping) else None
    return found if isinstance(found, str) else ""
