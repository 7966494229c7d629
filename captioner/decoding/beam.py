"""Beam search of one image, on the host: which beams go on, which are finished, when no better one can come.

The device proposes the best continuations of an image's beams; this module decides as transformers' `_beam_search`
does for a batch of one: its scores, its length penalty, its rules for stopping. Knows no tensors.
"""

import math
from collections.abc import Sequence
from operator import attrgetter
from typing import NamedTuple

from captioner.config import DecodingConfig
from captioner.decoding.draft import Draft, Endings
from captioner.decoding.request import Hypothesis
from captioner.rows import FinishReason

_NEVER = -1.0e9


class Continuation(NamedTuple):
    """One more token for one beam, as the device proposes it."""

    score: float
    """Sum of the processed log-probabilities of all tokens, this one included."""

    parent: int
    token_id: int
    logprob: float
    """Of this token alone, under the model's own softmax."""


class Beam(NamedTuple):
    """A draft that goes on, and the beam of the step before that it continues."""

    score: float
    parent: int = 0
    draft: Draft = Draft()


class BeamSearch:
    """The beams of one image, best first; `advance` is called with each step's proposals."""

    def __init__(self, decoding: DecodingConfig, endings: Endings, max_new_tokens: int) -> None:
        self.beams = [Beam(0.0)] + [Beam(_NEVER)] * (decoding.num_beams - 1)
        self.is_done = False
        self._decoding = decoding
        self._endings = endings
        self._max_new_tokens = max_new_tokens
        self._finished: list[Hypothesis] = []

    def advance(self, continuations: Sequence[Continuation]) -> None:
        """Take one step's proposals, best first. Only the first num_beams of them may finish; the others are there
        so that num_beams can go on when some of the best have ended."""
        num_beams = self._decoding.num_beams
        running, ended = [], []
        for place, continuation in enumerate(continuations):
            beam = self._extend(continuation)
            reason = self._endings.reason(beam.draft, self._max_new_tokens)
            if reason is None:
                running.append(beam)
                continue
            ended.append(beam._replace(score=beam.score + _NEVER))
            if place < num_beams:
                self._finished.append(self._finish(beam, reason))
        self._finished = sorted(self._finished, key=attrgetter("score"), reverse=True)[:num_beams]
        self.beams = (running + ended)[:num_beams]
        self.is_done = not running or not self._can_improve()

    def best(self) -> tuple[Hypothesis, ...]:
        """Return the num_captions best finished hypotheses, best first."""
        return tuple(self._finished[: self._decoding.num_captions])

    def _extend(self, continuation: Continuation) -> Beam:
        draft = self.beams[continuation.parent].draft
        return Beam(
            continuation.score, continuation.parent, draft.extended(continuation.token_id, continuation.logprob)
        )

    def _finish(self, beam: Beam, reason: FinishReason) -> Hypothesis:
        return self._endings.hypothesis(beam.draft, reason, self._normalised(beam))

    def _can_improve(self) -> bool:
        """Whether the best running beam, were it to end now, would still be among the finished."""
        if len(self._finished) < self._decoding.num_beams:
            return True
        return not self._decoding.early_stopping and self._normalised(self.beams[0]) > self._finished[-1].score

    def _normalised(self, beam: Beam) -> float:
        return beam.score / math.pow(len(beam.draft.token_ids), self._decoding.length_penalty)
