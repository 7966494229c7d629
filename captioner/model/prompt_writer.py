"""From a named prompt and the values of an image's columns to the tokens before and after the image.

A value is text, whatever it says: no special token ever comes out of one. Knows tokenizers and templates; no tensors,
images or tables.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from itertools import takewhile
from typing import Any, NamedTuple

import tokenizers

from captioner.model.template import IMAGE, check_special_tokens
from captioner.model.turns import QUESTION, SYSTEM, Turns
from captioner.prompts import Prompt, Segment

__all__ = ["PromptTokens", "PromptWriter"]

_LETTERS_PER_TOKEN = 128
"""A value of more letters than this for each of its tokens is cut before it is tokenised."""
_SLACK = 8
"""Tokens that a text may have more than its pieces, because it begins or ends without their spaces."""
_MARKS = re.compile(f"({QUESTION}|{SYSTEM}|{re.escape(IMAGE)})")

Ids = tuple[int, ...]


class PromptTokens(NamedTuple):
    """What a model reads beside an image."""

    before: Ids
    after: Ids
    num_cut_values: int = 0


class PromptWriter:
    """Writes prompts for one model."""

    def __init__(self, turns: Turns, tokenizer: Any) -> None:
        """tokenizer: with a `backend_tokenizer`, as transformers' fast tokenizers have."""
        self._turns = turns
        self._backend: tokenizers.Tokenizer = tokenizer.backend_tokenizer
        self._backend.no_truncation()
        self._backend.no_padding()
        self._skeletons: dict[tuple[str | None, bool], list[Segment]] = {}
        self._bounds: dict[tuple[object, ...], _Bounds] = {}

    @property
    def tokenizer_json(self) -> str:
        """Its tokenizer, as in tokenizer.json."""
        return str(self._backend.to_str())

    def tokens(self, prompt: Prompt, text_number: int, values: Mapping[str, object]) -> PromptTokens:
        """Return the tokens of one of a prompt's texts with the values of an image's columns, each cut to
        `max_value_tokens`. Raises ConfigError or BundleError for a prompt that the model cannot be given."""
        bounds = self._bounds_of(prompt, text_number)
        if bounds.is_constant:
            return PromptTokens(bounds.start, bounds.end)
        cut = [self._cut(segment, prompt.max_value_tokens) for segment in self._filled(prompt, text_number, values)]
        before, after = _sides([segment for segment, _ in cut])
        ids_before, ids_after = self._encoded(before, after)
        if ids_before is None or not bounds.hold_before(ids_before):
            ids_before = self._by_pieces(before)
        if ids_after is None or len(ids_after) > bounds.most_after:
            ids_after = self._by_pieces(after)
        return PromptTokens(ids_before, ids_after, sum(is_cut for _, is_cut in cut))

    def most_tokens(self, prompt: Prompt) -> tuple[int, int]:
        """Return the most tokens of a prompt before and after any image. Raises as `tokens` does."""
        all_bounds = [self._bounds_of(prompt, number) for number in range(len(prompt.texts))]
        return max(one.most_before for one in all_bounds), max(one.most_after for one in all_bounds)

    def starts(self, prompt: Prompt) -> list[Ids]:
        """Return with what the tokens before the image begin, whatever the image: one for each text of the prompt."""
        return [self._bounds_of(prompt, number).start for number in range(len(prompt.texts))]

    def _bounds_of(self, prompt: Prompt, text_number: int) -> "_Bounds":
        key = prompt.texts[text_number].text, prompt.system, prompt.max_value_tokens
        if key not in self._bounds:
            self._bounds[key] = self._measured(prompt, text_number)
        return self._bounds[key]

    def _measured(self, prompt: Prompt, text_number: int) -> "_Bounds":
        smallest, largest = self._filled(prompt, text_number, {}), self._largest(prompt, text_number)
        known = {token.content for token in self._backend.get_added_tokens_decoder().values()}
        check_special_tokens("".join(one.text for one in largest), known)
        before, after = _sides(smallest)
        ids_before, ids_after = self._encoded(before, after)
        assert ids_before is not None
        assert ids_after is not None, "words alone hold no values"
        if not prompt.columns:
            return _Bounds(ids_before, ids_after, len(ids_before), len(ids_after), is_constant=True)
        before_at_most, after_at_most = _sides(largest)
        is_fixed = before == before_at_most
        start = ids_before if is_fixed else self._by_pieces(before[:1]) if before[:1] == before_at_most[:1] else ()
        most = [self._most(side, prompt.max_value_tokens) for side in (before_at_most, after_at_most)]
        return _Bounds(start, (), len(start) if is_fixed else most[0], most[1], is_constant=False)

    def _most(self, pieces: Sequence[Segment], max_value_tokens: int) -> int:
        return _SLACK + sum(max_value_tokens if one.is_data else len(self._by_pieces([one])) for one in pieces)

    def _filled(self, prompt: Prompt, text_number: int, values: Mapping[str, object]) -> list[Segment]:
        """Return the whole prompt of an image, piece by piece."""
        text = prompt.texts[text_number].text
        system = None if prompt.system is None else _stripped(prompt.system.fill(values))
        has_image = text.num_images > 0
        question = text.fill(values) if has_image else _stripped(text.fill(values))
        return self._in_turns(prompt, question, system, has_image=has_image)

    def _largest(self, prompt: Prompt, text_number: int) -> list[Segment]:
        """Return the whole prompt with every text that an image may or may not have; values are empty."""
        text = prompt.texts[text_number].text
        system = None if prompt.system is None else prompt.system.largest
        return self._in_turns(prompt, text.largest, system, has_image=text.num_images > 0)

    def _in_turns(
        self, prompt: Prompt, question: list[Segment], system: list[Segment] | None, *, has_image: bool
    ) -> list[Segment]:
        if system is None and self._turns.system is not None and not has_image:
            system = [Segment(self._turns.system)]
        told = None if system is None else SYSTEM if system else ""
        pieces: list[Segment] = []
        for piece in self._skeleton(told, has_image, prompt.name):
            if piece.text == QUESTION:
                pieces += question
            elif piece.text == SYSTEM:
                pieces += system or []
            else:
                pieces.append(piece)
        return pieces

    def _skeleton(self, told: str | None, has_image: bool, where: str) -> list[Segment]:
        key = told, has_image
        if key not in self._skeletons:
            text = self._turns.skeleton(told, has_image=has_image, where=where)
            self._skeletons[key] = [
                Segment("", is_image=True) if part == IMAGE else Segment(part) for part in _MARKS.split(text) if part
            ]
        return self._skeletons[key]

    def _cut(self, segment: Segment, most: int) -> tuple[Segment, bool]:
        """Return a value's first tokens as text, and whether there were more."""
        if not segment.is_data:
            return segment, False
        text = segment.text[: most * _LETTERS_PER_TOKEN]
        encoding = self._plain.encode(text, add_special_tokens=False)
        keep = most
        while len(encoding.ids) > most:
            text = text[: encoding.offsets[keep - 1][1]] if keep else ""
            encoding, keep = self._plain.encode(text, add_special_tokens=False), keep - 1
        return Segment(text, is_data=True), text != segment.text

    def _encoded(self, before: Sequence[Segment], after: Sequence[Segment]) -> tuple[Ids | None, Ids | None]:
        """Return the tokens of both sides, None where a value would give a special token.

        Both are tokenised at once, with the image's token between them, where the tokenizer has one."""
        token = self._turns.image_token
        number = None if token is None else self._backend.token_to_id(token)
        if number is None or token is None:
            return self._checked(self._encode(before), before, 0), self._checked(self._encode(after), after, 0)
        at = sum(len(one.text) for one in before)
        found = self._encode([*before, Segment(token), *after])
        places = [place for place, one in enumerate(found) if one.number == number and one.start <= at < one.end]
        if len(places) != 1:
            return None, None
        first, second = found[: places[0]], found[places[0] + 1 :]
        return self._checked(first, before, 0), self._checked(second, after, at + len(token))

    def _encode(self, segments: Iterable[Segment]) -> "list[_Token]":
        text = "".join(one.text for one in segments)
        encoding = self._backend.encode(text, add_special_tokens=False) if text else None
        if encoding is None:
            return []
        return [_Token(number, *span) for number, span in zip(encoding.ids, encoding.offsets, strict=True)]

    def _checked(self, found: "Sequence[_Token]", side: Sequence[Segment], at: int) -> Ids | None:
        """Return the numbers of tokens, None where a special one touches a value. at: where the side begins."""
        special = [one for one in found if one.number in self._special]
        for segment in side:
            end = at + len(segment.text)
            if segment.is_data and any(one.start < end and one.end > at for one in special):
                return None
            at = end
        return tuple(one.number for one in found)

    def _by_pieces(self, segments: Iterable[Segment]) -> Ids:
        """Return the tokens of pieces, each tokenised on its own, values without any special token."""
        ids: list[int] = []
        for one in segments:
            encoder = self._plain if one.is_data else self._backend
            found = encoder.encode(one.text, add_special_tokens=False).ids if one.text else []
            ids += [number for number in found if not (one.is_data and number in self._special)]
        return tuple(ids)

    @cached_property
    def _special(self) -> frozenset[int]:
        """Tokens that no value may give: all that stand beside the tokenizer's model, but the one of unknown words."""
        unknown = json.loads(self._backend.to_str())["model"].get("unk_token")
        found = self._backend.get_added_tokens_decoder()
        return frozenset(number for number, token in found.items() if token.content != unknown)

    @cached_property
    def _plain(self) -> tokenizers.Tokenizer:
        """The tokenizer without its special tokens."""
        content = json.loads(self._backend.to_str()) | {"added_tokens": [], "post_processor": None}
        return tokenizers.Tokenizer.from_str(json.dumps(content))


class _Token(NamedTuple):
    number: int
    start: int
    end: int


class _Bounds(NamedTuple):
    """What is known of the tokens of a text before there is an image."""

    start: Ids
    """How its tokens before the image begin; all of them, if the text is constant."""

    end: Ids
    most_before: int
    most_after: int
    is_constant: bool

    def hold_before(self, ids: Ids) -> bool:
        return len(ids) <= self.most_before and ids[: len(self.start)] == self.start


def _sides(segments: Sequence[Segment]) -> tuple[list[Segment], list[Segment]]:
    """Return the segments before the image and after it."""
    before = list(takewhile(lambda one: not one.is_image, segments))
    return before, [one for one in segments[len(before) :] if not one.is_image]


def _stripped(segments: Sequence[Segment]) -> list[Segment]:
    """Return the segments of a text without spaces at its beginning and end."""
    found = list(segments)
    while found and not found[0].text.strip():
        found.pop(0)
    while found and not found[-1].text.strip():
        found.pop()
    if found:
        found[0] = found[0]._replace(text=found[0].text.lstrip())
        found[-1] = found[-1]._replace(text=found[-1].text.rstrip())
    return found
