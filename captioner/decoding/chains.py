"""The captions that grow token by token, greedily or by drawing: those of all seats side by side, since a step of 256
of them must not cost the host 256 calls."""

import numpy as np
from numpy.typing import NDArray

from captioner.decoding.draft import Draft, Endings
from captioner.decoding.request import Hypothesis
from captioner.decoding.seats import Places


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

    def begin(self, seat: int, max_new_tokens: int) -> None:
        """Begin a caption of at most `max_new_tokens`, that are at least 1."""
        self._num_tokens[seat] = self._sum_logprobs[seat] = self._min_logprobs[seat] = 0
        self._limits[seat] = max_new_tokens

    def move(self, sources: Places, targets: Places) -> None:
        """Let the captions of some seats go on in others."""
        for array in self._arrays:
            array[targets] = array[sources]

    def advance(
        self, seats: Places, token_ids: NDArray[np.int64], logprobs: NDArray[np.float64]
    ) -> dict[int, tuple[Hypothesis, ...]]:
        """Take one step's token of each seat; return the captions that end with it, by seat."""
        num_before = self._num_tokens[seats]
        self._token_ids[seats, num_before] = token_ids
        self._num_tokens[seats] += 1
        self._sum_logprobs[seats] += logprobs
        self._min_logprobs[seats] = np.minimum(self._min_logprobs[seats], logprobs)
        may_end = self._endings.may_be(token_ids) | (num_before + 1 >= self._limits[seats])
        found = ((seat, self._ended(seat)) for seat in seats[may_end].tolist())
        return {seat: ended for seat, ended in found if ended}

    def _ended(self, seat: int) -> tuple[Hypothesis, ...]:
        """Return the seat's caption if it is one, else nothing."""
        token_ids = self._token_ids[seat, : self._num_tokens[seat]].tolist()
        draft = Draft(tuple(token_ids), float(self._sum_logprobs[seat]), float(self._min_logprobs[seat]))
        reason = self._endings.reason(draft, int(self._limits[seat]))
        return () if reason is None else (self._endings.hypothesis(draft, reason),)
