"""The decoding engine: image prefixes in, captions out, as many at a time as there are slots.

A step gives every running caption one token in a single pass over the weights. Captions end at different lengths; the
slot of one that ended is filled at once, and the first pass over a fresh prefix is part of the next step. Knows token
ids and embeddings: no text, no tokenizer, no files, no Ray.

    engine = Engine(llama, decoding=DecodingConfig(), eos_token_ids=[2], shared_prefix=embeds, prefix_len=1, slots=64)
    for generation in engine.generate(requests): ...
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from operator import attrgetter
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from captioner.config import DecodingConfig
from captioner.decoding.draft import Endings
from captioner.decoding.fused_llama import layers_of
from captioner.decoding.memory import auto_slots, out_of_memory_named
from captioner.decoding.recorded_steps import RecordedSteps, Step
from captioner.decoding.request import Ending, Generation, Request
from captioner.decoding.sampling import candidate_seed
from captioner.decoding.seats import Places, Seats
from captioner.decoding.step import ROW_BUCKET, Layers, SlotLayout, SlotModel, StepShape, group_size, round_up, upload
from captioner.decoding.strategy import BeamStrategy, Strategy, TokenStrategy
from captioner.errors import ConfigError, ShapeError
from captioner.model.recording import Recorder


@dataclass(slots=True, eq=False)
class _Job:
    """A request that is being decoded, and what it has so far."""

    request: Request
    missing: int
    endings: list[Ending] = field(default_factory=list)

    def generation(self) -> Generation:
        """Put together what was found, when nothing is missing."""
        hypotheses = [hypothesis for ending in self.endings for hypothesis in ending()]
        return Generation(self.request.id, tuple(sorted(hypotheses, key=attrgetter("score"), reverse=True)))


class Engine:
    """Decodes requests of one prefix length over a fixed number of slots.

    A step may be taken in two halves: `begin_step` hands it to a card, which works while the host does other things;
    `end_step` waits for it. A CPU does the work in the first half."""

    @torch.inference_mode()
    def __init__(
        self,
        llama: LlamaForCausalLM,
        *,
        decoding: DecodingConfig,
        eos_token_ids: Sequence[int],
        shared_prefix: Tensor,
        prefix_len: int,
        slots: int | Literal["auto"] = "auto",
        is_stopped: Callable[[Sequence[int]], bool] | None = None,
        recorder: Recorder | None = None,
        layers: Layers | None = None,
    ) -> None:
        """Make room for the slots and compute the shared prefix.

        shared_prefix: float[S, D], the prompt before the image, embedded; S may be 0. prefix_len: tokens P of every
        request's prefix. slots: captions (or beams) written at the same time; `auto`: what the device's memory
        holds. is_stopped: says whether the tokens so far contain a stop string; asked after every token. recorder: what
        records steps to replay them, all slots in each, for this engine alone; none: steps run as they come. layers:
        what runs LLaMA's layers; by default what suits its device. Raises
        ConfigError if a caption cannot fit the model's context, or one image's beams or captions the slots, and
        ResourceError if the device's memory cannot hold the slots."""
        _check_context(llama, len(shared_prefix), prefix_len, decoding.max_new_tokens)
        layout_of = partial(
            SlotLayout.of,
            decoding=decoding,
            shared_len=len(shared_prefix),
            prefix_len=prefix_len,
            is_recorded=recorder is not None,
        )
        if slots == "auto":
            slots = auto_slots(llama.config, layout_of, group_size(decoding), device=llama.device, dtype=llama.dtype)
        _check_slots(slots, group_size(decoding))
        self.num_slots = slots
        self.device = llama.device
        self._decoding = decoding
        self._is_recorded = recorder is not None
        with out_of_memory_named(slots, decoding.max_new_tokens):
            self._model = SlotModel(llama, layout_of(slots), layers or layers_of(llama))
            if len(shared_prefix):
                self._model.share(shared_prefix)
            eos = torch.tensor(list(eos_token_ids), dtype=torch.int64, device=llama.device)
            make = BeamStrategy if decoding.num_beams > 1 else TokenStrategy
            self._strategy: Strategy = make(self._model, decoding, eos, Endings(eos_token_ids, is_stopped))
            self._propose: Step = self._strategy.propose
            if recorder is not None:
                self._propose = RecordedSteps(self._propose, self._model.layout.full_shapes(), recorder)
        self._seats: Seats[_Job] = Seats(slots // self._strategy.slots_per_seat)
        self._seats_per_request = group_size(decoding) // self._strategy.slots_per_seat
        self._fresh: list[tuple[Request, Places]] = []
        self._begun: tuple[Tensor, int] | None = None
        """What a step that has begun proposes, and its window."""

    @property
    def num_free(self) -> int:
        """Requests that can be admitted before the next step."""
        num_prompts_left = self._model.layout.max_prompts - len(self._fresh)
        return min(self._seats.num_free // self._seats_per_request, num_prompts_left)

    @property
    def num_busy(self) -> int:
        """Slots in which a caption or a beam is being written."""
        return self._seats.num_taken * self._strategy.slots_per_seat

    @property
    def is_idle(self) -> bool:
        """Whether no request is being decoded."""
        return not self._seats.num_taken

    def generate(self, requests: Iterable[Request]) -> Iterator[Generation]:
        """Yield what becomes of each request, as it ends; requests are taken as slots become free."""
        waiting = iter(requests)
        while True:
            self.admit(list(islice(waiting, self.num_free)))
            if self.is_idle:
                return
            yield from self.step()

    def check(self, request: Request) -> None:
        """Raise ShapeError if the prefix is not float[P, D]."""
        expected = (self._model.layout.prefix_len, self._model.buffers.last_prefix.shape[1])
        if tuple(request.prefix.shape) != expected:
            raise ShapeError(
                f"the prefix of request {request.id!r} is float{list(request.prefix.shape)}; this engine was made for "
                f"float{list(expected)}: all prefixes of one engine have the same number of tokens"
            )

    def admit(self, requests: Sequence[Request]) -> None:
        """Seat requests, at most `num_free`; their first tokens are chosen in the next step. Not within a step.

        Raises ShapeError if a prefix is not float[P, D]."""
        for request in requests:
            self.check(request)
        assert len(requests) <= self.num_free
        assert self._begun is None
        each, most = self._seats_per_request, self._decoding.max_new_tokens
        jobs = [_Job(request, missing=each) for request in requests]
        seats = self._seats.take([job for job in jobs for _ in range(each)])
        limits = [min(request.max_new_tokens or most, most) for request in requests]
        self._strategy.begin(seats, np.repeat(np.array(limits, np.int64), each))
        self._fresh += zip(requests, seats.reshape(-1, each), strict=True)

    def step(self) -> list[Generation]:
        """Give every running caption its next token; return the requests that are now complete."""
        self.begin_step()
        return list(self.end_step())

    @torch.inference_mode()
    def begin_step(self) -> None:
        """Let the device choose the next token of every running caption."""
        assert self._begun is None
        window = self._model.layout.window(self._seats.most_steps)
        if not self._is_recorded:  # a recording has all rows in any case
            self._close_gaps(window)
        shape = StepShape(num_rows=self._num_rows(), window=window, num_prompts=self._fill_fresh())
        with out_of_memory_named(self.num_slots, self._decoding.max_new_tokens):
            self._begun = self._propose(shape), window

    @torch.inference_mode()
    def end_step(self) -> Iterator[Generation]:
        """Wait for the device's choice; return the requests that are now complete, whose seats are free at once.

        They are put together as they are asked for: best after the next step has begun."""
        assert self._begun is not None
        (proposals, window), self._begun = self._begun, None
        with out_of_memory_named(self.num_slots, self._decoding.max_new_tokens):
            ended = self._strategy.settle(proposals, self._seats.taken, window)
        self._seats.count_step()
        complete = [job for seat, ending in ended.items() if (job := self._leave(seat, ending))]
        return (job.generation() for job in complete)

    def _num_rows(self) -> int:
        if self._is_recorded:
            return self._model.layout.num_slots
        return round_up(self._seats.num_taken * self._strategy.slots_per_seat, ROW_BUCKET)

    def _close_gaps(self, window: int) -> None:
        """Move the last seats into empty ones, so that decode rows are slots 0 to R - 1 without gaps."""
        sources, targets = self._seats.close_gaps()
        if len(sources):
            self._strategy.move(sources, targets)
            from_slots, to_slots = upload([self._slots(sources), self._slots(targets)], self.device)
            self._model.move(from_slots, to_slots, window)

    def _fill_fresh(self) -> int:
        """Hand the newly seated prefixes to the device; return how many prompts the step is shaped for."""
        if not self._fresh:
            return 0
        groups = [self._slots(seats) for _, seats in self._fresh]
        seeds = [[candidate_seed(request.seed, n) for n in range(len(groups[0]))] for request, _ in self._fresh]
        self._model.buffers.fill(groups, [request.prefix for request, _ in self._fresh], seeds)
        self._fresh.clear()
        return self._model.layout.prompt_rows(len(groups))

    def _slots(self, seats: Places) -> list[int]:
        width = self._strategy.slots_per_seat
        return [seat * width + i for seat in seats.tolist() for i in range(width)]

    def _leave(self, seat: int, ending: Ending) -> _Job | None:
        """Empty a seat whose search is done; return its request's job if that waits for no other seat."""
        job = self._seats.leave(seat)
        job.endings.append(ending)
        job.missing -= 1
        return None if job.missing else job


def _check_context(llama: LlamaForCausalLM, shared_len: int, prefix_len: int, max_new_tokens: int) -> None:
    context = llama.config.max_position_embeddings
    needed = shared_len + prefix_len + max_new_tokens
    if needed > context:
        raise ConfigError(
            f"--max-new-tokens is {max_new_tokens}, but {shared_len} prompt tokens, {prefix_len} of the image and the "
            f"caption make {needed}, and the model's context holds {context}; expected at most "
            f"{context - shared_len - prefix_len}"
        )


def _check_slots(slots: int, group_size: int) -> None:
    if slots < group_size:
        raise ConfigError(f"--slots is {slots}; expected at least {group_size}, the beams or captions of one image")
