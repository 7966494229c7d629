"""Beam search of one image, on the host: which beams continue, which are finished, when the search is done.

The device proposes the best continuations of an image's beams; this module decides as transformers' `_beam_search`
does for a batch of one: the same scores, length penalty and stopping rules. Knows no tensors.
"""

import math
from collections.abc import Sequence
from operator import attrgetter
from typing import NamedTuple

from captioner.config import DecodingConfig
from captioner.decoding.request import Hypothesis
from captioner.decoding.sequences import PartialSequence, StopConditions
from captioner.schema import FinishReason

_MINUS_INFINITY = -1.0e9  # as in transformers: finite, so that sums stay comparable


class Continuation(NamedTuple):
    """One more token for one beam, as the device proposes it."""

    score: float
    """Sum of the processed log-probabilities of all tokens, this one included."""

    parent: int
    token_id: int
    logprob: float
    """Log-probability of this token alone, under the model's own softmax."""


class Beam(NamedTuple):
    """A sequence that goes on, and the beam of the previous step that it continues."""

    score: float
    parent: int = 0
    sequence: PartialSequence = PartialSequence()


class BeamSearch:
    """The beams of one image, best first; call `advance` with the proposals of each step."""

    def __init__(self, decoding: DecodingConfig, stop_conditions: StopConditions, max_new_tokens: int) -> None:
        self.beams = [Beam(0.0)] + [Beam(_MINUS_INFINITY)] * (decoding.num_beams - 1)
        self.is_done = False
        self._decoding = decoding
        self._stop_conditions = stop_conditions
        self._max_new_tokens = max_new_tokens
        self._finished: list[Hypothesis] = []

    def advance(self, continuations: Sequence[Continuation]) -> None:
        """Continue with one step's proposals, best first. Only the first num_beams of them may finish; the others let
        num_beams beams go on when some of the best have ended."""
        num_beams = self._decoding.num_beams
        running, ended = [], []
        for rank, continuation in enumerate(continuations):
            beam = self._extend(continuation)
            reason = self._stop_conditions.finish_reason(beam.sequence, self._max_new_tokens)
            if reason is None:
                running.append(beam)
                continue
            ended.append(beam._replace(score=beam.score + _MINUS_INFINITY))
            if rank < num_beams:
                self._finished.append(self._finish(beam, reason))
        self._finished = sorted(self._finished, key=attrgetter("score"), reverse=True)[:num_beams]
        self.beams = (running + ended)[:num_beams]
        self.is_done = not running or not self._can_improve()

    def best(self) -> tuple[Hypothesis, ...]:
        """Return the num_captions best finished hypotheses, best first."""
        return tuple(self._finished[: self._decoding.num_captions])

    def _extend(self, continuation: Continuation) -> Beam:
        before = self.beams[continuation.parent].sequence
        sequence = before.extended(continuation.token_id, continuation.logprob)
        return Beam(continuation.score, continuation.parent, sequence)

    def _finish(self, beam: Beam, reason: FinishReason) -> Hypothesis:
        return self._stop_conditions.hypothesis(beam.sequence, reason, self._normalised(beam))

    def _can_improve(self) -> bool:
        """Whether the best running beam, if it ended now, would still rank among the finished ones."""
        if len(self._finished) < self._decoding.num_beams:
            return True
        return not self._decoding.early_stopping and self._normalised(self.beams[0]) > self._finished[-1].score

    def _normalised(self, beam: Beam) -> float:
        return beam.score / math.pow(len(beam.sequence.token_ids), self._decoding.length_penalty)
