"""A language model's layers with an attention of their own, beside the model that they belong to."""

import copy
from typing import Any

from transformers import LlamaForCausalLM


def layers_with_attention(llama: LlamaForCausalLM, name: str) -> Any:
    """Return the layers with an attention that is registered by `name`.

    They are copies that share the model's parameters and have a config of their own, so that the model itself keeps
    its own attention."""
    shared = (*llama.model.parameters(), *llama.model.buffers())
    layers = copy.deepcopy(llama.model, {id(tensor): tensor for tensor in shared})
    layers.set_attn_implementation(name)
    return layers
