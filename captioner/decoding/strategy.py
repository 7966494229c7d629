"""How a step chooses: one token a slot, or beams. The device half of each, `propose`, can be recorded with the forward;
the host half, `settle`, reads its small result and follows the search of each seat: the slots of one caption or beam
search.
"""

from collections.abc import Iterable
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from captioner.config import DecodingConfig
from captioner.decoding.beam import BeamSearch, Continuation
from captioner.decoding.chains import Chains
from captioner.decoding.draft import Endings
from captioner.decoding.request import Ending
from captioner.decoding.sampling import (
    LogitsProcessors,
    greedy,
    sample,
    token_logprobs,
    top_candidates,
    uniform,
)
from captioner.decoding.seats import Places
from captioner.decoding.step import SlotModel, StepShape, upload

Ended = dict[int, Ending]
"""The searches that are done, by seat."""


class Strategy(Protocol):
    """What the engine asks of a way to decode."""

    slots_per_seat: int

    def begin(self, seats: Places, limits: NDArray[np.int64]) -> None:
        """Begin searches, each with its most tokens."""

    def move(self, sources: Places, targets: Places) -> None:
        """Let the searches of some seats go on in others."""

    def propose(self, shape: StepShape) -> Tensor:
        """Choose for the first R rows, on the device alone; return what the host half reads."""

    def settle(self, proposals: Tensor, seats: Places, window: int, /) -> Ended:
        """Take what a step proposed for the seats that are taken."""


class TokenStrategy:
    """One token a slot and step: the most probable one, or a draw."""

    slots_per_seat = 1

    def __init__(self, model: SlotModel, decoding: DecodingConfig, eos_token_ids: Tensor, endings: Endings) -> None:
        self._model = model
        self._decoding = decoding
        self._process = LogitsProcessors(decoding, eos_token_ids)
        self._chains = Chains(model.layout.num_slots, decoding.max_new_tokens, endings)
        self.begin, self.move = self._chains.begin, self._chains.move

    def propose(self, shape: StepShape) -> Tensor:
        """Return token id, log-probability and exactness of each row, float64[R, 3]."""
        logits = self._model.logits(shape)
        if self._process.needs_history:
            self._model.remember(shape.num_rows)
        return self._choose(logits, slice(shape.num_rows))

    def settle(self, proposals: Tensor, seats: Places, _window: int, /) -> Ended:
        """Give each caption its token; where the candidates looked at did not suffice for a draw, one from all."""
        chosen = proposals.cpu().numpy()[seats]
        is_inexact = chosen[:, 2] == 0
        if is_inexact.any():
            chosen[is_inexact] = self._choose_from_all(seats[is_inexact])
        return self._chains.advance(seats, chosen[:, 0].astype(np.int64), chosen[:, 1])

    def _choose_from_all(self, seats: Places) -> NDArray[np.float64]:
        rows = upload(seats.tolist(), self._model.buffers.kv.device)
        chosen: NDArray[np.float64] = (
            self._choose(self._model.newest_logits(rows), rows, looks_at_all=True).cpu().numpy()
        )
        return chosen

    def _choose(self, logits: Tensor, rows: slice | Tensor, *, looks_at_all: bool = False) -> Tensor:
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
        self._searches: dict[int, BeamSearch] = {}
        self._num_proposals = max(2, 1 + len(eos_token_ids)) * decoding.num_beams

    def begin(self, seats: Places, limits: NDArray[np.int64]) -> None:
        """Begin with the beams of each image before its first token."""
        for seat, limit in zip(seats.tolist(), limits.tolist(), strict=True):
            self._searches[seat] = BeamSearch(self._decoding, self._endings, limit)

    def move(self, sources: Places, targets: Places) -> None:
        """Let the searches of some seats go on in others."""
        for source, target in zip(sources.tolist(), targets.tolist(), strict=True):
            self._searches[target] = self._searches.pop(source)

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

    def settle(self, proposals: Tensor, seats: Places, window: int, /) -> Ended:
        """Let each search keep its best beams, and put their keys and values where they go on."""
        rows = proposals.tolist()
        for seat in seats.tolist():
            self._searches[seat].advance(
                [Continuation(score, int(parent), int(token), lp) for score, parent, token, lp in rows[seat]]
            )
        ended = {seat: self._searches.pop(seat).best for seat in seats.tolist() if self._searches[seat].is_done}
        self._keep((seat for seat in seats.tolist() if seat not in ended), window)
        return ended

    def _keep(self, seats: Iterable[int], window: int) -> None:
        """Let each slot go on as its beam, which continues a slot of its own group; those that move come first."""
        width = self.slots_per_seat
        kept = [
            (seat * width + beam.parent, seat * width + place, beam.draft.token_ids[-1], beam.score)
            for seat in seats
            for place, beam in enumerate(self._searches[seat].beams)
        ]
        kept.sort(key=lambda row: row[0] == row[1])
        if not kept:
            return
        num_moved = sum(parent != slot for parent, slot, *_ in kept)
        rows = upload(kept, self._model.buffers.kv.device)  # float64, which holds slots and tokens as they are
        parents, slots, token_ids = rows[:, :3].long().unbind(1)
        if num_moved:
            self._model.reorder(parents[:num_moved], slots[:num_moved], window)
        self._model.buffers.token_ids[slots] = token_ids
        self._model.buffers.beam_scores[slots] = rows[:, 3].float()
