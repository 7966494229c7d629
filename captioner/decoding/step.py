"""One pass over the weights: what all slots choose next. Knows no requests; the host's only say is `StepShape`.

Everything a step reads and writes lives in fixed buffers on the device and depends on the shape alone, so that a step
can be recorded once a shape (a CUDA graph) and replayed; the one host read is the small tensor that `run` returns. An
idle slot among the first R rows runs along and writes to its own row only, past the shared prefix; what idle prompt
rows write goes to the one row past the last slot.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from captioner.config import DecodingConfig
from captioner.decoding.attention import PromptRows, SlotView, allocate_slots

ROW_BUCKET = 16
WINDOW_BUCKET = 16
_RECORDED_WINDOWS = 8
_MAX_PROMPT_ROWS = 1024
_HEAD_SLICE = 1000
"""Words of a float32 head that a CPU multiplies at once: MKL takes 21.7 ms for 32 rows x 512 x 32,000 in one product
and 17.2 ms in slices of 1,000, to the same bits."""
_NEVER = -1.0e9
Layers = Callable[[Tensor, Tensor, SlotView], Tensor]
"""A LLaMA's layers: embeddings and positions of all rows to the last hidden state of the decode rows, float[R, D]."""


def round_up(number: int, multiple: int) -> int:
    """Return the smallest multiple that is not below the number."""
    return -(-number // multiple) * multiple


def group_size(decoding: DecodingConfig) -> int:
    """Return the slots that one image takes."""
    return decoding.num_captions if decoding.num_beams == 1 else decoding.num_beams


def upload(numbers: Sequence[Any], device: torch.device) -> Tensor:
    """Copy numbers to a device; from pinned memory, so that the host does not wait for what still runs there."""
    host = torch.from_numpy(np.asarray(numbers))
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host.to(device)


@dataclass(frozen=True, kw_only=True)
class SlotLayout:
    """The sizes that an engine's buffers are made to."""

    num_slots: int
    group_size: int
    """Neighbouring slots that share one image: num_beams, or the captions drawn for each image."""

    shared_len: int
    """Tokens S of the prompt before the image, the same for all."""

    prefix_len: int
    """Tokens P of an image's own prefix."""

    max_new_tokens: int
    max_prompts: int
    """Fresh prefixes of more than one token that one step takes in."""

    window_bucket: int = WINDOW_BUCKET
    """What windows are rounded up to."""

    @classmethod
    def of(
        cls, slots: int, decoding: DecodingConfig, *, shared_len: int, prefix_len: int, is_recorded: bool
    ) -> "SlotLayout":
        """Return the layout of an engine. Recorded steps have at most 9 windows, whatever the length of captions: with
        11 numbers of prompts, 99 recordings."""
        a_share = round_up(-(-decoding.max_new_tokens // _RECORDED_WINDOWS), WINDOW_BUCKET)
        return cls(
            num_slots=round_up(slots, ROW_BUCKET),
            group_size=group_size(decoding),
            shared_len=shared_len,
            prefix_len=prefix_len,
            max_new_tokens=decoding.max_new_tokens,
            max_prompts=max(1, min(slots // group_size(decoding), _MAX_PROMPT_ROWS // max(prefix_len - 1, 1))),
            window_bucket=a_share if is_recorded else WINDOW_BUCKET,
        )

    @property
    def first_column(self) -> int:
        """Column of a prefix's last token, with which decoding begins."""
        return self.shared_len + self.prefix_len - 1

    @property
    def num_columns(self) -> int:
        """Columns of a slot, a whole number of windows; the last token generated is never read, so it needs none."""
        return round_up(self.first_column + self.max_new_tokens, self.window_bucket)

    def window(self, num_steps: int) -> int:
        """Columns W that a step reads when its longest caption has `num_steps` tokens."""
        return round_up(self.first_column + num_steps + 1, self.window_bucket)

    def prompt_rows(self, num_fresh: int) -> int:
        """Fresh prefixes F that a step with `num_fresh` of them is shaped for: a power of two, or what there can be."""
        if self.prefix_len == 1 or num_fresh == 0:
            return 0
        return min(1 << (num_fresh - 1).bit_length(), self.max_prompts)

    def full_shapes(self) -> "set[StepShape]":
        """Every shape of a step over all slots."""
        windows = {self.window(num_steps) for num_steps in range(self.max_new_tokens)}
        prompts = {self.prompt_rows(num_fresh) for num_fresh in range(self.max_prompts + 1)}
        return {StepShape(self.num_slots, window, num_prompts) for window in windows for num_prompts in prompts}


class StepShape(NamedTuple):
    """What the work of a step depends on. Each is rounded up, so that few shapes occur."""

    num_rows: int
    """Decode rows R: slots 0 to R - 1."""

    window: int
    """Columns W that decode rows read."""

    num_prompts: int = 0
    """Fresh prefixes F with prompt rows: 0 in most steps, and always when a prefix is one token."""


class SlotBuffers:
    """State of all slots on the device; slot s is row s of every tensor.

    token_ids: int64, the newest token. num_generated: int64, tokens chosen before the step that ran last; -1 makes a
    slot fresh. seeds: int64. last_prefix: float[slots, D], the last token of the image prefix. beam_scores: float32.
    history: int64[slots, max_new_tokens], the tokens chosen before the newest, its unused end filled with the first.
    prompt_embeds: float[F, P-1, D], the other tokens of fresh prefixes, and prompt_slots: int64[F, group], where they
    go."""

    def __init__(self, llama: LlamaForCausalLM, layout: SlotLayout) -> None:
        weight: Tensor = llama.model.embed_tokens.weight.detach()
        width, device = weight.shape[1], weight.device
        slots = layout.num_slots
        self.kv = allocate_slots(llama.config, slots=slots + 1, columns=layout.num_columns, like=weight)
        self.token_ids = torch.zeros(slots, dtype=torch.int64, device=device)
        self.num_generated = torch.zeros_like(self.token_ids)
        self.seeds = torch.zeros_like(self.token_ids)
        self.history = torch.zeros(slots, layout.max_new_tokens, dtype=torch.int64, device=device)
        self.beam_scores = torch.zeros(slots, dtype=torch.float32, device=device)
        self.last_prefix = weight.new_zeros(slots, width)
        self.prompt_embeds = weight.new_zeros(layout.max_prompts, layout.prefix_len - 1, width)
        self.prompt_slots = torch.full((layout.max_prompts, layout.group_size), slots, device=device)
        self.of_a_slot = (
            self.token_ids, self.num_generated, self.seeds, self.history, self.beam_scores, self.last_prefix
        )  # fmt: skip

    def copy(self, sources: Tensor, targets: Tensor, columns: slice, states: Sequence[Tensor]) -> None:
        """Copy columns of the keys and values, and other states, from slots to slots, int64 on the device."""
        self.kv[:, :, targets, :, columns] = self.kv[:, :, sources, :, columns]
        for state in states:
            state[targets] = state[sources]

    def fill(self, groups: Sequence[Sequence[int]], prefixes: Sequence[Tensor], seeds: Sequence[Sequence[int]]) -> None:
        """Make groups of slots fresh, each with one image's prefix, float[P, D], and a seed for each slot."""
        slots, seed = upload([groups, seeds], self.kv.device)
        prefix = torch.stack(list(prefixes)).to(self.last_prefix)
        self.num_generated[slots] = -1
        self.seeds[slots] = seed
        self.beam_scores[slots] = _NEVER
        self.beam_scores[slots[:, 0]] = 0.0
        self.last_prefix[slots] = prefix[:, None, -1]
        if prefix.shape[1] > 1:
            self.prompt_embeds[: len(groups)] = prefix[:, :-1]
            self.prompt_slots.fill_(len(self.token_ids))
            self.prompt_slots[: len(groups)] = slots


class SlotModel:
    """A `LlamaForCausalLM` over slots: buffers in, logits out."""

    def __init__(self, llama: LlamaForCausalLM, layout: SlotLayout, layers: Layers) -> None:
        self.layout = layout
        self.buffers = SlotBuffers(llama, layout)
        self._llama = llama
        self._layers = layers
        device, dtype = self.buffers.kv.device, self.buffers.kv.dtype
        self._rows = torch.arange(layout.num_slots, device=device)
        self._columns = torch.arange(layout.num_columns, device=device)
        self._prompt_columns = self._columns[layout.shared_len : layout.first_column]
        self._hidden = torch.tensor(-torch.inf, dtype=dtype, device=device)
        self._visible = torch.zeros((), dtype=dtype, device=device)
        self._logits = torch.zeros(layout.num_slots, llama.config.vocab_size, dtype=torch.float32, device=device)
        self._slices_head = device.type == "cpu" and dtype == torch.float32
        even = layout.shared_len + round_up(layout.prefix_len - 1, 2)
        self._prompt_mask = self._mask(self._columns[layout.shared_len : even], layout.first_column)

    def share(self, prefix: Tensor) -> None:
        """Let every slot begin with the keys and values of a prompt, float[S, D]."""
        length = len(prefix)
        even = torch.cat([prefix, prefix[-1:]])[: round_up(length, 2)]  # odd ones round by memory alignment
        output = self._llama.model(inputs_embeds=even[None].to(self.buffers.last_prefix), use_cache=True)
        for kv, layer in zip(self.buffers.kv, output.past_key_values.layers, strict=True):
            kv[0, :, :, :length] = layer.keys[:, :, :length]
            kv[1, :, :, :length] = layer.values[:, :, :length]

    def logits(self, shape: StepShape) -> Tensor:
        """Return what decode rows say comes next, float32[R, V], and fill their columns of the cache.

        Idle slots count on too, but stay within their own columns."""
        buffers, num_rows = self.buffers, shape.num_rows
        num_generated = buffers.num_generated[:num_rows].add_(1).clamp_(max=self.layout.max_new_tokens - 1)
        columns = self.layout.first_column + num_generated
        newest = self._llama.model.embed_tokens(buffers.token_ids[:num_rows])
        embeds = torch.where((num_generated == 0)[:, None], buffers.last_prefix[:num_rows], newest)
        positions, prompts = columns, None
        if shape.num_prompts:
            embeds = torch.cat([embeds, buffers.prompt_embeds[: shape.num_prompts].flatten(0, 1)])
            positions = torch.cat([columns, self._prompt_columns.repeat(shape.num_prompts)])
            prompts = PromptRows(buffers.prompt_slots[: shape.num_prompts], self._prompt_columns, self._prompt_mask)
        mask = self._mask(columns, shape.window)[:, None, None]
        view = SlotView(buffers.kv, self._rows[:num_rows], columns, mask, prompts)
        return self._head(self._layers(embeds, positions, view))

    def newest_logits(self, rows: Tensor) -> Tensor:
        """Return what the step that ran last said of some rows, float32[len(rows), V]."""
        return self._logits[rows]

    def remember(self, num_rows: int) -> None:
        """Write what the first R slots chose in the step before into their history, after `logits` has counted on.

        Not when they choose: a draw that is made again must meet the history that it met first."""
        history, newest = self.buffers.history[:num_rows], self.buffers.token_ids[:num_rows, None]
        at = self.buffers.num_generated[:num_rows, None] - 1
        history.copy_(torch.where(at <= 0, newest, history.scatter(1, at.clamp(min=0), newest)))

    def reorder(self, parents: Tensor, slots: Tensor, window: int) -> None:
        """Let slots go on from what their parents have generated, within the window."""
        generated = slice(self.layout.first_column + 1, window)
        self.buffers.copy(parents, slots, generated, (self.buffers.history,))

    def move(self, sources: Tensor, targets: Tensor, window: int) -> None:
        """Move all that slots `sources` hold to slots `targets`, within the window."""
        self.buffers.copy(sources, targets, slice(self.layout.shared_len, window), self.buffers.of_a_slot)

    def _head(self, hidden: Tensor) -> Tensor:
        """float[R, D] -> float32[R, V], in the one buffer that all steps use."""
        head, logits = self._llama.lm_head, self._logits[: len(hidden)]
        if not self._slices_head:
            return logits.copy_(head(hidden))
        for weight, words in zip(
            torch.split(head.weight, _HEAD_SLICE), torch.split(logits, _HEAD_SLICE, 1), strict=True
        ):
            torch.mm(hidden, weight.t(), out=words)
        return logits

    def _mask(self, columns: Tensor, window: int) -> Tensor:
        """float[rows, W]: 0 up to each row's own column, -inf past it."""
        return torch.where(self._columns[:window] <= columns[:, None], self._visible, self._hidden)
