"""LLaMA: `LlamaForCausalLM` (LLaMA 3, 3.1, 3.2, LLaMA 2 as Vicuna, and their fine-tunes), and its entry."""

from dataclasses import dataclass
from typing import Any, ClassVar

from captioner.model.language.language import SHAPING, LanguageConfig, LanguageFamily, Turn, decoder_shapes
from captioner.model.shapes import Shapes

__all__ = ["LLAMA", "LlamaConfig", "llama_shapes"]


@dataclass(frozen=True, kw_only=True)
class LlamaConfig(LanguageConfig):
    """transformers' LlamaConfig."""

    model_type: ClassVar[str] = "llama"
    class_name: ClassVar[str] = "LlamaConfig"


def llama_shapes(config: LanguageConfig) -> Shapes:
    """Return the tensors of LlamaForCausalLM."""
    attention = ("q_proj", "k_proj", "v_proj", "o_proj") if config.attention_bias else ()
    mlp = ("gate_proj", "up_proj", "down_proj") if config.mlp_bias else ()
    return decoder_shapes(config, biased=frozenset({*attention, *mlp}))


_LLAMA_3_TURN = Turn(
    needs="<|start_header_id|>",
    text=(
        "<|begin_of_text|>{system}<|start_header_id|>user<|end_header_id|>\n\n{image}\n{question}<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    ),
    system="<|start_header_id|>system<|end_header_id|>\n\n{system}<|eot_id|>",
)
_VICUNA_TURN = Turn(
    needs="<s>",
    text="<s>{system}USER: {image}\n{question} ASSISTANT:",
    system="{system} ",
    default_system=(
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed,"
        " and polite answers to the user's questions."
    ),
)


def _classes() -> tuple[Any, Any]:
    from transformers import LlamaConfig as Config  # here, not above: a description needs none
    from transformers import LlamaForCausalLM

    return Config, LlamaForCausalLM


LLAMA = LanguageFamily(
    name="LLaMA",
    config=LlamaConfig,
    shaping=SHAPING,
    shapes=llama_shapes,
    classes=_classes,
    turns=(_LLAMA_3_TURN, _VICUNA_TURN),
    end_of_turn=("<|eot_id|>",),
    can_fuse=True,
)
