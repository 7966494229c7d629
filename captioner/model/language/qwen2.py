"""Qwen2 and Qwen2.5: `Qwen2ForCausalLM`, and its entry. Its q, k and v have biases."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Self

from captioner.model.language.language import SHAPING, LanguageConfig, LanguageFamily, Turn, decoder_shapes, read_window

__all__ = ["QWEN2", "Qwen2Config"]


@dataclass(frozen=True, kw_only=True)
class Qwen2Config(LanguageConfig):
    """transformers' Qwen2Config."""

    model_type: ClassVar[str] = "qwen2"
    class_name: ClassVar[str] = "Qwen2Config"
    unchecked: ClassVar[tuple[str, ...]] = (*LanguageConfig.unchecked, "sliding_window")
    vocab_size: int = 151936
    intermediate_size: int = 22016
    num_key_value_heads: int = 32
    max_position_embeddings: int = 32768

    sliding_window: int | None = None
    """Tokens that one of the later layers reads, itself included; None, unless `use_sliding_window` is true."""

    @classmethod
    def read(cls, raw: Mapping[str, Any], *, where: str) -> Self:
        """Return the config of a Qwen2. Raises BundleError for a value that cannot be."""
        window = read_window(cls, {"sliding_window": 4096, **raw}, where) if raw.get("use_sliding_window") else None
        return replace(super().read(raw, where=where), sliding_window=window)

    @property
    def context_length(self) -> int:
        """The sliding window where there is one, as for Mistral."""
        return min(self.max_position_embeddings, self.sliding_window or self.max_position_embeddings)


def _classes() -> tuple[Any, Any]:
    from transformers import Qwen2Config as Config  # here, not above: a description needs none
    from transformers import Qwen2ForCausalLM

    return Config, Qwen2ForCausalLM


QWEN2 = LanguageFamily(
    name="Qwen2",
    config=Qwen2Config,
    shaping=("model_type", *SHAPING),
    shapes=partial(decoder_shapes, biased=frozenset({"q_proj", "k_proj", "v_proj"})),
    classes=_classes,
    turns=(
        Turn(
            needs="<|im_start|>",
            text="{system}<|im_start|>user\n{image}\n{question}<|im_end|>\n<|im_start|>assistant\n",
            system="<|im_start|>system\n{system}<|im_end|>\n",
            default_system="You are a helpful assistant.",
        ),
    ),
    end_of_turn=("<|im_end|>",),
    can_fuse=True,
)
