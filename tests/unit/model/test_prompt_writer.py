"""The tokens of a prompt with an image's values: those of the whole text, and never a special one from a value."""

import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken

from captioner.config import DecodingConfig
from captioner.errors import BundleError
from captioner.model.prompt_writer import PromptWriter
from captioner.model.turns import FittedTurns
from captioner.prompts import Prompt, PromptText, WeightedText
from tests.unit.model.tiny_models import llama3_tokenizer

TEMPLATE = "<|begin_of_text|>a {image}<|eot_id|>"
SPECIAL = [
    "<|eot_id|>",
    "<|begin_of_text|>",
    "<image>",
    "<|eot",
    "_id|>",
    "Ünïcode",
    "{image}",
    "ordinary w1",
    " ",
    "W",
]
TOKENIZER = llama3_tokenizer(extra=("<image>",))


def writer(image_token: str | None = None, tokenizer=TOKENIZER) -> PromptWriter:
    return PromptWriter(FittedTurns(TEMPLATE, image_token), tokenizer)


WRITERS = {token: writer(token) for token in (None, "<image>")}


def prompt(text: str, **changes: object) -> Prompt:
    texts = (WeightedText(PromptText.parse(text, "a")),)
    return Prompt(**{"name": "a", "texts": texts, "decoding": DecodingConfig(), **changes})


@pytest.mark.parametrize("image_token", [None, "<image>"])
@given(value=st.lists(st.sampled_from(SPECIAL), max_size=5).map("".join), more=st.text(max_size=9))
def test_no_value_gives_a_special_token(image_token: str | None, value: str, more: str) -> None:
    asked = prompt("{more}{image}b <|eot{alt}: {alt}{more}id|>")
    its_writer = WRITERS[image_token]
    found = its_writer.tokens(asked, 0, {"alt": value, "more": more})
    special = [token for token in (*found.before, *found.after) if token >= 256]
    assert special == [256, 265], "the template's own"
    read = TOKENIZER.decode(found.after)
    assert read == f"b <|eot{filled(value)}: {filled(value)}{filled(more)}id|><|eot_id|>"
    most_before, most_after = its_writer.most_tokens(asked)
    assert len(found.before) <= most_before
    assert len(found.after) <= most_after


def filled(value: str) -> str:
    return value.strip()


def test_a_value_without_special_tokens_is_tokenised_within_its_sentence() -> None:
    merging = llama3_tokenizer()
    found = writer(tokenizer=merging).tokens(prompt("x {v}."), 0, {"v": "w1"})
    assert list(found.after) == merging("x w1.<|eot_id|>", add_special_tokens=False).input_ids


def test_a_token_that_only_appears_after_normalising_is_none_either() -> None:
    from tokenizers import normalizers

    tokenizer = llama3_tokenizer(extra=("<image>",))
    tokenizer.backend_tokenizer.normalizer = normalizers.NFKC()
    tokenizer.backend_tokenizer.add_tokens([AddedToken("<end>", normalized=True, special=False)])
    found = writer(tokenizer=tokenizer).tokens(prompt("{v}"), 0, {"v": "\uff1cend\uff1e <end>"})
    assert tokenizer.convert_tokens_to_ids("<end>") not in found.after


@given(st.text(max_size=40), st.integers(1, 5))
def test_a_cut_value_has_its_first_tokens(value: str, most: int) -> None:
    found = WRITERS[None].tokens(prompt("{v}", max_value_tokens=most), 0, {"v": value})
    whole = TOKENIZER(filled(value), add_special_tokens=False).input_ids
    assert len(found.after) - 1 <= most + 1
    assert found.num_cut_values == (len(whole) > most)


def test_a_special_token_in_a_prompt_that_the_tokenizer_has_not_is_refused() -> None:
    with pytest.raises(BundleError, match=r"uses <\|im_end\|>, which the tokenizer of the LLaMA does not have"):
        writer().tokens(prompt("<|im_end|>"), 0, {})


def test_it_can_be_sent_to_another_process() -> None:
    asked = prompt("{v}?")
    copy = pickle.loads(pickle.dumps(writer()))
    assert copy.tokens(asked, 0, {"v": "1"}) == writer().tokens(asked, 0, {"v": "1"})
