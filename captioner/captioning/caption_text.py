"""From the tokens that an engine chose to captions: their texts, which of them should be drawn again, the best first.

Knows how one prompt is decoded, and what makes text of tokens; no engine and no images.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

from captioner.caption_columns import Caption
from captioner.captioning.sentences import whole_sentences
from captioner.config import DecodingConfig
from captioner.decoding import Hypothesis, Redraw
from captioner.model.constraints import Constraint
from captioner.schema import FinishReason

__all__ = ["CaptionText", "decodings_of"]


def decodings_of(decodings: Sequence[DecodingConfig]) -> list[DecodingConfig]:
    """Return the decodings of an engine: these, and behind them those by which their captions are drawn again."""
    return [*decodings, *(replace(one, do_sample=True) for one in decodings if one.redraw_repetitive)]


class CaptionText:
    """What becomes of the tokens that are written for one prompt."""

    def __init__(
        self, text_of: Callable[[list[int]], str], decoding: DecodingConfig, constraint: Constraint | None = None
    ) -> None:
        """text_of: tokens to their text, from any thread. constraint: what the captions are one of."""
        self._text_of = text_of
        self._decoding = decoding
        self._constraint = constraint

    def captions(self, hypotheses: Sequence[Hypothesis]) -> list[Caption]:
        """Return the captions of hypotheses, best first, as they are."""
        return sorted(map(self._caption, hypotheses), key=self.fault)

    def fault(self, caption: Caption) -> int:
        """Return 0 where a caption need not be drawn again, and more the worse it is: 1 where it was cut, 2 where it
        repeats itself. A constrained one may repeat itself, and may be cut where it is whole.

        0 for all where none is drawn again."""
        if not self._decoding.redraw_repetitive:
            return 0
        if self._constraint is not None:
            return int(not caption.is_whole)
        return 2 if caption.is_repetitive else int(caption.finish_reason == FinishReason.LENGTH)

    def redraw(self, decoding: int) -> Redraw | None:
        """Return which captions an engine draws again, None for none. decoding: its number of the decoding for it."""
        most = self._decoding.redraw_repetitive
        if not most:
            return None
        return Redraw(is_wanted=lambda one: self.fault(self._caption(one)) > 0, most=most, decoding=decoding)

    @property
    def stop_check(self) -> Callable[[Sequence[int]], bool] | None:
        """Whether tokens contain a stop string; None without stop strings."""
        return self._is_stopped if self._decoding.stop else None

    def _is_stopped(self, token_ids: Sequence[int]) -> bool:
        text = self._text_of(list(token_ids))
        return any(stop in text for stop in self._decoding.stop)

    def _caption(self, hypothesis: Hypothesis) -> Caption:
        text = _before(self._decoding.stop, self._text_of(list(hypothesis.token_ids)))
        is_cut = hypothesis.finish_reason == FinishReason.LENGTH
        is_trimmed = self._decoding.trim_to_sentence and is_cut and self._constraint is None
        kept = whole_sentences(text) if is_trimmed else text
        return Caption(
            caption=kept,
            num_tokens=len(hypothesis.token_ids),
            finish_reason=hypothesis.finish_reason,
            mean_logprob=hypothesis.mean_logprob,
            min_logprob=hypothesis.min_logprob,
            is_trimmed=kept != text,
            is_whole=not (self._constraint and is_cut) or self._constraint.is_whole(hypothesis.token_ids),
        )


def _before(stops: Sequence[str], text: str) -> str:
    """Return the text up to the first stop string in it."""
    ends = [found for stop in stops if (found := text.find(stop)) >= 0]
    return text[: min(ends)].rstrip() if ends else text
