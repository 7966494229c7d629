"""Flags for scoring captions."""

from dataclasses import dataclass
from typing import Literal

__all__ = ["Ranking", "ScoringConfig"]

Ranking = Literal["logprob", "clip-score"]


@dataclass(frozen=True, kw_only=True)
class ScoringConfig:
    """How captions are scored beside their log probabilities, and which of several is the best."""

    clip_score: bool = False
    """Write the CLIPScore of every caption (arXiv:2104.08718) into the column `clip_score`.
    Needs a bundle whose CLIP has its text tower."""

    rerank: Ranking = "logprob"
    """Which of --num-captions is the best: the most probable, or the one with the highest CLIPScore."""

    @property
    def needs_text_tower(self) -> bool:
        """Whether CLIP's text tower has to read the captions."""
        return self.clip_score or self.rerank == "clip-score"
