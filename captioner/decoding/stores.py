"""Keys and values of all slots, in two stores, under one rule of addresses.

    column c of slot s   is   prefixes[prefix_of[s], c]        if c < prefix_len[s]
                              own[s, c - prefix_len[s]]        else

A token row is a (slot, column): its key and value are written there, and it reads columns 0 to c. Rows of an image, of
the prompt after it and of a caption differ in nothing else. A fork is one number, `prefix_of`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from captioner.decoding.layout import SlotLayout


@dataclass(frozen=True, slots=True)
class Stores:
    """L layers, M images, K kv heads, d head width; N = slots + 1: the last is spare, and idle rows write there."""

    prefixes: Tensor
    """float[L, 2, M, K, columns, d]; without columns where slots hold everything."""

    own: Tensor
    """float[L, 2, N, K, columns, d]"""

    prefix_of: Tensor
    """int64[N]"""

    prefix_len: Tensor
    """int64[N]"""

    @classmethod
    def allocate(cls, config: LlamaConfig, layout: SlotLayout, *, like: Tensor) -> "Stores":
        """Return zeroed stores on the device of `like`: a masked column still meets the softmax's 0, and must not be
        NaN."""
        slots = torch.zeros(layout.num_slots + 1, dtype=torch.int64, device=like.device)
        shape = config.num_hidden_layers, 2
        return cls(
            like.new_zeros(*shape, layout.num_prefixes, kv_heads(config), layout.prefix_columns, head_dim(config)),
            like.new_zeros(*shape, len(slots), kv_heads(config), layout.own_columns, head_dim(config)),
            slots,
            slots.clone(),
        )

    @property
    def has_prefixes(self) -> bool:
        """Whether there is a prefix store."""
        return self.prefixes.numel() > 0

    def share(self, llama: LlamaForCausalLM, prompt: Tensor) -> None:
        """Write the keys and values of a prompt, float[S, D], into the first columns of every image, or slot."""
        length, store = len(prompt), self.prefixes if self.has_prefixes else self.own
        even = torch.cat([prompt, prompt[-1:]])[: length + length % 2]  # odd numbers round by memory alignment
        output = llama.model(inputs_embeds=even[None].to(store), use_cache=True)
        for kv, layer in zip(store, output.past_key_values.layers, strict=True):
            kv[0, :, :, :length] = layer.keys[:, :, :length]
            kv[1, :, :, :length] = layer.values[:, :, :length]

    def copy_own(self, sources: Tensor, targets: Tensor, columns: slice) -> None:
        """Copy own columns from slots `sources` to slots `targets`, int64 on the device."""
        self.own[:, :, targets, :, columns] = self.own[:, :, sources, :, columns]


def kv_heads(config: LlamaConfig) -> int:
    """Return the number of kv heads."""
    return config.num_key_value_heads or config.num_attention_heads


def head_dim(config: LlamaConfig) -> int:
    """Return the width of one attention head."""
    width: int | None = getattr(config, "head_dim", None)
    return width or config.hidden_size // config.num_attention_heads
