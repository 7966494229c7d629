"""Options by their names, as Python gives them: `num_beams=3`, put into the configs that have such a field."""

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any

from captioner.errors import ConfigError

__all__ = ["with_options"]


def with_options(options: Mapping[str, Any], *configs: Any) -> list[Any]:
    """Return the configs with these options set, each in the first config that has it.

    Raises ConfigError for an option that none has, naming the nearest."""
    known: dict[str, int] = {}
    for place, config in enumerate(configs):
        for field in dataclasses.fields(config):
            known.setdefault(field.name, place)
    for name in options:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]}?" if close else f"expected one of {', '.join(sorted(known))}"
            raise ConfigError(f"{name} is no option of captioning; {hint}")
    chosen: list[dict[str, Any]] = [{} for _ in configs]
    for name, value in options.items():
        chosen[known[name]][name] = value
    return [dataclasses.replace(config, **own) for config, own in zip(configs, chosen, strict=True)]
