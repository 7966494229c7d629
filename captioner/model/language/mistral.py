"""Mistral: `MistralForCausalLM`, and its entry. Its sliding window bounds the context."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

from captioner.model.language.language import SHAPING, LanguageConfig, LanguageFamily, Turn, decoder_shapes, read_window

__all__ = ["MISTRAL", "MistralConfig"]


@dataclass(frozen=True, kw_only=True)
class MistralConfig(LanguageConfig):
    """transformers' MistralConfig."""

    model_type: ClassVar[str] = "mistral"
    class_name: ClassVar[str] = "MistralConfig"
    unchecked: ClassVar[tuple[str, ...]] = (*LanguageConfig.unchecked, "sliding_window")
    intermediate_size: int = 14336
    num_key_value_heads: int = 8
    max_position_embeddings: int = 131072
    sliding_window: int | None = 4096
    """Tokens that one reads, itself included; None for all."""

    @classmethod
    def read(cls, raw: Mapping[str, Any], *, where: str) -> Self:
        """Return the config of a Mistral. Raises BundleError for a value that cannot be."""
        return replace(super().read(raw, where=where), sliding_window=read_window(cls, raw, where))

    @property
    def context_length(self) -> int:
        """The sliding window where there is one: up to its length every token reads all before it, as the KV cache
        has it. A longer prompt is refused as one longer than the context."""
        return min(self.max_position_embeddings, self.sliding_window or self.max_position_embeddings)


def _classes() -> tuple[Any, Any]:
    from transformers import MistralConfig as Config  # here, not above: a description needs none
    from transformers import MistralForCausalLM

    return Config, MistralForCausalLM


MISTRAL = LanguageFamily(
    name="Mistral",
    config=MistralConfig,
    shaping=("model_type", *SHAPING),
    shapes=decoder_shapes,
    classes=_classes,
    turns=(Turn(needs="<s>", text="<s>[INST] {system}{image}\n{question} [/INST]", system="{system}\n"),),
    can_fuse=True,
)
