"""One named prompt, checked."""

from dataclasses import dataclass
from typing import Any, NamedTuple

from captioner.config import DecodingConfig
from captioner.prompts.text import PromptText

__all__ = ["Prompt", "WeightedText"]


class WeightedText(NamedTuple):
    """One of the texts of a prompt, of which each image gets one."""

    text: PromptText
    weight: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """What is asked of each image under one name, and how the answer is decoded."""

    name: str
    """Column of the table that holds the answers."""

    texts: tuple[WeightedText, ...]
    """One, or several to draw from."""

    system: PromptText | None = None
    """System text before it; None for that of the job."""

    decoding: DecodingConfig
    """The job's, with what the prompt changes of it."""

    max_value_tokens: int = 256
    """A value of a column is cut at so many tokens."""

    constraint: dict[str, Any] | None = None
    """`{"choice": [...]}`, `{"regex": "..."}` or `{"json_schema": {...}}`: what every answer is one of; None for free
    text."""

    @property
    def columns(self) -> frozenset[str]:
        """Names of the input's columns that it asks for."""
        texts = [one.text for one in self.texts] + ([self.system] if self.system else [])
        return frozenset().union(*(text.columns for text in texts))

    @property
    def identity(self) -> dict[str, Any]:
        """Everything that decides on its answers, beside the model and the image."""
        return {
            "texts": [[one.text.text, one.weight] for one in self.texts],
            "system": self.system and self.system.text,
            "decoding": {**vars(self.decoding), "stop": list(self.decoding.stop)},
            "max_value_tokens": self.max_value_tokens,
            "constraint": self.constraint,
        }
