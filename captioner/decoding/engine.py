"""The decoding engine: image prefixes in, captions out, with continuous batching over a fixed number of slots.

A step appends one token to every running caption in a single pass over the weights. The slot of a finished caption is
refilled at once. The prompts of new requests are computed in the same passes, in chunks, so that a long one never holds
up the captions that run. Knows token ids and embeddings: no text, no tokenizer, no files, no Ray. What differs on a
CUDA device comes from `captioner.decoding.cuda`.

    engine = Engine(llama, decodings=[DecodingConfig()], eos_token_ids=[2], shared_prefix=embeds, max_prefix_len=576)
    for generation in engine.generate(requests): ...
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from captioner.config import DecodingConfig
from captioner.decoding.attention import TransformersLayers
from captioner.decoding.cuda import FusedLlama, RecordedSteps, UnfusedLlama, operations_for
from captioner.decoding.jobs import Job, Search
from captioner.decoding.layout import ROW_BUCKET, SlotLayout, StepShape, group_size, round_up
from captioner.decoding.limits import check_context, check_request, check_slots
from captioner.decoding.memory import WAITING_PER_SLOT, auto_slots, name_out_of_memory, waiting_tokens
from captioner.decoding.plan import Member, StepPlan, alike, blocks_of, groups_of
from captioner.decoding.prefill import Chunk, PrefillQueue, prompts_of
from captioner.decoding.request import Generation, PendingHypotheses, Request
from captioner.decoding.sampling import candidate_seed
from captioner.decoding.sequences import StopConditions
from captioner.decoding.slots import Lanes, PrefixAllocator, SlotAllocator
from captioner.decoding.step import Layers, SlotModel, Step, upload
from captioner.decoding.strategy import BeamStrategy, Strategy, TokenStrategy
from captioner.model.adapted_layers import has_adapter
from captioner.model.cuda_graphs import Recorder
from captioner.model.language.table import can_fuse


class _Begun(NamedTuple):
    """A step that the device runs."""

    proposals: Tensor
    generated: slice
    decoding: Lanes
    held: list[Chunk]
    """What it reads of prompts: their memory must not be reused before it has ended."""


class Engine:
    """Decodes requests over a fixed number of slots.

    A step has two halves: `begin_step` launches it on the device, which computes while the host does other work;
    `end_step` waits for the result. On a CPU the first half does the work."""

    @torch.inference_mode()
    def __init__(
        self,
        llama: LlamaForCausalLM,
        *,
        decodings: Sequence[DecodingConfig],
        eos_token_ids: Sequence[int],
        shared_prefix: Tensor,
        max_prefix_len: int,
        max_suffix_len: int = 0,
        num_forks: int = 1,
        slots_per_image: int | None = None,
        is_constrained: bool = False,
        context_length: int | None = None,
        slots: int | Literal["auto"] = "auto",
        memory_share: float = 1.0,
        recorder: Recorder | None = None,
        layers: Layers | None = None,
    ) -> None:
        """Allocate the slots and compute the shared prefix.

        decodings: by `Fork.decoding`. shared_prefix: float[S, D], the embedded prompt before the image; S may be 0.
        max_prefix_len: most tokens P of a request's prefix. max_suffix_len, num_forks: most tokens of a fork's suffix,
        most forks of a request. slots_per_image: of all these, by default the most. is_constrained: whether forks may
        have `allowed_tokens`. context_length: by default as the model's config says. slots: captions (or beams) decoded
        at once; `auto`: as many as this share of free memory holds.
        recorder: records steps, for this engine alone; else they run eagerly. layers: by default what suits the device.
        Raises ConfigError if context or slots hold no image with its captions, ResourceError if memory has no room."""
        decoding = _largest(decodings)
        check_context(llama, context_length, len(shared_prefix), max_prefix_len, max_suffix_len, decoding)
        layers = layers or _layers_for(llama, is_recorded=recorder is not None)
        lengths = partial(SlotLayout.of, shared_len=len(shared_prefix), max_prefix_len=max_prefix_len)
        of_forks = partial(lengths, num_forks=num_forks, max_suffix_len=max_suffix_len, slots_per_image=slots_per_image)
        layout_of = partial(of_forks, decoding=decoding, is_constrained=is_constrained, blocks=layers.blocks)
        if slots == "auto":
            slots = auto_slots(llama.config, layout_of, llama.device, llama.dtype, memory_share=memory_share)
        check_slots(slots, layout := layout_of(slots), decoding)
        self.num_slots, self.device = slots, llama.device
        self._decodings, self._is_recorded = tuple(decodings), recorder is not None
        with name_out_of_memory(slots, decoding.max_new_tokens):
            self._model = SlotModel(llama, layout, layers)
            self._model.share(shared_prefix)
            self._strategy = _strategy_of(self._model, decodings, eos_token_ids)
            propose: Step = self._strategy.propose
            self._propose = propose if recorder is None else RecordedSteps(propose, layout.full_shapes(), recorder)
        self._lanes: SlotAllocator[Search] = SlotAllocator(slots // self._strategy.slots_per_lane)
        self._prefixes = PrefixAllocator(layout.num_prefixes)
        self._prefill = PrefillQueue(layout)
        self._placed: list[tuple[int, int, int, int]] = []  # what `SlotBuffers.place` is given next
        self._begun: _Begun | None = None
        self._again: list[Search] = []  # that write one more caption from the next step on

    @property
    def num_free(self) -> int:
        """Requests that can be admitted now. Each may change it by more than one; while many prompts wait, it is 0."""
        layout = self._model.layout
        free = self._lanes.num_free * self._strategy.slots_per_lane // layout.slots_per_image
        if layout.stores_prefixes:
            free = min(free, self._prefixes.num_free)
        if layout.prompt_rows:
            room = layout.prompt_rows - self._prefill.num_rows
            free = min(free, -(-room // layout.most_rows_of_image))
        return max(free, 0)

    @property
    def most_waiting(self) -> tuple[int, int]:
        """Requests, and tokens of their prefixes, that the memory of waiting requests is accounted for."""
        return WAITING_PER_SLOT * self.num_slots, waiting_tokens(self._model.layout)

    @property
    def num_busy(self) -> int:
        """Slots in which a caption or a beam is being decoded, or waits for its prompt."""
        return self._lanes.num_used * self._strategy.slots_per_lane

    @property
    def is_idle(self) -> bool:
        """Whether no request is being decoded."""
        return not self._lanes.num_used

    def generate(self, requests: Iterable[Request]) -> Iterator[Generation]:
        """Yield the captions of each request as they are finished; requests are admitted as slots become free."""
        waiting = iter(requests)
        while True:
            while (number := self.num_free) and (admitted := list(islice(waiting, number))):
                self.admit(admitted)
            if self.is_idle:
                return
            yield from self.step()

    def check(self, request: Request) -> None:
        """Raise ShapeError if the prefix or a suffix does not fit, or there are more forks than the engine takes."""
        check_request(request, self._model.layout, self._decodings, width=self._model.buffers.last_embeds.shape[1])

    def admit(self, requests: Sequence[Request]) -> None:
        """Give at most `num_free` requests their slots; the next steps compute their prompts. Not during a step.

        Raises ShapeError as `check` does."""
        for request in requests:
            self.check(request)
        assert len(requests) <= self.num_free
        assert self._begun is None
        for request in requests:
            self._admit(request)

    @torch.inference_mode()
    def _admit(self, request: Request) -> None:
        layout = self._model.layout
        decodings = [self._decodings[fork.decoding] for fork in request.forks]
        num_searches = [group_size(decoding) // self._strategy.slots_per_lane for decoding in decodings]
        place = self._prefixes.allocate(sum(num_searches)) if layout.stores_prefixes else 0
        job = Job(request, place, num_searches)
        forks = [request.forks[search.fork] for search in job.searches]
        addresses = [layout.columns_of(len(request.prefix), fork.suffix_len) for fork in forks]
        lanes = self._lanes.allocate(job.searches, [first for _, first in addresses])
        limits = [request.limit_of(fork, self._decodings[fork.decoding].max_new_tokens) for fork in forks]
        self._strategy.begin(lanes, np.array(limits, np.int64), forks)
        self._prefill.add(prompts_of(job, request.prefix, layout), job.searches)
        self._placed += [
            (slot, place, *address)
            for search, address in zip(job.searches, addresses, strict=True)
            for slot in self._slots([search])
        ]

    def step(self) -> list[Generation]:
        """Append one token to every running caption; return the captions of the requests that are now complete."""
        self.begin_step()
        return list(self.end_step())

    @torch.inference_mode()
    def begin_step(self) -> None:
        """Launch the device half of a step, which chooses the next token of every running caption."""
        assert self._begun is None
        if self._placed:
            self._model.buffers.place(self._placed)
            self._placed.clear()
        if not self._is_recorded:  # a recorded step has all rows anyway
            self._close_gaps()
        with name_out_of_memory(self.num_slots, self._model.layout.max_new_tokens):
            chunks, ready = self._prefill.take()
            self._start([*ready, *self._again])
            self._again.clear()
            decoding, (first, stop) = self._lanes.decoding, self._lanes.generated
            self._strategy.prepare(decoding)
            shape = StepShape(self._num_rows(), self._window(stop), self._fill(chunks))
            self._plan(chunks, shape.num_rows)
            self._begun = _Begun(self._propose(shape), slice(first, stop), decoding, chunks)

    @torch.inference_mode()
    def end_step(self) -> Iterator[Generation]:
        """Wait for the device's choice; return the captions of requests that are now complete, and free their slots.

        The iterator builds each generation when it is asked for it: best after the next step has begun."""
        assert self._begun is not None
        begun, self._begun = self._begun, None
        with name_out_of_memory(self.num_slots, self._model.layout.max_new_tokens):
            finished = self._strategy.accept(begun.proposals, begun.decoding, begun.generated)
        self._lanes.count_step()
        complete = [job for lane, pending in finished.items() if (job := self._end(lane, pending))]
        return (job.generation() for job in complete)

    def _window(self, num_columns: int) -> int:
        layout = self._model.layout
        return layout.own_columns if self._is_recorded else layout.window(num_columns)

    def _num_rows(self) -> int:
        if self._is_recorded:
            return self._model.layout.num_slots
        return round_up(self.num_busy, ROW_BUCKET)

    def _close_gaps(self) -> None:
        """Move the last lanes into free ones before them, so that the decode rows are slots 0 to R - 1."""
        sources, targets = self._lanes.close_gaps()
        if len(sources):
            self._strategy.move(sources, targets)
            from_slots, to_slots = upload([self._slots_of(sources), self._slots_of(targets)], self.device)
            self._model.move(from_slots, to_slots, self._lanes.generated[1])

    def _start(self, searches: Sequence[Search]) -> None:
        """Let searches decode whose prompts are computed with the next step."""
        if not searches:
            return
        self._lanes.start(searches)
        groups: dict[tuple[Job, int], list[Search]] = {}
        for search in searches:
            groups.setdefault((search.job, search.fork), []).append(search)
        slots = [self._slots(of_fork) for of_fork in groups.values()]
        last = [job.tails[fork][-1] for job, fork in groups]
        width = self._strategy.slots_per_lane
        seeds = [
            [candidate_seed(job.seeds[fork], search.draw) for search in of_fork for _ in range(width)]
            for (job, fork), of_fork in groups.items()
        ]
        widest = self._model.layout.group_size
        slots, seeds = ([each + each[-1:] * (widest - len(each)) for each in one] for one in (slots, seeds))
        self._model.buffers.begin(slots, last, seeds)

    def _fill(self, chunks: Sequence[Chunk]) -> int:
        """Set the prompt rows of the next step; return how many rows it is shaped for."""
        if not chunks:
            return 0
        layout, last = self._model.layout, chunks[-1]
        num_rows = layout.prompt_rows if self._is_recorded else round_up(last.at + layout.step_rows(last.num_rows), 2)
        self._model.buffers.fill(chunks, [self._targets(chunk) for chunk in chunks], num_rows)
        return num_rows

    def _targets(self, chunk: Chunk) -> list[int]:
        """Return the slots that a chunk is written to, as many for each: one for all of an image."""
        slots = self._slots(chunk.prompt.readers)
        if chunk.prompt.is_shared:
            return slots[:1]
        return slots + slots[-1:] * (self._model.layout.group_size - len(slots))

    def _plan(self, chunks: Sequence[Chunk], num_rows: int) -> None:
        """Tell layers that do not read it on the device what the rows of the next step are."""
        layout = self._model.layout
        if layout.blocks.is_padded:
            return
        readers = [chunk.prompt.readers[0] for chunk in chunks]
        addresses = [(search.job.place, self._prefix_len(search)) for search in readers]
        blocks = blocks_of(chunks, [self._slots([one])[0] for one in readers], addresses, layout.blocks.num_rows)
        groups = None
        if layout.stores_prefixes:
            groups = groups_of(self._members(), num_rows, layout.slots_per_image)
        self._model.plan = StepPlan(alike(blocks), groups)

    def _members(self) -> list[Member]:
        width = self._strategy.slots_per_lane
        return [
            Member(lane * width + i, search.job.place, self._prefix_len(search), search.number * width + i)
            for lane in self._lanes.decoding.tolist()
            for search in [self._lanes[lane]]
            for i in range(width)
        ]

    def _prefix_len(self, search: Search) -> int:
        return self._model.layout.columns_of(search.job.prefix_len, 0)[0]

    def _slots(self, searches: Iterable[Search]) -> list[int]:
        return self._slots_of(search.lane for search in searches)

    def _slots_of(self, lanes: Iterable[int]) -> list[int]:
        width = self._strategy.slots_per_lane
        return [int(lane) * width + i for lane in lanes for i in range(width)]

    def _end(self, lane: int, pending: PendingHypotheses) -> Job | None:
        """Free the lane of a finished search, unless it writes one more caption; return its job if that has no other
        running search."""
        search = self._lanes[lane]
        if search.job.begins_again(search, pending):
            redraw = search.job.redraws[search.fork]
            assert redraw is not None
            self._strategy.restart(lane, redraw.decoding)
            self._lanes.restart(lane)
            self._again.append(search)
            return None
        self._lanes.free(lane)
        if self._model.layout.stores_prefixes:
            self._prefixes.release(search.job.place)
        return search.job if search.job.finish(search, pending) else None


def _largest(decodings: Sequence[DecodingConfig]) -> DecodingConfig:
    """Return the decoding that an engine is sized for: with the most slots of any, and the most tokens."""
    longest = max(decoding.max_new_tokens for decoding in decodings)
    return replace(max(decodings, key=group_size), max_new_tokens=longest)


def _strategy_of(model: SlotModel, decodings: Sequence[DecodingConfig], eos_token_ids: Sequence[int]) -> Strategy:
    eos = torch.tensor(list(eos_token_ids), dtype=torch.int64, device=model.buffers.token_ids.device)
    make = BeamStrategy if decodings[0].num_beams > 1 else TokenStrategy
    return make(model, decodings, eos, StopConditions(eos_token_ids))


def _layers_for(llama: LlamaForCausalLM, *, is_recorded: bool) -> Layers:
    if not is_recorded and llama.device.type != "cuda":
        return TransformersLayers(llama)
    make = FusedLlama if can_fuse(llama.config.model_type) and not has_adapter(llama) else UnfusedLlama
    return make(llama, operations_for(llama.device))
