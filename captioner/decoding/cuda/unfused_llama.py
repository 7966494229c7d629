"""A language model's layers as transformers runs them, with attention over the stores that a card can record.

For families whose products cannot be joined. Letters as in `captioner.decoding.cuda.operations`.
"""

from typing import Any

from torch import Tensor
from transformers import AttentionInterface, LlamaForCausalLM

from captioner.decoding.cuda.operations import Operations, write_rows
from captioner.decoding.layout import PROMPT_TILES
from captioner.decoding.shared_layers import layers_with_attention
from captioner.decoding.view import StepView

__all__ = ["UnfusedLlama"]

ATTENTION_NAME = "captioner_recorded_slots"


class UnfusedLlama:
    """The layers, from embeddings to the hidden states that the head reads."""

    blocks = PROMPT_TILES

    def __init__(self, llama: LlamaForCausalLM, operations: Operations) -> None:
        self._layers = layers_with_attention(llama, ATTENTION_NAME)
        self._operations = operations

    def __call__(self, embeds: Tensor, positions: Tensor, view: StepView, /) -> Tensor:
        """Return the last hidden state of the decode rows, float[R, D], and write all rows to the stores."""
        states = self._layers(
            inputs_embeds=embeds[None],
            position_ids=positions[None],
            use_cache=False,
            slots=(self._operations, view),
        ).last_hidden_state
        hidden: Tensor = states[0, : view.num_rows]
        return hidden


def _attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    _mask: None,
    *,
    scaling: float,
    slots: tuple[Operations, StepView],
    **_: Any,
) -> tuple[Tensor, None]:
    """query: float[1, H, T, d], key and value: float[1, K, T, d]. Returns float[1, T, H, d]."""
    operations, view = slots
    write_rows(key[0].transpose(0, 1), value[0].transpose(0, 1), view, module.layer_idx)
    queries = query[0].transpose(0, 1).contiguous()
    return operations.attend(queries, view, module.layer_idx, scaling)[None], None


AttentionInterface.register(ATTENTION_NAME, _attend)
