"""Attention over the stores from inside transformers' own LLaMA layers, as a CPU does it best.

Knows nothing of requests, tokens or sampling. One forward carries decode rows and prompt rows side by side; all of a
layer's keys and values are written before any row reads. transformers calls `attend_to_slots` through its public
`AttentionInterface`; the rest of the forward (projections, RoPE and its scalings, MLP, norms) is transformers' own.

Letters: T rows, of which the first R are decode rows; H query heads, K kv heads, G = H / K, d head width.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers import AttentionInterface, LlamaForCausalLM

from captioner.decoding.layout import PromptBlocks
from captioner.decoding.plan import Block, DecodeGroups, Run
from captioner.decoding.shared_layers import layers_with_attention
from captioner.decoding.stores import Stores
from captioner.decoding.view import StepView

ATTENTION_NAME = "captioner_slots"
_BLOCK_ROWS = 64
"""Causal attention of 575 rows takes 56 ms in blocks of 64, 80 ms in one call that knows it is causal, and 92 ms with a
mask over all columns (8 layers of 512, one thread)."""
_STEP_ROWS = 1024
"""Prompt rows of a step: chunks of 512 take 4 % more time, of 256 rows 8 %, of 128 rows 25 %."""


class TransformersLayers:
    """The layers of a LLaMA as transformers runs them, with attention over the stores."""

    blocks = PromptBlocks(num_rows=_BLOCK_ROWS, is_padded=False, most_rows=_STEP_ROWS)

    def __init__(self, llama: LlamaForCausalLM) -> None:
        self._layers = layers_with_attention(llama, ATTENTION_NAME)
        self._triangle = torch.empty(0, 0)

    def __call__(self, embeds: Tensor, positions: Tensor, view: StepView, /) -> Tensor:
        """Return the last hidden state of the decode rows, float[R, D], and write all rows to the stores.

        embeds: float[T, D]. positions: int64[T]."""
        if not len(self._triangle):
            self._triangle = _triangle(view.stores)
        rows = _Rows.of(view, self._triangle)
        states = self._layers(
            inputs_embeds=embeds[None], position_ids=positions[None], use_cache=False, slots=rows
        ).last_hidden_state
        hidden: Tensor = states[0, : view.num_rows]
        return hidden


def _triangle(stores: Stores) -> Tensor:
    """Return float[block, most columns + block]: row i of a block that begins at column c may attend where
    `[i, most columns - c:]` is 0, else -inf. One tensor for blocks at all columns."""
    most = stores.prefixes.shape[-2] + stores.own.shape[-2]
    return torch.full((_BLOCK_ROWS, most + _BLOCK_ROWS), -torch.inf, dtype=stores.own.dtype).triu(most + 1)


@dataclass(frozen=True, slots=True)
class _Rows:
    """What attention needs of a step's rows, the same for all its layers."""

    view: StepView
    mask: Tensor
    """float[R, 1, 1, W]: 0 where a decode row may attend in its own columns, else -inf."""

    triangle: Tensor
    """See `_triangle`."""

    shared: Tensor
    """int64[n]: prompt rows that are written to the prefix store."""

    places: Tensor
    """int64[n]: where."""

    own: Tensor
    """int64[m]: prompt rows that are written to slots."""

    @classmethod
    def of(cls, view: StepView, triangle: Tensor) -> "_Rows":
        stores = view.stores
        columns = torch.arange(view.window)
        mask = torch.where(columns <= view.own_columns[:, None], 0.0, -torch.inf).to(stores.own.dtype)
        readers = view.targets[:, 0]
        is_shared = view.columns[view.num_rows :] < stores.prefix_len[readers]
        shared = is_shared.nonzero()[:, 0]
        return cls(
            view,
            mask[:, None, None],
            triangle,
            shared,
            stores.prefix_of[readers[shared]],
            (~is_shared).nonzero()[:, 0],
        )

    def write(self, key: Tensor, value: Tensor, layer: int) -> None:
        """Write the keys and values of all rows, float[K, T, d]."""
        view, stores = self.view, self.view.stores
        num_rows = view.num_rows
        columns, slots = view.columns[num_rows:], torch.arange(num_rows)
        for part, rows in enumerate((key.transpose(0, 1), value.transpose(0, 1))):
            own = stores.own[layer, part]
            own[slots, :, view.own_columns] = rows[:num_rows]
            if num_rows == len(rows):
                continue
            prompts = rows[num_rows:]
            if len(self.shared):
                stores.prefixes[layer, part][self.places, :, columns[self.shared]] = prompts[self.shared]
            if len(self.own):
                targets = view.targets[self.own]
                at = columns[self.own] - stores.prefix_len[targets[:, 0]]
                own[targets, :, at[:, None]] = prompts[self.own][:, None]


def attend_to_slots(
    module: Any, query: Tensor, key: Tensor, value: Tensor, _mask: None, *, scaling: float, slots: _Rows, **_: Any
) -> tuple[Tensor, None]:
    """Write the keys and values of all rows to the stores and return the attention output of the rows.

    query: float[1, H, T, d], key and value: float[1, K, T, d]. Returns float[1, T, H, d]."""
    view, layer = slots.view, module.layer_idx
    assert view.plan is not None
    slots.write(key[0], value[0], layer)
    of_decode, of_prompts = query[0, :, : view.num_rows], query[0, :, view.num_rows :]
    if view.plan.groups is None:
        keys, values = view.stores.own[layer]
        attended = attend_decode(of_decode, keys, values, slots.mask, scaling)
    else:
        attended = _attend_over_prefixes(of_decode, slots, view.plan.groups, layer, scaling)
    if view.plan.blocks:
        attended = torch.cat([attended, _attend_prompts(of_prompts, slots, view.plan.blocks, layer, scaling)])
    return attended[None], None


def attend_decode(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scaling: float) -> Tensor:
    """Return the attention output of the decode rows over their own columns, float[R, H, d], for query float[H, R, d].

    The query heads of one kv head take the place of SDPA's sequence, so that keys and values are read once and never
    repeated."""
    num_heads, num_rows, width = query.shape
    window = mask.shape[-1]
    grouped = query.transpose(0, 1).reshape(num_rows, keys.shape[1], -1, width)
    attended = _attend(grouped, keys[:num_rows, :, :window], values[:num_rows, :, :window], mask, scaling)
    return attended.reshape(num_rows, num_heads, width)


def _attend_over_prefixes(query: Tensor, rows: _Rows, groups: DecodeGroups, layer: int, scaling: float) -> Tensor:
    """Return the attention output of the decode rows, float[R, H, d], for query float[H, R, d].

    The captions of one image are one product over its columns. Those and a slot's own columns meet in one softmax."""
    num_heads, num_rows, width = query.shape
    stores, window, members = rows.view.stores, rows.mask.shape[-1], groups.members
    keys, values = (part[:num_rows, :, :window] for part in stores.own[layer])
    grouped = query.transpose(0, 1).reshape(num_rows, keys.shape[1], -1, width) * scaling
    own_scores = torch.matmul(grouped, keys.transpose(-1, -2)) + rows.mask
    by_image, own_by_image = (_gather(one, members) for one in (grouped, own_scores))
    own_weights, attended = torch.empty_like(own_by_image), torch.empty_like(by_image)
    for run in groups.runs:
        some = slice(run.first, run.first + run.num_places)
        own_weights[some], attended[some] = _attend_run(by_image[some], own_by_image[some], stores.prefixes[layer], run)
    own_weights, attended = (
        _scatter(one, members, like) for one, like in ((own_weights, own_scores), (attended, grouped))
    )
    return (attended + torch.matmul(own_weights, values)).view(num_rows, num_heads, width)


def _attend_run(query: Tensor, own_scores: Tensor, prefixes: Tensor, run: Run) -> tuple[Tensor, Tensor]:
    """Return the weights of own columns, float[E, K, n, W], and what the images give, float[E, K, n, d].

    query: float[E, K, n, d], scaled. own_scores: float[E, K, n, W]. prefixes: float[2, M, K, columns, d]."""
    keys, values = prefixes[:, run.place : run.place + run.num_places, :, : run.prefix_len]
    scores = torch.matmul(query, keys.transpose(-1, -2))
    weights = torch.softmax(torch.cat([scores, own_scores], -1), -1)
    return weights[..., run.prefix_len :], torch.matmul(weights[..., : run.prefix_len], values)


def _gather(rows: Tensor, members: Tensor) -> Tensor:
    """float[R, K, G, w] -> float[E, K, g * G, w], zeros for idle members. members: int64[E, g]."""
    by_image = torch.cat([rows, rows.new_zeros(1, *rows.shape[1:])])[members]
    return by_image.transpose(1, 2).flatten(2, 3)


def _scatter(by_image: Tensor, members: Tensor, like: Tensor) -> Tensor:
    """float[E, K, g * G, w] -> float[R, K, G, w], the shape of `like`; zeros for rows that are no image's."""
    rows = like.new_zeros(len(like) + 1, *like.shape[1:])
    rows[members] = by_image.view(*by_image.shape[:2], members.shape[1], *like.shape[2:]).transpose(1, 2)
    return rows[:-1]


def _attend_prompts(query: Tensor, rows: _Rows, blocks: list[list[Block]], layer: int, scaling: float) -> Tensor:
    """Return the attention output of the prompt rows, float[T - R, H, d], for query float[H, T - R, d]."""
    num_heads, num_rows, width = query.shape
    attended = query.new_zeros(num_rows, num_heads, width)
    by_row = query.transpose(0, 1)
    for alike in blocks:
        of_blocks = [slice(block.at, block.at + block.num_rows) for block in alike]
        queries = torch.stack([by_row[one] for one in of_blocks]).transpose(1, 2)
        keys, values = _seen_by(alike, rows, layer)
        first, seen = alike[0].first_column, keys.shape[-2]
        most = rows.triangle.shape[1] - _BLOCK_ROWS
        mask = rows.triangle[: round_to_even(alike[0].num_rows), most - first : most - first + seen]
        for one, result in zip(of_blocks, _attend(queries, keys, values, mask, scaling).transpose(1, 2), strict=True):
            attended[one] = result
    return attended


def _seen_by(blocks: list[Block], rows: _Rows, layer: int) -> tuple[Tensor, Tensor]:
    """Return the keys and values that blocks alike may see, each float[blocks, K, columns, d]."""
    one, stores = blocks[0], rows.view.stores
    in_prefix = min(one.first_column + one.num_rows, one.prefix_len)
    in_own = one.first_column + one.num_rows - in_prefix
    if not in_prefix:
        return _parts(stores.own[layer], [block.slot for block in blocks], in_own)
    keys, values = _parts(stores.prefixes[layer], [block.prefix_of for block in blocks], in_prefix)
    if not in_own:
        return keys, values
    own_keys, own_values = _parts(stores.own[layer], [block.slot for block in blocks], in_own)
    return torch.cat([keys, own_keys], -2), torch.cat([values, own_values], -2)


def _parts(store: Tensor, places: list[int], num_columns: int) -> tuple[Tensor, Tensor]:
    """float[2, N, K, columns, d] -> keys and values of some places, without a copy of one."""
    if len(places) == 1:
        keys, values = store[:, places[0] : places[0] + 1, :, :num_columns]
    else:
        keys, values = store[:, places, :, :num_columns]
    return keys, values


def _attend(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scaling: float) -> Tensor:
    """float[N, H, rows, d] over float[N, K, W, d] -> float[N, H, rows, d].

    mask: float, broadcast to [N, 1, rows rounded up to even, W]. An odd number of query rows is padded: MKL's kernel
    for the odd row rounds by memory alignment, so that one slot had different last bits in different batches."""
    num_rows = query.shape[2]
    if num_rows % 2:
        query = pad(query, (0, 0, 0, 1))
    attended = scaled_dot_product_attention(
        query, keys, values, attn_mask=mask, scale=scaling, enable_gqa=query.shape[1] != keys.shape[1]
    )
    return attended[:, :, :num_rows]


def round_to_even(number: int) -> int:
    """Return the number, or the next if it is odd."""
    return number + number % 2


AttentionInterface.register(ATTENTION_NAME, attend_to_slots)
