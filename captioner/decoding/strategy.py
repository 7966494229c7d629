"""How a step chooses: one token a slot, or beams. The device half of each, `propose`, is recorded with the forward;
the host half reads its small result and tells each seat's `Chain` or `BeamSearch`. A seat is the slots of one search.
"""

from collections.abc import Sequence
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from captioner.config import DecodingConfig
from captioner.decoding.beam import Beam, BeamSearch, Continuation
from captioner.decoding.draft import Chain, Endings
from captioner.decoding.recording import Step
from captioner.decoding.sampling import (
    LogitsProcessors,
    greedy,
    sample,
    token_logprobs,
    top_candidates,
    uniform,
)
from captioner.decoding.step import SlotModel, StepShape

Search = TypeVar("Search", Chain, BeamSearch)


class Strategy(Protocol[Search]):
    """What the engine asks of a way to decode."""

    slots_per_seat: int
    run: Step
    """The device half of a step: `propose`, or a recording of it."""

    def begin(self, max_new_tokens: int) -> Search:
        """Return the search of a new seat."""

    def advance(self, searches: Sequence[Search], shape: StepShape) -> None:
        """Run one step over the first seats and tell each search its outcome."""

    def propose(self, shape: StepShape) -> Tensor:
        """Choose for the first R rows, on the device alone; return what the host half reads."""


class TokenStrategy:
    """One token a slot and step: the most probable one, or a draw."""

    slots_per_seat = 1

    def __init__(self, model: SlotModel, decoding: DecodingConfig, eos_token_ids: Tensor, endings: Endings) -> None:
        self._model = model
        self._decoding = decoding
        self._endings = endings
        self._process = LogitsProcessors(decoding, eos_token_ids)
        self.run: Step = self.propose

    def begin(self, max_new_tokens: int) -> Chain:
        """Return an empty chain."""
        return Chain(self._endings, max_new_tokens)

    def advance(self, searches: Sequence[Chain], shape: StepShape) -> None:
        """Run one step; where the candidates looked at did not suffice for a draw, draw again from all."""
        chosen = self.run(shape).tolist()[: len(searches)]
        inexact = [row for row, (_, _, is_exact) in enumerate(chosen) if not is_exact]
        if inexact:
            again = self._choose(self._model.newest_logits(inexact), inexact, looks_at_all=True).tolist()
            for row, choice in zip(inexact, again, strict=True):
                chosen[row] = choice
        for chain, (token_id, logprob, _) in zip(searches, chosen, strict=True):
            chain.advance(int(token_id), logprob)

    def propose(self, shape: StepShape) -> Tensor:
        """Return token id, log-probability and exactness of each row, float64[R, 3]."""
        logits = self._model.logits(shape)
        if self._process.needs_history:
            self._model.remember(shape.num_rows)
        return self._choose(logits, slice(shape.num_rows))

    def _choose(self, logits: Tensor, rows: slice | list[int], *, looks_at_all: bool = False) -> Tensor:
        buffers = self._model.buffers
        num_generated = buffers.num_generated[rows]
        scores = self._process(logits, num_generated, buffers.history[rows])
        if self._decoding.do_sample:
            uniforms = uniform(buffers.seeds[rows], num_generated)
            token_ids, is_exact = sample(scores, uniforms, self._decoding, looks_at_all=looks_at_all)
        else:
            token_ids, is_exact = greedy(scores), torch.ones_like(num_generated)
        buffers.token_ids[rows] = token_ids
        return torch.stack([token_ids.double(), token_logprobs(logits, token_ids).double(), is_exact.double()], 1)


class BeamStrategy:
    """Beam search: the beams of one image are num_beams neighbouring slots."""

    def __init__(self, model: SlotModel, decoding: DecodingConfig, eos_token_ids: Tensor, endings: Endings) -> None:
        self.slots_per_seat = decoding.num_beams
        self._model = model
        self._decoding = decoding
        self._endings = endings
        self._process = LogitsProcessors(decoding, eos_token_ids)
        self.run: Step = self.propose
        self._num_proposals = max(2, 1 + len(eos_token_ids)) * decoding.num_beams

    def begin(self, max_new_tokens: int) -> BeamSearch:
        """Return the beams of an image before its first token."""
        return BeamSearch(self._decoding, self._endings, max_new_tokens)

    def advance(self, searches: Sequence[BeamSearch], shape: StepShape) -> None:
        """Run one step, let each search keep its best beams, and put their keys and values where they go on."""
        for search, rows in zip(searches, self.run(shape).tolist(), strict=False):
            search.advance([Continuation(score, int(parent), int(token), lp) for score, parent, token, lp in rows])
        self._keep([beam for search in searches for beam in search.beams], shape.window)

    def propose(self, shape: StepShape) -> Tensor:
        """Return the best continuations of each group of beams as score, parent, token id and log-probability,
        float64[G, num_proposals, 4]."""
        buffers, num_beams = self._model.buffers, self._decoding.num_beams
        logits = self._model.logits(shape)
        if self._process.needs_history:
            self._model.remember(shape.num_rows)
        used = slice(shape.num_rows // num_beams * num_beams)
        logprobs = torch.log_softmax(logits[used], -1)
        scores = self._process(logprobs, buffers.num_generated[used], buffers.history[used])
        values, token_ids = top_candidates(scores, min(self._num_proposals, scores.shape[-1]))
        num_groups, num_candidates = len(scores) // num_beams, values.shape[-1]
        totals = (values + buffers.beam_scores[used, None]).view(num_groups, -1)
        best, at = totals.topk(self._num_proposals)
        tokens, own = (t.view(num_groups, -1).gather(1, at) for t in (token_ids, logprobs.gather(1, token_ids)))
        return torch.stack([best.double(), (at // num_candidates).double(), tokens.double(), own.double()], -1)

    def _keep(self, beams: Sequence[Beam], window: int) -> None:
        """Let slot s go on as beams[s], which continues a slot of its own group."""
        num_beams = self._decoding.num_beams
        parents = [slot - slot % num_beams + beam.parent for slot, beam in enumerate(beams)]
        self._model.reorder(parents, window)
        device = self._model.buffers.kv.device
        slots = slice(len(beams))
        newest = [beam.draft.token_ids[-1] for beam in beams]
        self._model.buffers.token_ids[slots] = torch.tensor(newest, device=device)
        self._model.buffers.beam_scores[slots] = torch.tensor([beam.score for beam in beams], device=device)
