"""The engine's input and output: requests, forks, redraws, hypotheses, generations."""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

from torch import Tensor

from captioner.schema import FinishReason

AllowedTokens = Callable[[Sequence[int]], Tensor]
"""From the tokens of a caption so far to bool[V] on the CPU: true for each token that may come next."""

IsStopped = Callable[[Sequence[int]], bool]
"""From the tokens of a caption so far to whether it ends with them."""


@dataclass(frozen=True, slots=True)
class Hypothesis:
    """One caption of an image, as token ids."""

    token_ids: tuple[int, ...]
    """Without the end token."""

    finish_reason: FinishReason
    """Why it ended."""

    mean_logprob: float
    """Mean natural log-probability of the tokens, the end token included, under the model's own softmax: before
    temperature, penalties, top_k, top_p and min_p, so that captions of different decoding options compare."""

    min_logprob: float
    """Log-probability of the least probable token, the end token included."""

    score: float
    """Hypotheses are ranked by it: transformers' beam score in a beam search, else `mean_logprob`."""


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Redraw:
    """Which captions of a text are written once more, from the same prompt. Not those of a beam search."""

    is_wanted: Callable[[Hypothesis], bool]
    """Called with each caption that ends: true if it is to be written once more."""

    most: int
    """How often at most, for each caption."""

    decoding: int
    """Which of the engine's decodings chooses the tokens then. Its draws are those of further captions."""


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Fork:
    """One text to write about an image: the prompt after the image, and what it changes of the decoding."""

    suffix: Tensor | None = None
    """float[Q, D]: what the model reads between the request's prefix and this text; None for nothing."""

    seed: int | None = None
    """64 bits; every draw for this text depends on it alone. None: the request's."""

    max_new_tokens: int | None = None
    """A lower limit than the engine's. None: the request's."""

    allowed_tokens: AllowedTokens | None = None
    """Called before every token of each caption; only what it allows is chosen. Log-probabilities stay the model's own.
    It must allow a token that `min_new_tokens` does not forbid."""

    is_stopped: IsStopped | None = None
    """Called after every token of each caption, true if the tokens so far contain a stop string. None: never."""

    decoding: int = 0
    """Which of the engine's decodings chooses the tokens."""

    redraw: Redraw | None = None
    """Which of its captions are written once more; None for none."""

    @property
    def suffix_len(self) -> int:
        """Tokens Q of the suffix."""
        return 0 if self.suffix is None else len(self.suffix)


@dataclass(frozen=True, slots=True, eq=False)
class Request:
    """One image to caption. What the model reads of it is computed once for all its forks."""

    id: Hashable
    """Returned with the captions; the engine does not read it."""

    prefix: Tensor
    """float[P, D]: the embeddings that follow the shared prefix. Requests of one engine may differ in P, at least 1."""

    seed: int = 0
    """64 bits from the job's seed and the image's id; every draw for this image depends on it alone."""

    max_new_tokens: int | None = None
    """A lower limit than the engine's, for this image."""

    forks: tuple[Fork, ...] = (Fork(),)
    """The texts to write; by default one, which begins after the prefix."""

    def seed_of(self, fork: Fork) -> int:
        """Return the seed of a fork's draws."""
        return self.seed if fork.seed is None else fork.seed

    def limit_of(self, fork: Fork, most: int) -> int:
        """Return the most tokens of a fork's captions, where the engine allows `most`."""
        limits = (self.max_new_tokens, fork.max_new_tokens)
        return min([most, *(limit for limit in limits if limit)])


PendingHypotheses = Callable[[], tuple[Hypothesis, ...]]
"""Builds the hypotheses of a finished search when it is called: the next step need not wait for that."""


@dataclass(frozen=True, slots=True)
class Generation:
    """The captions of one image: of each fork `num_captions` hypotheses and those before a redraw, best first."""

    id: Hashable
    forks: tuple[tuple[Hypothesis, ...], ...]
    """In the order of the request's forks."""

    @property
    def hypotheses(self) -> tuple[Hypothesis, ...]:
        """The hypotheses of the first fork, best first."""
        return self.forks[0]

    @property
    def best(self) -> Hypothesis:
        """The first fork's hypothesis with the highest score."""
        return self.hypotheses[0]
