"""What follows a text that a constraint allows, in tokens of the demo's tokenizer."""

import json
import random
import re
from collections.abc import Mapping
from typing import Any

import pytest

from captioner import demo
from captioner.errors import ConfigError
from captioner.model.constraints import Constraint
from captioner.model.folder import Folder
from captioner.model.tokenizer import load_tokenizer

FOLDER = demo.bundle_path() / "llama"
TOKENIZER_JSON = (FOLDER / "tokenizer.json").read_text()
TOKENIZER = load_tokenizer(Folder.local(FOLDER))
END = TOKENIZER.eos_token_id
SCHEMA = {
    "type": "object",
    "properties": {"count": {"type": "integer", "minimum": 0, "maximum": 20}, "is_dark": {"type": "boolean"}},
    "required": ["count", "is_dark"],
    "additionalProperties": False,
}


def constraint(spec: Mapping[str, Any]) -> Constraint:
    return Constraint(spec, TOKENIZER_JSON, [END], "prompts.yaml: a")


def walk(made: Constraint, seed: int) -> str:
    """Return a text whose tokens are drawn among those that are allowed."""
    draw, tokens = random.Random(seed), list[int]()
    while True:
        allowed = made.allowed_tokens(tokens).nonzero().flatten().tolist()
        assert allowed
        token = draw.choice(allowed)
        if token == END:
            return str(TOKENIZER.decode(tokens)).strip()
        tokens.append(token)


def test_a_choice_gives_its_texts_and_no_other() -> None:
    made = constraint({"choice": ["yes", "no", "no, never"]})
    assert {walk(made, seed) for seed in range(60)} == {"yes", "no", "no, never"}


def test_what_ends_by_itself_matches_the_regular_expression() -> None:
    made = constraint({"regex": "[a-c]{2,4}/\\d\\/x"})
    assert all(re.fullmatch("[a-c]{2,4}/\\d/x", walk(made, seed)) for seed in range(30))


def test_what_ends_by_itself_is_of_the_schema() -> None:
    made = constraint({"json_schema": SCHEMA})
    for seed in range(30):
        text = walk(made, seed)
        assert not re.search(r"\s\s|\n", text), "a model that is unsure would write spaces without end"
        found = json.loads(text)
        assert set(found) == {"count", "is_dark"}
        assert 0 <= found["count"] <= 20


def test_captions_that_share_a_beginning_go_their_own_ways() -> None:
    made = constraint({"choice": ["yes", "no"]})
    first = {str(TOKENIZER.decode([token])): token for token in made.allowed_tokens([]).nonzero().flatten().tolist()}
    assert sorted(first) == [" ", "n", "y"]
    after = {text: made.allowed_tokens([token]).nonzero().flatten().tolist() for text, token in first.items()}
    again = {text: made.allowed_tokens([token]).nonzero().flatten().tolist() for text, token in first.items()}
    assert after == again
    assert after["n"] != after["y"]


def test_states_are_forgotten_and_made_again() -> None:
    made = constraint({"regex": "[ab]{600}"})
    tokens = TOKENIZER("ab" * 299, add_special_tokens=False).input_ids
    for length in range(0, len(tokens), 2):
        made.allowed_tokens(tokens[:length])
    assert made.allowed_tokens(tokens[:3]).any()


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            {"json_schema": {"type": "nothing"}},
            "prompts.yaml: a: .*Invalid type: nothing; expected one that llguidance takes",
        ),
        ({"regex": "(?=a)b"}, "prompts.yaml: a: .*look-around.*; expected one that llguidance takes"),
    ],
)
def test_a_grammar_that_cannot_be_held_to_is_refused_with_why(spec: Mapping[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        constraint(spec)


def test_what_is_allowed_is_what_llguidance_says_word_by_word() -> None:
    made = constraint({"regex": "[a-c]{2,4} x"})
    tokens: list[int] = []
    for _ in range(4):
        allowed = made.allowed_tokens(tokens)
        of_llguidance = [byte != 0 for byte in made._state(tuple(tokens)).matcher.compute_logit_bias()]
        assert allowed.tolist() == of_llguidance
        assert made.allowed_tokens(tokens) is allowed, "it is worked out once for captions that begin alike"
        tokens.append(int(allowed.nonzero()[0]))
