"""Flags for decoding a caption."""

import math
from dataclasses import dataclass

from captioner.config.checks import check, flag_name, typed

__all__ = ["DecodingConfig"]

_OF_SAMPLING = ("temperature", "top_k", "top_p", "min_p")
_MOST_REDRAWS = 100
_REDRAWS = f"0 (off) to {_MOST_REDRAWS}"


@dataclass(frozen=True, kw_only=True)
class DecodingConfig:
    """How tokens are chosen. Names and meanings are those of transformers' `GenerationConfig`."""

    max_new_tokens: int = 64
    """Longest caption, in tokens; a caption cut here has finish_reason `length`."""

    min_new_tokens: int = 0
    """Shortest caption, in tokens: the end token is not allowed before."""

    do_sample: bool = False
    """Sample tokens instead of taking the most probable one. The sample depends on the seed and the image only."""

    temperature: float = 1.0
    """Divide the logits by this before sampling; below 1 favours the most probable tokens."""

    top_k: int = 50
    """Sample among the k most probable tokens; 0 for all."""

    top_p: float = 1.0
    """Sample among the fewest tokens whose probabilities reach this sum."""

    min_p: float = 0.0
    """Sample among tokens at least this share as probable as the best one."""

    repetition_penalty: float = 1.0
    """Above 1 makes tokens that the caption already has less probable."""

    num_beams: int = 1
    """Beams of beam search; 1 turns it off."""

    length_penalty: float = 1.0
    """Exponent of the length in a beam's score; above 0 favours longer captions."""

    early_stopping: bool = False
    """End the beam search when num_beams captions are complete, rather than when no better one is possible."""

    num_captions: int = 1
    """Captions of each image. The best one is its caption; all are in the column `candidates`, best first."""

    redraw_repetitive: int = 0
    """Draw a caption that repeats itself, or was cut at --max-new-tokens, again with sampling, at most so often.
    The first that does neither is the caption, and all tries are in the column `candidates`. 0: never."""

    trim_to_sentence: bool = False
    """End a caption that was cut at --max-new-tokens at its last whole sentence; one without any stays as it is."""

    stop: tuple[str, ...] = ()
    """Strings that end a caption; they are not part of it. As `a,b`, or as a JSON list; `\\n` is a line break."""

    seed: int = 0
    """Seed of sampling."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop", tuple(map(typed, self.stop)))
        check(self.max_new_tokens >= 1, "--max-new-tokens", self.max_new_tokens, "at least 1")
        check(
            0 <= self.min_new_tokens <= self.max_new_tokens,
            "--min-new-tokens",
            self.min_new_tokens,
            f"0 to --max-new-tokens ({self.max_new_tokens})",
        )
        for name in ("temperature", "repetition_penalty", "length_penalty"):
            check(math.isfinite(getattr(self, name)), flag_name(name), getattr(self, name), "a number that is finite")
        check(self.temperature > 0, "--temperature", self.temperature, "more than 0 (for greedy: --no-do-sample)")
        check(self.top_k >= 0, "--top-k", self.top_k, "0 (off) or more")
        check(0 < self.top_p <= 1, "--top-p", self.top_p, "above 0, at most 1")
        check(0 <= self.min_p <= 1, "--min-p", self.min_p, "0 to 1")
        check(self.repetition_penalty > 0, "--repetition-penalty", self.repetition_penalty, "more than 0")
        check(self.num_beams >= 1, "--num-beams", self.num_beams, "at least 1")
        check(self.num_captions >= 1, "--num-captions", self.num_captions, "at least 1")
        check(0 <= self.redraw_repetitive <= _MOST_REDRAWS, "--redraw-repetitive", self.redraw_repetitive, _REDRAWS)
        check(all(self.stop), "--stop", ",".join(self.stop), "strings of at least one character")
        self._check_strategy()

    @property
    def is_drawn(self) -> bool:
        """Whether a caption may depend on the seed and the name of its image."""
        return self.do_sample or self.redraw_repetitive > 0

    def _check_strategy(self) -> None:
        is_by_token = self.num_beams == 1 or not self.redraw_repetitive
        check(is_by_token, "--redraw-repetitive", self.redraw_repetitive, f"0 with --num-beams {self.num_beams}")
        if self.do_sample:
            check(self.num_beams == 1, "--num-beams", self.num_beams, "1 with --do-sample")
            return
        for name in _OF_SAMPLING:  # elsewhere they would do nothing
            value = getattr(self, name)
            is_used = self.is_drawn or value == getattr(DecodingConfig, name)
            check(is_used, flag_name(name), value, "--do-sample or --redraw-repetitive with it")
        if self.num_beams == 1:
            check(
                self.num_captions == 1, "--num-captions", self.num_captions, "1, or --do-sample, or --num-beams >= it"
            )
        else:
            check(
                self.num_captions <= self.num_beams,
                "--num-captions",
                self.num_captions,
                f"at most --num-beams ({self.num_beams})",
            )
