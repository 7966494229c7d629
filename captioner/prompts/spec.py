"""One named prompt, checked."""

import json
from dataclasses import dataclass
from typing import Any, NamedTuple

from captioner.config import DecodingConfig
from captioner.prompts.answer_columns import answer_type
from captioner.prompts.json_column import parse_answer
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
        """Everything that decides on its answers, beside the model and the image, as JSON has it.

        Left out is what says nothing: defaults of the decoding, what was not given. The constraint is JSON in the order
        of the file, which is that of the answer's keys."""
        texts = [[one.text.text, one.weight] for one in self.texts]
        changed = {name: value for name, value in vars(self.decoding).items() if value != getattr(DecodingConfig, name)}
        stop = {"stop": list(self.decoding.stop)} if self.decoding.stop else {}
        return {
            **({"text": texts[0][0]} if len(texts) == 1 else {"texts": texts}),
            **({"system": self.system.text} if self.system else {}),
            "decoding": changed | stop,
            **({"max_value_tokens": self.max_value_tokens} if self.columns else {}),
            **({"constraint": json.dumps(self.constraint)} if self.constraint else {}),
        }

    def value(self, text: str, *, is_whole: bool) -> Any:
        """Return an answer as a value of its column; None where it is not whole, as `Constraint.is_whole` says."""
        if not is_whole:
            return None
        is_json = self.constraint is not None and "json_schema" in self.constraint
        return parse_answer(text, answer_type(self.constraint)) if is_json else text
