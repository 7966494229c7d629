"""The prompt: text with one `{image}`, as token ids before and after it.

Knows a tokenizer and nothing of models. Special tokens are written out in the text; none is ever added.
"""

import re
from dataclasses import dataclass
from typing import Self

from transformers import PreTrainedTokenizerFast

from captioner.errors import BundleError

__all__ = ["DEFAULT_TEMPLATE", "Template"]

DEFAULT_TEMPLATE = "<|begin_of_text|>{image}"
_IMAGE = "{image}"
_SPECIAL = re.compile(r"<\|[^|<>\s]+\|>")


@dataclass(frozen=True)
class Template:
    """A prompt, tokenised once: what stands before the image is shared by all images."""

    text: str
    prefix_ids: tuple[int, ...]
    suffix_ids: tuple[int, ...]

    @classmethod
    def parse(cls, text: str, tokenizer: PreTrainedTokenizerFast) -> Self:
        """Return the template of `text`.

        Raises BundleError unless it has exactly one `{image}` and every `<|...|>` in it is a token of the tokenizer.
        """
        if text.count(_IMAGE) != 1:
            raise BundleError(
                f"the prompt template {text!r} has {text.count(_IMAGE)} {_IMAGE}; expected exactly one, as in "
                f"{DEFAULT_TEMPLATE!r}"
            )
        vocabulary = tokenizer.get_added_vocab()
        for token in _SPECIAL.findall(text):
            if token not in vocabulary:
                raise BundleError(
                    f"the prompt template {text!r} uses {token}, which the tokenizer of the LLaMA does not have; "
                    f"it has {', '.join(sorted(vocabulary)[:8]) or 'no special tokens'}"
                )
        before, after = text.split(_IMAGE)
        return cls(text, _ids(before, tokenizer), _ids(after, tokenizer))

    @property
    def num_tokens(self) -> int:
        """Tokens of the prompt without those of the image."""
        return len(self.prefix_ids) + len(self.suffix_ids)


def _ids(text: str, tokenizer: PreTrainedTokenizerFast) -> tuple[int, ...]:
    return tuple(tokenizer(text, add_special_tokens=False).input_ids) if text else ()
