"""Captions as they grow, on the host: their tokens, their log-probabilities, and when they end. Knows no tensors."""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from captioner.decoding.request import Hypothesis, IsStopped, PendingHypotheses
from captioner.decoding.slots import Lanes
from captioner.schema import FinishReason


class PartialSequence(NamedTuple):
    """The tokens of a caption so far, end token included, and their log-probabilities under the model."""

    token_ids: tuple[int, ...] = ()
    sum_logprob: float = 0.0
    min_logprob: float = 0.0

    def extended(self, token_id: int, logprob: float) -> "PartialSequence":
        """Return the sequence with one more token."""
        return PartialSequence((*self.token_ids, token_id), self.sum_logprob + logprob, min(self.min_logprob, logprob))


class StopConditions:
    """Decides when a partial sequence ends, and turns an ended one into a hypothesis."""

    def __init__(self, eos_token_ids: Sequence[int], is_stopped: IsStopped | None = None) -> None:
        self._eos_token_ids = frozenset(eos_token_ids)
        self._eos_array = np.array(list(eos_token_ids), np.int64)
        self.is_stopped = is_stopped
        """True if the tokens contain a stop string; None without stop strings."""

    def are_end_tokens(self, token_ids: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Return bool[n]: true where int64[n] has an end token."""
        found: NDArray[np.bool_] = (token_ids[:, None] == self._eos_array).any(1)
        return found

    def with_check(self, is_stopped: IsStopped | None) -> "StopConditions":
        """Return these conditions with another check for stop strings, if there is one."""
        return self if is_stopped is None else StopConditions(self._eos_array.tolist(), is_stopped)

    def finish_reason(self, sequence: PartialSequence, max_new_tokens: int) -> FinishReason | None:
        """Return why the sequence ends with its newest token, or None if it goes on."""
        if sequence.token_ids[-1] in self._eos_token_ids:
            return FinishReason.STOP
        if self.is_stopped is not None and self.is_stopped(sequence.token_ids):
            return FinishReason.STOP
        return FinishReason.LENGTH if len(sequence.token_ids) >= max_new_tokens else None

    def hypothesis(self, sequence: PartialSequence, reason: FinishReason, score: float | None = None) -> Hypothesis:
        """Return the finished caption; its score is the mean log-probability unless given."""
        mean_logprob = sequence.sum_logprob / len(sequence.token_ids)
        has_end_token = sequence.token_ids[-1] in self._eos_token_ids
        return Hypothesis(
            token_ids=sequence.token_ids[:-1] if has_end_token else sequence.token_ids,
            finish_reason=reason,
            mean_logprob=mean_logprob,
            min_logprob=sequence.min_logprob,
            score=mean_logprob if score is None else score,
        )


class Sequences:
    """One growing caption per lane, in arrays: a step of 256 captions must not cost the host 256 calls."""

    def __init__(self, num_lanes: int, max_new_tokens: int, stop_conditions: StopConditions) -> None:
        self._stop_conditions = stop_conditions
        self._checks: list[IsStopped | None] = [None] * num_lanes
        self._token_ids = np.zeros((num_lanes, max_new_tokens), np.int64)
        self._num_tokens = np.zeros(num_lanes, np.int64)
        self._limits = np.zeros(num_lanes, np.int64)
        self._sum_logprobs = np.zeros(num_lanes)
        self._min_logprobs = np.zeros(num_lanes)
        self._arrays = (self._token_ids, self._num_tokens, self._limits, self._sum_logprobs, self._min_logprobs)

    def begin(self, lanes: Lanes, limits: NDArray[np.int64], checks: Sequence[IsStopped | None]) -> None:
        """Start an empty caption in each lane. limits: int64[n], the most tokens of each, at least 1. checks: for stop
        strings, None for none."""
        for lane, check in zip(lanes.tolist(), checks, strict=True):
            self._checks[lane] = check
        self._limits[lanes] = limits
        self.restart(lanes)

    def restart(self, lanes: Lanes) -> None:
        """Empty the caption of each lane, whose limit and check stay."""
        self._num_tokens[lanes] = self._sum_logprobs[lanes] = self._min_logprobs[lanes] = 0

    def move(self, sources: Lanes, targets: Lanes) -> None:
        """Move captions from lanes `sources` to lanes `targets`."""
        for array in self._arrays:
            array[targets] = array[sources]
        for source, target in zip(sources.tolist(), targets.tolist(), strict=True):
            self._checks[target] = self._checks[source]

    def tokens(self, lane: int) -> list[int]:
        """Return the tokens of a caption so far."""
        tokens: list[int] = self._token_ids[lane, : self._num_tokens[lane]].tolist()
        return tokens

    def append(
        self, lanes: Lanes, token_ids: NDArray[np.int64], logprobs: NDArray[np.float64]
    ) -> dict[int, PendingHypotheses]:
        """Append one token to the caption of each lane; return the captions that end with it, by lane."""
        num_before = self._num_tokens[lanes]
        self._token_ids[lanes, num_before] = token_ids
        self._num_tokens[lanes] += 1
        self._sum_logprobs[lanes] += logprobs
        self._min_logprobs[lanes] = np.minimum(self._min_logprobs[lanes], logprobs)
        is_stopped = self._stop_conditions.are_end_tokens(token_ids) | self._have_stop_strings(lanes)
        is_finished = is_stopped | (num_before + 1 >= self._limits[lanes])
        finished = lanes[is_finished]
        arrays = (self._token_ids, self._num_tokens, self._sum_logprobs, self._min_logprobs)
        states = [is_stopped[is_finished], *(array[finished] for array in arrays)]  # copies: lanes are reused at once
        return {lane: partial(self._finished, *state) for lane, *state in zip(finished.tolist(), *states, strict=True)}

    def _have_stop_strings(self, lanes: Lanes) -> NDArray[np.bool_]:
        checks = [(lane, self._checks[lane]) for lane in lanes.tolist()]
        return np.array([check is not None and check(self.tokens(lane)) for lane, check in checks], bool)

    def _finished(
        self,
        is_stopped: np.bool_,
        token_ids: NDArray[np.int64],
        num_tokens: np.int64,
        sum_logprob: np.float64,
        min_logprob: np.float64,
    ) -> tuple[Hypothesis, ...]:
        """Return the one hypothesis of a lane from its row of each array."""
        sequence = PartialSequence(tuple(token_ids[:num_tokens].tolist()), float(sum_logprob), float(min_logprob))
        reason = FinishReason.STOP if is_stopped else FinishReason.LENGTH
        return (self._stop_conditions.hypothesis(sequence, reason),)
