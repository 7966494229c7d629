"""What named prompts ask about an image, for one model: tokens before and after it, drawn texts, seeds.

Knows prompts and tokens; no tensors and no engine.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import NamedTuple

from captioner.caption_columns import Caption
from captioner.captioning.seeds import image_seed
from captioner.errors import ConfigError
from captioner.model.prompt_writer import PromptTokens, PromptWriter
from captioner.prompts import CAPTION, Prompt, weighted_choice

__all__ = ["Answer", "Question", "Questions", "check_prompts"]


@dataclass(frozen=True)
class Answer:
    """What a model says to one prompt about an image."""

    caption: Caption
    text_number: int
    """Which of the prompt's texts was asked."""

    num_cut_values: int
    """Values of columns that were cut to `max_value_tokens`."""


class Question(NamedTuple):
    """One prompt for one image."""

    prompt: Prompt
    text_number: int
    tokens: PromptTokens
    seed: int
    """Of its draws: a function of the job's seed, the image and the prompt's name."""


class Questions:
    """The prompts that are decoded by one engine."""

    def __init__(self, prompts: Sequence[Prompt], writer: PromptWriter, start: tuple[int, ...]) -> None:
        """start: the tokens with which all prompts begin."""
        self.prompts = prompts
        self.start = start
        self._writer = writer
        most = [writer.most_tokens(prompt) for prompt in prompts]
        self.most_before = max(before for before, _ in most) - len(start)
        """Most tokens between the start and an image."""

        self.most_after = max(after for _, after in most)
        """Most tokens after an image."""

    def about(self, image_id: str, values: Mapping[str, object], asked: Collection[str]) -> list[Question]:
        """Return what each prompt of these names asks about an image. values: of its columns."""
        return [self._question(prompt, image_id, values) for prompt in self.prompts if prompt.name in asked]

    def _question(self, prompt: Prompt, image_id: str, values: Mapping[str, object]) -> Question:
        seed = prompt.decoding.seed
        weights = [one.weight for one in prompt.texts]
        number = weighted_choice(weights, seed, image_id, prompt.name) if len(weights) > 1 else 0
        tokens = self._writer.tokens(prompt, number, values)
        drawn = image_id if prompt.name == CAPTION else f"{prompt.name}\0{image_id}"
        return Question(prompt, number, tokens, image_seed(seed, drawn))


def common_start(prompts: Sequence[Prompt], writer: PromptWriter) -> tuple[int, ...]:
    """Return the tokens before the image with which every prompt begins, whatever the image."""
    starts = [start for prompt in prompts for start in writer.starts(prompt)]
    columns = takewhile(lambda tokens: len(set(tokens)) == 1, zip(*starts, strict=False))
    return tuple(tokens[0] for tokens in columns)


def check_prompts(
    prompts: Sequence[Prompt], writer: PromptWriter, *, num_image_tokens: int, context_length: int
) -> None:
    """Raise ConfigError unless the model can be given each prompt, and holds it with its longest answer."""
    for prompt in prompts:
        before, after = writer.most_tokens(prompt)
        needed = before + num_image_tokens + after + prompt.decoding.max_new_tokens
        if needed > context_length:
            values = f" with values of {prompt.max_value_tokens}" if prompt.columns else ""
            raise ConfigError(
                f"the prompt {prompt.name} takes {before + after} tokens{values}, an image {num_image_tokens} and its "
                f"answer {prompt.decoding.max_new_tokens}, {needed} together; the model reads {context_length}:"
                f" expected fewer in the prompt, max_value_tokens or max_new_tokens, by {needed - context_length}"
            )
