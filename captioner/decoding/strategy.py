"""How a step chooses tokens: one for each slot, or beams.

The device half of a strategy, `propose`, can be recorded with the forward. The host half, `accept`, reads its small
result and continues the search of each lane: one caption, or one beam search.
"""

from collections.abc import Hashable, Iterable, Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from captioner.config import DecodingConfig
from captioner.decoding.beam import BeamSearch, Continuation
from captioner.decoding.layout import StepShape
from captioner.decoding.request import AllowedTokens, Fork, PendingHypotheses
from captioner.decoding.sampling import (
    ScorePenalties,
    greedy,
    sample,
    token_logprobs,
    top_candidates,
    uniform,
)
from captioner.decoding.sequences import Sequences, StopConditions
from captioner.decoding.slots import Lanes
from captioner.decoding.step import SlotBuffers, SlotModel, upload

Finished = dict[int, PendingHypotheses]
"""The finished searches, by lane."""


class Strategy(Protocol):
    """A way to decode, as the engine uses it."""

    slots_per_lane: int

    def begin(self, lanes: Lanes, limits: NDArray[np.int64], forks: Sequence[Fork], /) -> None:
        """Start a search in each lane. limits: int64[n], most tokens of each. forks: what each writes."""

    def restart(self, lane: int, decoding: int, /) -> None:
        """Start the caption of a lane once more; another of the decodings chooses its tokens."""

    def move(self, sources: Lanes, targets: Lanes, /) -> None:
        """Move searches from lanes `sources` to lanes `targets`."""

    def prepare(self, lanes: Lanes, /) -> None:
        """Set what the device half must know of the lanes that decode in the next step."""

    def propose(self, shape: StepShape) -> Tensor:
        """Choose for the first R rows without a host read; return the proposals for `accept`."""

    def accept(self, proposals: Tensor, lanes: Lanes, generated: slice, /) -> Finished:
        """Continue the searches of the lanes that decode with a step's proposals; return those that are finished.

        generated: the own columns that hold generated tokens."""


def engine_key(decoding: DecodingConfig) -> Hashable:
    """Return what decodings must have in common to share an engine: nothing, but beams what the device knows."""
    return None if decoding.num_beams == 1 else (decoding.num_beams, _Method.kind(decoding))


class _Method:
    """A way to choose one token for each row, as decodings with the same options do."""

    def __init__(self, decoding: DecodingConfig, eos_token_ids: Tensor) -> None:
        self.penalties = ScorePenalties(decoding, eos_token_ids)
        self._decoding = decoding

    @staticmethod
    def kind(decoding: DecodingConfig) -> tuple[object, ...]:
        """Return what of a decoding decides on a token."""
        of_draws = ("temperature", "top_k", "top_p", "min_p") if decoding.do_sample else ()
        names = ("do_sample", *of_draws, "repetition_penalty", "min_new_tokens")
        return tuple(getattr(decoding, name) for name in names)

    def choose(
        self, logits: Tensor, buffers: SlotBuffers, rows: slice | Tensor, *, looks_at_all: bool
    ) -> tuple[Tensor, Tensor]:
        """Return a token of each row, int64[R], and whether it was chosen from all tokens that may be, bool[R]."""
        num_generated = buffers.num_generated[rows]
        scores = self.constrained(self.penalties(logits, num_generated, buffers.history[rows]), buffers, rows)
        if not self._decoding.do_sample:
            return greedy(scores), torch.ones_like(num_generated, dtype=torch.bool)
        uniforms = uniform(buffers.seeds[rows], num_generated)
        return sample(scores, uniforms, self._decoding, looks_at_all=looks_at_all)

    def constrained(self, scores: Tensor, buffers: SlotBuffers, rows: slice | Tensor) -> Tensor:
        """Return the scores, float32[R, V], of no token but the allowed ones."""
        if buffers.allowed is None:
            return scores
        return scores.masked_fill(~buffers.allowed[rows], -torch.inf)


class TokenStrategy:
    """One token for each slot and step: the most probable one, or a draw.

    Captions of several decodings share a step: each method chooses for all rows, and each row takes its own."""

    slots_per_lane = 1

    def __init__(
        self,
        model: SlotModel,
        decodings: Sequence[DecodingConfig],
        eos_token_ids: Tensor,
        stop_conditions: StopConditions,
    ) -> None:
        self._model = model
        kinds = list(dict.fromkeys(map(_Method.kind, decodings)))
        self._method_of_decoding = [kinds.index(_Method.kind(decoding)) for decoding in decodings]
        self._methods = [
            _Method(decodings[self._method_of_decoding.index(number)], eos_token_ids) for number in range(len(kinds))
        ]
        self._used_methods = list(range(len(kinds)))  # by the next step; a recorded one has all
        self._method_of_lane = np.zeros(model.layout.num_slots, np.int64)
        self._sequences = Sequences(model.layout.num_slots, model.layout.max_new_tokens, stop_conditions)
        self._constraints: dict[int, AllowedTokens] = {}
        self._masked: set[int] = set()  # lanes whose row of `allowed` forbids something

    def begin(self, lanes: Lanes, limits: NDArray[np.int64], forks: Sequence[Fork], /) -> None:
        """Start a caption in each lane."""
        self._sequences.begin(lanes, limits, [fork.is_stopped for fork in forks])
        for lane, fork in zip(lanes.tolist(), forks, strict=True):
            self._constrain(lane, fork.allowed_tokens)
        self._set_methods(lanes, [fork.decoding for fork in forks])

    def restart(self, lane: int, decoding: int, /) -> None:
        """Start the caption of a lane once more; another of the decodings chooses its tokens."""
        lanes = np.array([lane])
        self._sequences.restart(lanes)
        self._set_methods(lanes, [decoding])

    def move(self, sources: Lanes, targets: Lanes, /) -> None:
        """Move captions from lanes `sources` to lanes `targets`, which no caption has."""
        self._sequences.move(sources, targets)
        self._method_of_lane[targets] = self._method_of_lane[sources]
        for source, target in zip(sources.tolist(), targets.tolist(), strict=True):
            self._constrain(target, self._constraints.get(source))

    def prepare(self, lanes: Lanes, /) -> None:
        """Set the methods of the captions, and the tokens that constrained ones may continue with."""
        if len(lanes):
            self._used_methods = np.unique(self._method_of_lane[lanes]).tolist()
        if self._model.buffers.allowed is None:
            return
        everything = torch.ones(self._model.buffers.allowed.shape[1], dtype=torch.bool)
        constrained = [lane for lane in lanes.tolist() if lane in self._constraints]
        released = [lane for lane in lanes.tolist() if lane in self._masked and lane not in self._constraints]
        masks = [self._constraints[lane](self._sequences.tokens(lane)) for lane in constrained]
        self._allow(constrained + released, masks + [everything] * len(released))
        self._masked = (self._masked | set(constrained)) - set(released)

    def propose(self, shape: StepShape) -> Tensor:
        """Return token id, log-probability and exactness of each row, float64[R, 3]."""
        logits = self._model.logits(shape)
        if any(self._methods[number].penalties.needs_history for number in self._used_methods):
            self._model.remember(shape.num_rows)
        return self._choose(logits, slice(shape.num_rows))

    def accept(self, proposals: Tensor, lanes: Lanes, _generated: slice, /) -> Finished:
        """Append each caption's token; an inexact draw, for which the candidates did not suffice, is repeated over the
        whole vocabulary."""
        chosen = proposals.cpu().numpy()[lanes]
        is_inexact = chosen[:, 2] == 0
        if is_inexact.any():
            chosen[is_inexact] = self._choose_from_all(lanes[is_inexact])
        return self._sequences.append(lanes, chosen[:, 0].astype(np.int64), chosen[:, 1])

    def _set_methods(self, lanes: Lanes, decodings: Sequence[int]) -> None:
        if len(self._methods) > 1:
            methods = [self._method_of_decoding[decoding] for decoding in decodings]
            self._method_of_lane[lanes] = methods
            slots, numbers = upload([lanes.tolist(), methods], self._model.buffers.methods.device)
            self._model.buffers.methods[slots] = numbers

    def _constrain(self, lane: int, constraint: AllowedTokens | None) -> None:
        self._constraints.pop(lane, None)
        if constraint is not None:
            self._constraints[lane] = constraint

    def _allow(self, lanes: Sequence[int], masks: Sequence[Tensor]) -> None:
        allowed = self._model.buffers.allowed
        if allowed is not None and lanes:
            allowed[upload(lanes, allowed.device)] = torch.stack(list(masks)).to(allowed.device)

    def _choose_from_all(self, lanes: Lanes) -> NDArray[np.float64]:
        rows = upload(lanes.tolist(), self._model.buffers.token_ids.device)
        chosen = self._choose(self._model.newest_logits(rows), rows, looks_at_all=True)
        on_host: NDArray[np.float64] = chosen.cpu().numpy()
        return on_host

    def _choose(self, logits: Tensor, rows: slice | Tensor, *, looks_at_all: bool = False) -> Tensor:
        buffers, (first, *others) = self._model.buffers, self._used_methods
        token_ids, is_exact = self._methods[first].choose(logits, buffers, rows, looks_at_all=looks_at_all)
        for number in others:
            of_method = self._methods[number].choose(logits, buffers, rows, looks_at_all=looks_at_all)
            is_its_own = buffers.methods[rows] == number
            token_ids = torch.where(is_its_own, of_method[0], token_ids)
            is_exact = torch.where(is_its_own, of_method[1], is_exact)
        buffers.token_ids[rows] = token_ids
        return torch.stack([token_ids.double(), token_logprobs(logits, token_ids).double(), is_exact.double()], 1)


class BeamStrategy:
    """Beam search: the beams of one image are num_beams neighbouring slots.

    Its decodings differ in nothing that the device knows: numbers of beams and penalties."""

    def __init__(
        self,
        model: SlotModel,
        decodings: Sequence[DecodingConfig],
        eos_token_ids: Tensor,
        stop_conditions: StopConditions,
    ) -> None:
        first = decodings[0]
        assert len(set(map(engine_key, decodings))) == 1, decodings
        self.slots_per_lane = self._num_beams = first.num_beams
        self._model = model
        self._decodings = decodings
        self._stop_conditions = stop_conditions
        self._process = ScorePenalties(first, eos_token_ids)
        self._searches: dict[int, BeamSearch] = {}
        self._num_proposals = max(2, 1 + len(eos_token_ids)) * first.num_beams

    def begin(self, lanes: Lanes, limits: NDArray[np.int64], forks: Sequence[Fork], /) -> None:
        """Start a beam search in each lane."""
        assert not any(fork.allowed_tokens for fork in forks), "a beam search is not constrained"
        for lane, limit, fork in zip(lanes.tolist(), limits.tolist(), forks, strict=True):
            stops = self._stop_conditions.with_check(fork.is_stopped)
            self._searches[lane] = BeamSearch(self._decodings[fork.decoding], stops, limit)

    def restart(self, *_: int) -> None:
        """Fail: an engine refuses forks of beams that are to be written again."""
        raise AssertionError("a beam search is not written again")

    def move(self, sources: Lanes, targets: Lanes, /) -> None:
        """Move searches from lanes `sources` to lanes `targets`."""
        for source, target in zip(sources.tolist(), targets.tolist(), strict=True):
            self._searches[target] = self._searches.pop(source)

    def prepare(self, lanes: Lanes, /) -> None:
        """Do nothing: the device knows its beams."""

    def propose(self, shape: StepShape) -> Tensor:
        """Return the best continuations of each group of beams as score, parent, token id and log-probability,
        float64[G, num_proposals, 4]."""
        buffers, num_beams = self._model.buffers, self._num_beams
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

    def accept(self, proposals: Tensor, lanes: Lanes, generated: slice, /) -> Finished:
        """Keep the best beams of each search, and copy their keys and values to the slots that continue them."""
        rows = proposals.tolist()
        for lane in lanes.tolist():
            self._searches[lane].advance(
                [Continuation(score, int(parent), int(token), lp) for score, parent, token, lp in rows[lane]]
            )
        finished = {lane: self._searches.pop(lane).best for lane in lanes.tolist() if self._searches[lane].is_done}
        self._keep_beams((lane for lane in lanes.tolist() if lane not in finished), generated)
        return finished

    def _keep_beams(self, lanes: Iterable[int], generated: slice) -> None:
        """Set each slot to its beam, which continues a slot of the same lane; the slots that change come first."""
        width = self.slots_per_lane
        kept = [
            (lane * width + beam.parent, lane * width + rank, beam.sequence.token_ids[-1], beam.score)
            for lane in lanes
            for rank, beam in enumerate(self._searches[lane].beams)
        ]
        kept.sort(key=lambda row: row[0] == row[1])
        if not kept:
            return
        num_moved = sum(parent != slot for parent, slot, *_ in kept)
        rows = upload(kept, self._model.buffers.token_ids.device)  # float64, which holds slots and tokens exactly
        parents, slots, token_ids = rows[:, :3].long().unbind(1)
        if num_moved:
            self._model.reorder(parents[:num_moved], slots[:num_moved], generated)
        self._model.buffers.token_ids[slots] = token_ids
        self._model.buffers.beam_scores[slots] = rows[:, 3].float()
