"""The slots' keys and values, and the attention that reads them from inside an unmodified `LlamaForCausalLM`.

Knows nothing of requests, tokens or sampling. One forward carries two kinds of token rows, side by side:

    decode rows   one a slot: its newest token (or, in a fresh slot, the last token of its image prefix). Only these
                  are read by the language-model head.
    prompt rows   what comes before that last token in fresh slots; none at all with one image token.

Every slot holds the shared prefix in its first columns, so one attention over the slot's own columns is all a decode
row needs. transformers calls `attend_to_slots` through its public `AttentionInterface`; the rest of the forward
(projections, RoPE and its scalings, MLP, norms) is transformers' own.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM

ATTENTION_NAME = "captioner_slots"


@dataclass(frozen=True, slots=True)
class PromptRows:
    """F fresh slots (or groups of `width` slots that share one prefix), P - 1 prompt rows each."""

    slots: Tensor
    """int64[F, width]: the slots that receive these keys and values."""

    columns: Tensor
    """int64[P - 1]: where in the slots."""

    mask: Tensor
    """float[P - 1 made even, S + P - 1]: 0 where a prompt row may look, else -inf."""


@dataclass(frozen=True, slots=True)
class SlotView:
    """What one forward reads and writes: R decode rows first, then the prompt rows."""

    kv: Tensor
    """float[layers, 2, slots, kv_heads, columns, head_dim]"""

    rows: Tensor
    """int64[R]: 0 to R - 1."""

    columns: Tensor
    """int64[R]: decode row r is slot r, and writes its key and value here."""

    mask: Tensor
    """float[R, 1, 1, W]: 0 where a decode row may look, else -inf; W columns are read."""

    prompts: PromptRows | None = None


def allocate_slots(config: LlamaConfig, *, slots: int, columns: int, like: Tensor) -> Tensor:
    """Return zeroed keys and values, float[layers, 2, slots, kv_heads, columns, head_dim], on the device of `like`.

    Zeroed, because a masked column still meets the softmax's 0 and must not be NaN."""
    kv_heads = config.num_key_value_heads or config.num_attention_heads
    return like.new_zeros(config.num_hidden_layers, 2, slots, kv_heads, columns, head_dim(config))


def head_dim(config: LlamaConfig) -> int:
    """Return the width of one attention head."""
    width: int | None = getattr(config, "head_dim", None)
    return width or config.hidden_size // config.num_attention_heads


class TransformersLayers:
    """The layers of a LLaMA as transformers runs them."""

    def __init__(self, llama: LlamaForCausalLM) -> None:
        self._llama = llama

    def __call__(self, embeds: Tensor, positions: Tensor, view: SlotView) -> Tensor:
        """Return the last hidden state of the decode rows, float[R, D], and fill the slots of all rows.

        embeds: float[T, D]. positions: int64[T]."""
        with _slot_attention(self._llama):
            states = self._llama.model(
                inputs_embeds=embeds[None], position_ids=positions[None], use_cache=False, slots=view
            ).last_hidden_state
        hidden: Tensor = states[0, : len(view.columns)]
        return hidden


@contextmanager
def _slot_attention(llama: LlamaForCausalLM) -> Iterator[None]:
    """Make the model attend to slots inside the block, and leave it as it was found."""
    config = llama.config
    found = config._attn_implementation
    config._attn_implementation = ATTENTION_NAME
    try:
        yield
    finally:
        config._attn_implementation = found


def attend_to_slots(
    module: Any, query: Tensor, key: Tensor, value: Tensor, _mask: None, *, scaling: float, slots: SlotView, **_: Any
) -> tuple[Tensor, None]:
    """Write the rows' keys and values into their slots and return what the rows attend to.

    query: float[1, H, T, d], key and value: float[1, Hkv, T, d], T = R + F * (P - 1). Returns float[1, T, H, d]."""
    keys, values = slots.kv[module.layer_idx]
    num_decode = len(slots.columns)
    keys[slots.rows, :, slots.columns] = key[0, :, :num_decode].transpose(0, 1)
    values[slots.rows, :, slots.columns] = value[0, :, :num_decode].transpose(0, 1)
    if slots.prompts is None:
        return attend_decode(query[0], keys, values, slots.mask, scaling)[None], None
    q, k, v = (t[0, :, num_decode:] for t in (query, key, value))
    of_prompts = attend_prompts(q, k, v, keys, values, slots.prompts, scaling)  # the decode rows read what it writes
    of_slots = attend_decode(query[0, :, :num_decode], keys, values, slots.mask, scaling)
    return torch.cat([of_slots, of_prompts])[None], None


def attend_decode(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scaling: float) -> Tensor:
    """Return what decode rows read from their slots, float[R, H, d] of float[H, R, d].

    The query heads of one kv head stand where SDPA expects a sequence, so that keys and values are read once and never
    repeated."""
    num_heads, num_rows, width = query.shape
    window = mask.shape[-1]
    grouped = query.transpose(0, 1).reshape(num_rows, keys.shape[1], -1, width)
    attended = _attend(grouped, keys[:num_rows, :, :window], values[:num_rows, :, :window], mask, scaling)
    return attended.reshape(num_rows, num_heads, width)


def attend_prompts(
    query: Tensor, key: Tensor, value: Tensor, keys: Tensor, values: Tensor, prompts: PromptRows, scaling: float
) -> Tensor:
    """Write the prompt rows into their slots and return what they read, float[F * (P-1), H, d].

    query: float[H, F * (P-1), d], key and value: float[Hkv, F * (P-1), d]."""
    query, key, value = (_by_prompt(rows, prompts) for rows in (query, key, value))
    where = (prompts.slots[:, :, None], slice(None), prompts.columns)
    keys[where] = key.transpose(1, 2)[:, None]
    values[where] = value.transpose(1, 2)[:, None]
    first, seen = prompts.slots[:, 0], prompts.mask.shape[-1]
    attended = _attend(query, keys[first, :, :seen], values[first, :, :seen], prompts.mask, scaling)
    return attended.transpose(1, 2).flatten(0, 1)


def _attend(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scaling: float) -> Tensor:
    """float[N, H, rows, d] over float[N, Hkv, W, d] -> float[N, H, rows, d].

    mask: float, broadcast to [N, 1, rows made even, W]. An odd number of query rows is made even: MKL's kernel for the
    odd one rounds by memory alignment, so that the same slot got other last bits in other batches."""
    num_rows = query.shape[2]
    if num_rows % 2:
        query = pad(query, (0, 0, 0, 1))
    attended = scaled_dot_product_attention(
        query, keys, values, attn_mask=mask, scale=scaling, enable_gqa=query.shape[1] != keys.shape[1]
    )
    return attended[:, :, :num_rows]


def _by_prompt(rows: Tensor, prompts: PromptRows) -> Tensor:
    """float[H, F * (P-1), d] -> float[F, H, P-1, d]."""
    return rows.view(len(rows), len(prompts.slots), len(prompts.columns), -1).transpose(0, 1)


AttentionInterface.register(ATTENTION_NAME, attend_to_slots)
