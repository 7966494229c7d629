"""The captions that grow token by token, greedily or by drawing: those of all seats side by side, since a step of 256
of them must not cost the host 256 calls."""

from functools import partial

import numpy as np
from numpy.typing import NDArray

from captioner.decoding.draft import Draft, Endings
from captioner.decoding.request import Ending, Hypothesis
from captioner.decoding.seats import Places
from captioner.rows import FinishReason


class Chains:
    """One caption a seat, on the host."""

    def __init__(self, num_seats: int, max_new_tokens: int, endings: Endings) -> None:
        self._endings = endings
        self._token_ids = np.zeros((num_seats, max_new_tokens), np.int64)
        self._num_tokens = np.zeros(num_seats, np.int64)
        self._limits = np.zeros(num_seats, np.int64)
        self._sum_logprobs = np.zeros(num_seats)
        self._min_logprobs = np.zeros(num_seats)
        self._arrays = (self._token_ids, self._num_tokens, self._limits, self._sum_logprobs, self._min_logprobs)

    def begin(self, seats: Places, limits: NDArray[np.int64]) -> None:
        """Begin captions of at most so many tokens, each at least 1."""
        self._num_tokens[seats] = self._sum_logprobs[seats] = self._min_logprobs[seats] = 0
        self._limits[seats] = limits

    def move(self, sources: Places, targets: Places) -> None:
        """Let the captions of some seats go on in others."""
        for array in self._arrays:
            array[targets] = array[sources]

    def advance(self, seats: Places, token_ids: NDArray[np.int64], logprobs: NDArray[np.float64]) -> dict[int, Ending]:
        """Take one step's token of each seat; return the captions that end with it, by seat."""
        num_before = self._num_tokens[seats]
        self._token_ids[seats, num_before] = token_ids
        self._num_tokens[seats] += 1
        self._sum_logprobs[seats] += logprobs
        self._min_logprobs[seats] = np.minimum(self._min_logprobs[seats], logprobs)
        is_stopped = self._endings.are_ends(token_ids)
        if self._endings.is_stopped is not None:
            written = (self._token_ids[seat, : self._num_tokens[seat]] for seat in seats.tolist())
            is_stopped |= np.array([self._endings.is_stopped(tokens.tolist()) for tokens in written], bool)
        is_ended = is_stopped | (num_before + 1 >= self._limits[seats])
        ended = seats[is_ended]
        of_draft = (self._token_ids, self._num_tokens, self._sum_logprobs, self._min_logprobs)
        states = [is_stopped[is_ended], *(array[ended] for array in of_draft)]  # copies: the seats are soon others'
        return {seat: partial(self._caption, *state) for seat, *state in zip(ended.tolist(), *states, strict=True)}

    def _caption(
        self,
        is_stopped: np.bool_,
        token_ids: NDArray[np.int64],
        num_tokens: np.int64,
        sum_logprob: np.float64,
        min_logprob: np.float64,
    ) -> tuple[Hypothesis, ...]:
        """Return the one caption of a seat from its row of each array that a draft is made of."""
        draft = Draft(tuple(token_ids[:num_tokens].tolist()), float(sum_logprob), float(min_logprob))
        return (self._endings.hypothesis(draft, FinishReason.STOP if is_stopped else FinishReason.LENGTH),)
