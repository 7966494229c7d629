"""One pass over the weights for all slots: fixed buffers in, logits out. Knows no requests.

A step reads and writes fixed buffers on the device. With padded blocks its work depends on its `StepShape` alone, so
that it can be recorded once for each shape (a CUDA graph) and replayed. An idle slot among the first R rows is computed
too, and writes past its own prompt only; idle prompt rows write to the one spare slot past the last.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from captioner.decoding.layout import PromptBlocks, SlotLayout, StepShape
from captioner.decoding.plan import StepPlan
from captioner.decoding.prefill import Chunk
from captioner.decoding.stores import Stores
from captioner.decoding.view import StepView

_HEAD_SLICE = 1000
"""Vocabulary rows of a float32 head that a CPU multiplies at once: MKL takes 21.7 ms for 32 rows x 512 x 32,000 in one
product and 17.2 ms in slices of 1,000, to the same bits."""
_MINUS_INFINITY = -1.0e9  # of beams that are not there yet, as in transformers


class Layers(Protocol):
    """A LLaMA's layers."""

    blocks: PromptBlocks
    """How prompt rows stand in a step."""

    def __call__(self, embeds: Tensor, positions: Tensor, view: StepView, /) -> Tensor:
        """Return the last hidden state of the decode rows, float[R, D], and write all rows to the stores."""


Step = Callable[[StepShape], Tensor]
"""Runs the device half of a step; returns its proposals."""


def upload(numbers: Sequence[Any], device: torch.device) -> Tensor:
    """Copy numbers to a device; from pinned memory, so that the host does not wait for the work that runs there."""
    host = torch.from_numpy(np.asarray(numbers))
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host.to(device)


class SlotBuffers:
    """State of all slots on the device; slot s is row s of every tensor.

    token_ids: int64, the newest token. num_generated: int64, tokens chosen before the step that ran last; -1 marks a
    slot that begins. first_columns: int64, where decoding begins. seeds, methods: int64.
    last_embeds: float[slots, D], the last
    token of the prompt. beam_scores: float32. history: int64[slots, max_new_tokens], the tokens chosen before the
    newest; unused entries repeat the first. allowed: bool[slots, V], or None where nothing is constrained.

    Of the step's prompt rows: prompt_embeds: float[C, D]. prompt_columns: int64[C]. prompt_targets: int64[C, group],
    the slots that a row is written to; the first is the one it reads."""

    def __init__(self, llama: LlamaForCausalLM, layout: SlotLayout) -> None:
        weight: Tensor = llama.model.embed_tokens.weight.detach()
        width, device = weight.shape[1], weight.device
        slots, prompt_rows = layout.num_slots, layout.prompt_rows
        self.stores = Stores.allocate(llama.config, layout, like=weight)
        self.token_ids = torch.zeros(slots, dtype=torch.int64, device=device)
        self.num_generated = torch.zeros_like(self.token_ids)
        self.first_columns = torch.full_like(self.token_ids, layout.own_shared_len)  # idle slots keep the prompt too
        self.seeds = torch.zeros_like(self.token_ids)
        self.methods = torch.zeros_like(self.token_ids)
        self.history = torch.zeros(slots, layout.max_new_tokens, dtype=torch.int64, device=device)
        self.beam_scores = torch.zeros(slots, dtype=torch.float32, device=device)
        self.last_embeds = weight.new_zeros(slots, width)
        words = llama.config.vocab_size
        self.allowed = torch.ones(slots, words, dtype=torch.bool, device=device) if layout.is_constrained else None
        self.prompt_embeds = weight.new_zeros(prompt_rows, width)
        self.prompt_columns = torch.zeros(prompt_rows, dtype=torch.int64, device=device)
        self.prompt_targets = torch.full((prompt_rows, layout.group_size), slots, device=device)
        self.of_each_slot = (
            self.token_ids, self.num_generated, self.first_columns, self.seeds, self.methods, self.history,
            self.beam_scores, self.last_embeds, self.stores.prefix_of, self.stores.prefix_len,
        )  # fmt: skip

    def place(self, addresses: Sequence[tuple[int, int, int, int]]) -> None:
        """Set (slot, prefix_of, prefix_len, first_column) of slots whose prompts are to be computed."""
        slots, prefix_of, prefix_len, first_columns = upload(addresses, self.token_ids.device).unbind(1)
        self.stores.prefix_of[slots] = prefix_of
        self.stores.prefix_len[slots] = prefix_len
        self.first_columns[slots] = first_columns

    def begin(self, groups: Sequence[Sequence[int]], last: Sequence[Tensor], seeds: Sequence[Sequence[int]]) -> None:
        """Let groups of slots decode, each group from the last embedding of a prompt, float[D], and a seed a slot."""
        slots, seed = upload([groups, seeds], self.token_ids.device)
        self.num_generated[slots] = -1
        self.seeds[slots] = seed
        self.beam_scores[slots] = _MINUS_INFINITY
        self.beam_scores[slots[:, 0]] = 0.0
        self.last_embeds[slots] = torch.stack(list(last)).to(self.last_embeds)[:, None]

    def fill(self, chunks: Sequence[Chunk], targets: Sequence[Sequence[int]], num_rows: int) -> None:
        """Set the step's prompt rows. targets: the slots of each chunk; rows between chunks are idle."""
        group = self.prompt_targets.shape[1]
        rows = np.zeros((num_rows, 1 + group), np.int64)
        rows[:, 1:] = len(self.token_ids)
        for chunk, slots in zip(chunks, targets, strict=True):
            at = slice(chunk.at, chunk.at + chunk.num_rows)
            rows[at, 0] = np.arange(chunk.first_column, chunk.first_column + chunk.num_rows)
            rows[at, 1:] = slots  # one slot, or all of a group
            self.prompt_embeds[at] = chunk.embeds.to(self.prompt_embeds)
        on_device = upload(rows, self.token_ids.device)  # type: ignore[arg-type]
        self.prompt_columns[:num_rows] = on_device[:, 0]
        self.prompt_targets[:num_rows] = on_device[:, 1:]


class SlotModel:
    """A `LlamaForCausalLM` over slots: buffers in, logits out. R decode rows, V words."""

    def __init__(self, llama: LlamaForCausalLM, layout: SlotLayout, layers: Layers) -> None:
        self.layout = layout
        self.buffers = SlotBuffers(llama, layout)
        self.plan: StepPlan | None = None
        """What the host knows of the next step's rows; for layers whose blocks are not padded."""
        self._llama = llama
        self._layers = layers
        weight = self.buffers.last_embeds
        self._logits = torch.zeros(layout.num_slots, llama.config.vocab_size, dtype=torch.float32, device=weight.device)
        self._slices_head = weight.device.type == "cpu" and weight.dtype == torch.float32

    def share(self, prompt: Tensor) -> None:
        """Write the keys and values of the prompt before the image, float[S, D]; S may be 0."""
        if len(prompt):
            self.buffers.stores.share(self._llama, prompt)

    def logits(self, shape: StepShape) -> Tensor:
        """Return the logits of the decode rows, float32[R, V], and write all rows to the stores.

        Idle slots count on too, within their own columns."""
        buffers, num_rows, num_prompt_rows = self.buffers, shape.num_rows, shape.num_prompt_rows
        num_generated = buffers.num_generated[:num_rows].add_(1).clamp_(max=self.layout.max_new_tokens - 1)
        columns = buffers.first_columns[:num_rows] + num_generated
        newest = self._llama.model.embed_tokens(buffers.token_ids[:num_rows])
        embeds = torch.where((num_generated == 0)[:, None], buffers.last_embeds[:num_rows], newest)
        positions = columns + buffers.stores.prefix_len[:num_rows]
        if num_prompt_rows:
            embeds = torch.cat([embeds, buffers.prompt_embeds[:num_prompt_rows]])
            positions = torch.cat([positions, buffers.prompt_columns[:num_prompt_rows]])
        view = StepView(
            stores=buffers.stores,
            num_rows=num_rows,
            own_columns=columns,
            columns=positions,
            window=shape.window,
            targets=buffers.prompt_targets[:num_prompt_rows],
            plan=self.plan,
        )
        return self._head(self._layers(embeds, positions, view))

    def newest_logits(self, rows: Tensor) -> Tensor:
        """Return the logits that the last step gave some rows, float32[len(rows), V]."""
        return self._logits[rows]

    def remember(self, num_rows: int) -> None:
        """Append the previous choice of the first R slots to their history. Call it after `logits`, which counts on.

        Not when they choose: a repeated draw must see the same history as the first."""
        history, newest = self.buffers.history[:num_rows], self.buffers.token_ids[:num_rows, None]
        at = self.buffers.num_generated[:num_rows, None] - 1
        history.copy_(torch.where(at <= 0, newest, history.scatter(1, at.clamp(min=0), newest)))

    def reorder(self, parents: Tensor, slots: Tensor, generated: slice) -> None:
        """Copy the generated tokens of `parents` to `slots`, with the keys and values of these own columns."""
        self.buffers.stores.copy_own(parents, slots, generated)
        self.buffers.history[slots] = self.buffers.history[parents]

    def move(self, sources: Tensor, targets: Tensor, stop: int) -> None:
        """Copy the whole state of slots `sources` to slots `targets`, with their own columns up to `stop`."""
        self.buffers.stores.copy_own(sources, targets, slice(self.layout.own_shared_len, stop))
        for state in self.buffers.of_each_slot:
            state[targets] = state[sources]

    def _head(self, hidden: Tensor) -> Tensor:
        """float[R, D] -> float32[R, V], in one buffer that all steps share."""
        head, logits = self._llama.lm_head, self._logits[: len(hidden)]
        if not self._slices_head:
            return logits.copy_(head(hidden))
        for weight, words in zip(
            torch.split(head.weight, _HEAD_SLICE), torch.split(logits, _HEAD_SLICE, 1), strict=True
        ):
            torch.mm(hidden, weight.t(), out=words)
        return logits
