"""Constraints on what a caption may be: a choice of texts, a regular expression, a JSON schema.

llguidance works out from the tokenizer which tokens may come next. Knows tokenizers and token ids; not how tokens are
chosen.
"""

import json
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from captioner.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Constraint"]

_ONE_SPACE = {"whitespace_pattern": " ?"}  # a model that is unsure would write them up to its limit
_KEPT_STATES = 256


@dataclass(slots=True)
class _State:
    """What may follow some tokens: most captions begin alike, and those of a choice are alike."""

    matcher: Any
    allowed: "Tensor | None" = None


class Constraint:
    """The texts that a caption may be, for one tokenizer. Call `allowed_tokens` as the engine does, from one thread."""

    def __init__(self, spec: Mapping[str, Any], tokenizer_json: str, eos_token_ids: Sequence[int], where: str) -> None:
        """Compile a constraint.

        spec: `{"choice": [...]}`, `{"regex": "..."}` or `{"json_schema": {...}}`. tokenizer_json: as in tokenizer.json.
        Raises ConfigError, naming `where`, for a grammar that llguidance does not take."""
        from llguidance import LLMatcher  # here, not above: a job without constraints needs none of it

        self._tokenizer = _tokenizer_of(tokenizer_json, tuple(eos_token_ids))
        grammar = _grammar(spec)
        problem = LLMatcher.validate_grammar(grammar, self._tokenizer)
        if problem:
            raise ConfigError(f"{where}: {_first_line(problem)}; expected one that llguidance takes")
        self._matcher: Any = LLMatcher(self._tokenizer, grammar)
        self._states: OrderedDict[tuple[int, ...], _State] = OrderedDict()

    def allowed_tokens(self, token_ids: Sequence[int]) -> "Tensor":
        """Return bool[V], true for each token that may follow these, V the tokenizer's words; the end tokens once the
        text is whole."""
        state = self._state(tuple(token_ids))
        if state.allowed is None:
            state.allowed = _unpacked(state.matcher.compute_bitmask(), self._tokenizer.vocab_size)
        return state.allowed

    def is_whole(self, token_ids: Sequence[int]) -> bool:
        """Return whether a text of these tokens is one that a caption may be, rather than the beginning of one.

        token_ids: without an end token. From any thread."""
        matcher = self._matcher.deep_copy()
        return bool(matcher.consume_tokens(list(token_ids)) and matcher.is_accepting())

    def _state(self, token_ids: tuple[int, ...]) -> "_State":
        """Return the state behind these tokens: most often that of all but the last one, a token further."""
        known = self._states.get(token_ids)
        if known is None:
            before = self._states.get(token_ids[:-1]) if token_ids else None
            matcher = (before.matcher if before else self._matcher).deep_copy()  # others may go on from it
            rest = token_ids if before is None else token_ids[-1:]
            matcher.consume_tokens(list(rest))
            known = self._states[token_ids] = _State(matcher)
            if len(self._states) > _KEPT_STATES:
                self._states.popitem(last=False)
        return known


@lru_cache(maxsize=1)
def _tokenizer_of(tokenizer_json: str, eos_token_ids: tuple[int, ...]) -> Any:
    """Return llguidance's tokenizer, one for all constraints of a model: LLaMA-3's takes 0.3 s to build."""
    from llguidance import LLTokenizer

    return LLTokenizer(tokenizer_json, eos_token=list(eos_token_ids))


def _unpacked(bits: bytes, num_words: int) -> "Tensor":
    """Return bool[num_words] from bits, least first. numpy does it in a fifth of the time that torch takes."""
    import torch

    return torch.from_numpy(
        np.unpackbits(np.frombuffer(bits, np.uint8), count=num_words, bitorder="little").view(np.bool_)
    )


def _grammar(spec: Mapping[str, Any]) -> str:
    """Return a grammar in llguidance's Lark; a space may stand before the text, as many tokenizers write it."""
    [(kind, value)] = spec.items()
    if kind == "choice":
        body = " | ".join(map(json.dumps, value))
    elif kind == "regex":
        body = f"/{_escaped(value)}/"
    else:
        body = f"%json {json.dumps({'x-guidance': _ONE_SPACE} | value)}"
    return f'start: SPACE? text\nSPACE: " "\ntext: {body}'


def _escaped(regex: str) -> str:
    """Return a regular expression for between slashes, on one line."""
    escaped, is_quoted = [], False
    for letter in regex:
        escaped.append("\\/" if letter == "/" and not is_quoted else "\\n" if letter == "\n" else letter)
        is_quoted = letter == "\\" and not is_quoted
    return "".join(escaped)


def _first_line(problem: str) -> str:
    lines = [line.strip() for line in problem.splitlines() if line.strip()]
    return (
        lines[0] if not lines[0].endswith(":") else " ".join(lines[:1] + [line for line in lines if "error:" in line])
    )
