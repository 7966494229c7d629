"""A caption as it grows, and when it ends. Host side, plain Python."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from captioner.decoding.request import Hypothesis
from captioner.rows import FinishReason


class Draft(NamedTuple):
    """The tokens chosen so far, end token included, and what the model thought of them."""

    token_ids: tuple[int, ...] = ()
    sum_logprob: float = 0.0
    min_logprob: float = 0.0

    def extended(self, token_id: int, logprob: float) -> "Draft":
        """Return the draft with one more token."""
        return Draft((*self.token_ids, token_id), self.sum_logprob + logprob, min(self.min_logprob, logprob))


class Endings:
    """Says whether a draft is a caption, and makes it one."""

    def __init__(self, eos_token_ids: Sequence[int], is_stopped: Callable[[Sequence[int]], bool] | None = None) -> None:
        self._eos_token_ids = frozenset(eos_token_ids)
        self._end_tokens = np.array(list(eos_token_ids), np.int64)
        self.is_stopped = is_stopped
        """Says whether a draft contains a stop string; None where there are none."""

    def are_ends(self, token_ids: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Return where a newest token is an end token."""
        found: NDArray[np.bool_] = (token_ids[:, None] == self._end_tokens).any(1)
        return found

    def reason(self, draft: Draft, max_new_tokens: int) -> FinishReason | None:
        """Return why the draft ends with its newest token, or None if it goes on."""
        if draft.token_ids[-1] in self._eos_token_ids:
            return FinishReason.STOP
        if self.is_stopped is not None and self.is_stopped(draft.token_ids):
            return FinishReason.STOP
        return FinishReason.LENGTH if len(draft.token_ids) >= max_new_tokens else None

    def hypothesis(self, draft: Draft, reason: FinishReason, score: float | None = None) -> Hypothesis:
        """Return the finished caption; its score is the mean log-probability unless given."""
        mean_logprob = draft.sum_logprob / len(draft.token_ids)
        has_end_token = draft.token_ids[-1] in self._eos_token_ids
        return Hypothesis(
            token_ids=draft.token_ids[:-1] if has_end_token else draft.token_ids,
            finish_reason=reason,
            mean_logprob=mean_logprob,
            min_logprob=draft.min_logprob,
            score=mean_logprob if score is None else score,
        )
