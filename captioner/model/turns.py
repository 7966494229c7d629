"""How a model is asked: where the question, a system text and the image stand in a whole prompt.

Knows text alone. `FittedTurns` is a bundle's; a published checkpoint has its own, in `layouts.prompts`.
"""

from dataclasses import dataclass
from typing import Protocol

from captioner.errors import ConfigError
from captioner.model.template import IMAGE

__all__ = ["QUESTION", "SYSTEM", "FittedTurns", "Turns"]

QUESTION, SYSTEM = "\ue000", "\ue001"
"""Marks for a question and a system text: letters of nobody's, which no template changes."""


class Turns(Protocol):
    """How a model is asked."""

    @property
    def image_token(self) -> str | None:
        """By which the tokenizer knows an image; None where the prompt is tokenised around it."""

    @property
    def system(self) -> str | None:
        """The system text of prompts that have none of their own."""

    def skeleton(self, system: str | None, *, has_image: bool, where: str) -> str:
        """Return the whole prompt, with `QUESTION`, with the system text or its mark, and with `{image}` unless the
        question has it. Raises ConfigError or BundleError, naming `where`, where there is no such prompt."""

    def question_of(self, template: str) -> str:
        """Return the question with `{image}` whose whole prompt is the model's own."""


@dataclass(frozen=True)
class FittedTurns:
    """A question stands right behind the image, or around it, in the template that the projector was fitted with."""

    template: str
    image_token: str | None = None
    system: str | None = None

    def skeleton(self, system: str | None, *, has_image: bool, where: str) -> str:
        """Return the template with the question at the image."""
        if system is not None:
            raise ConfigError(
                f"{where}: system is given, but the model is a bundle, whose template {self.template!r} has no"
                " place for it; expected the text alone, with {image} behind what the model reads first"
            )
        return self.template.replace(IMAGE, QUESTION if has_image else IMAGE + QUESTION)

    def question_of(self, template: str) -> str:
        """Return the image alone: the template is there already."""
        assert template == self.template
        return IMAGE
