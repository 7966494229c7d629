"""What goes into the engine and what comes out of it."""

from collections.abc import Callable, Hashable
from dataclasses import dataclass

from torch import Tensor

from captioner.rows import FinishReason


@dataclass(frozen=True, slots=True, eq=False)
class Request:
    """One image to caption."""

    id: Hashable
    """Comes back with the caption; the engine does not look at it."""

    prefix: Tensor
    """float[P, D]: what the model reads after the shared prefix, embedded. One engine, one P."""

    seed: int = 0
    """64 bits from the job's seed and the image's id; all draws of this image depend on it alone."""

    max_new_tokens: int | None = None
    """A lower limit than the engine's, for this image."""


@dataclass(frozen=True, slots=True)
class Hypothesis:
    """One caption of an image, as token ids."""

    token_ids: tuple[int, ...]
    """Without the end token."""

    finish_reason: FinishReason
    """Why it ended."""

    mean_logprob: float
    """Mean natural log-probability of the tokens, the end token included, under the model's own softmax: before
    temperature, penalties and cuts, so that captions compare whatever the decoding options."""

    min_logprob: float
    """That of the least probable token, the end token included."""

    score: float
    """What hypotheses are ranked by: transformers' beam score in a beam search, else `mean_logprob`."""


Ending = Callable[[], tuple[Hypothesis, ...]]
"""What a search that is done has found; put together when it is asked for, for which no device need wait."""


@dataclass(frozen=True, slots=True)
class Generation:
    """All that was asked for of one image: `num_captions` hypotheses, best first."""

    id: Hashable
    hypotheses: tuple[Hypothesis, ...]

    @property
    def best(self) -> Hypothesis:
        """The hypothesis with the highest score."""
        return self.hypotheses[0]
