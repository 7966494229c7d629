"""The prompt: text with one `{image}`, as token ids before and after it.

Knows a tokenizer and nothing of models. Special tokens are written out in the text; none is ever added.
"""

import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Self

from captioner.errors import BundleError
from captioner.model.tokenizer import Tokenizer

__all__ = ["DEFAULT_TEMPLATE", "IMAGE", "Template", "check_special_tokens"]

DEFAULT_TEMPLATE = "<|begin_of_text|>{image}"
IMAGE = "{image}"
_SPECIAL = re.compile(r"<\|[^|<>\s]+\|>")


@dataclass(frozen=True)
class Template:
    """A prompt, tokenised once; its tokens before the image are the same for all images."""

    text: str
    prefix_ids: tuple[int, ...]
    suffix_ids: tuple[int, ...]

    @classmethod
    def parse(cls, text: str, tokenizer: Tokenizer, image_token: str | None = None) -> Self:
        """Return the template of `text`.

        image_token: where the tokenizer has it, the text is tokenised whole with it in place of the image, as
        transformers' processors do; else the text before and after on their own, as the original LLaVA does.
        Raises BundleError unless it has exactly one `{image}` and every `<|...|>` in it is a token of the tokenizer.
        """
        if text.count(IMAGE) != 1:
            raise BundleError(
                f"the prompt template {text!r} has {text.count(IMAGE)} {IMAGE}; expected exactly one, as in "
                f"{DEFAULT_TEMPLATE!r}"
            )
        vocabulary = tokenizer.get_added_vocab()
        check_special_tokens(text, vocabulary)
        if image_token in vocabulary:
            ids = tokenizer(text.replace(IMAGE, str(image_token)), add_special_tokens=False).input_ids
            found = ids.index(vocabulary[str(image_token)])
            return cls(text, tuple(ids[:found]), tuple(ids[found + 1 :]))
        before, after = text.split(IMAGE)
        return cls(text, _ids(before, tokenizer), _ids(after, tokenizer))

    @property
    def num_tokens(self) -> int:
        """Tokens of the prompt without those of the image."""
        return len(self.prefix_ids) + len(self.suffix_ids)

    def tokens(self, tokenizer: Tokenizer, num_image_tokens: int, *, differs: bool = False) -> list[str]:
        """Return the text of each token, quoted, and `<image>` for all those of the image.

        differs: whether the number is the most of any image."""
        before, after = (
            [repr(tokenizer.text_of(token)) for token in ids] for ids in (self.prefix_ids, self.suffix_ids)
        )
        image = f"<image> x {num_image_tokens:,}" if num_image_tokens > 1 else "<image>"
        image += " at most" * differs
        return [*before, image, *after]


def check_special_tokens(text: str, vocabulary: Collection[str]) -> None:
    """Raise BundleError unless every `<|...|>` in a prompt is one of the tokens that a tokenizer has added."""
    for token in _SPECIAL.findall(text):
        if token not in vocabulary:
            raise BundleError(
                f"the prompt template {text!r} uses {token}, which the tokenizer of the LLaMA does not have; "
                f"it has {', '.join(sorted(vocabulary)[:8]) or 'no special tokens'}"
            )


def _ids(text: str, tokenizer: Tokenizer) -> tuple[int, ...]:
    return tuple(tokenizer(text, add_special_tokens=False).input_ids) if text else ()
