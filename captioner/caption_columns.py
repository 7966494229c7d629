"""One caption of an image, and the columns of the caption table that it fills: one entry each.

To add a column, add an entry to `CAPTION_COLUMNS`. Model workers then compute it, parts and the structs of `candidates`
hold it, and `jobs/query.py` reports its mean where the entry names one. In parts of earlier releases the query finds it
null, and a compaction writes null.

Knows Arrow types and text; no model and no table.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from captioner.repetition import is_repetitive

__all__ = ["CAPTION_COLUMNS", "Caption", "CaptionColumn"]


@dataclass(frozen=True, kw_only=True)
class Caption:
    """One caption with its scores; `candidates` are all captions of the image, best first, if several were wanted, or
    one was drawn again.

    clip_score: 0 to 2.5, None unless asked for. mean_logprob, min_logprob: of its tokens, at most 0; num_tokens and
    they are of all tokens that the model wrote. is_trimmed: whether `--trim-to-sentence` took its end away. is_whole:
    false for one that a constraint does not allow to end where it was cut."""

    caption: str
    num_tokens: int
    finish_reason: str
    mean_logprob: float
    min_logprob: float
    clip_score: float | None = None
    candidates: tuple["Caption", ...] = ()
    is_trimmed: bool = False
    is_whole: bool = True

    def __str__(self) -> str:
        return self.caption

    @property
    def is_repetitive(self) -> bool:
        """Whether it repeats itself; see `captioner.repetition`."""
        return is_repetitive(self.caption)


@dataclass(frozen=True, kw_only=True)
class CaptionColumn:
    """A column that each caption fills."""

    name: str
    type: pa.DataType

    compute: Callable[[Caption], Any] | None = None
    """From a caption to its value; by default the caption's attribute of this name."""

    nullable: bool = False
    """Whether a caption on disk may have a null."""

    mean_name: str | None = None
    """Name in a summary of its mean over a table, or of a flag's share; None: the summary leaves it out."""

    score_rank: int | None = None
    """Rank among the scores of how good a caption is, 1 for the most telling; None: it is no such score."""

    def value(self, caption: Caption) -> Any:
        """Return what stands in this column for a caption."""
        return getattr(caption, self.name) if self.compute is None else self.compute(caption)


CAPTION_COLUMNS = [
    CaptionColumn(name="caption", type=pa.string()),
    CaptionColumn(name="num_tokens", type=pa.int32(), mean_name="mean_tokens"),
    CaptionColumn(name="finish_reason", type=pa.string()),
    CaptionColumn(name="mean_logprob", type=pa.float32(), mean_name="mean_logprob", score_rank=2),
    CaptionColumn(name="min_logprob", type=pa.float32(), score_rank=3),
    CaptionColumn(name="clip_score", type=pa.float32(), nullable=True, mean_name="mean_clip_score", score_rank=1),
    CaptionColumn(name="is_repetitive", type=pa.bool_(), mean_name="repetitive_share"),
]
"""Every column that a caption fills, in the order of the table."""
