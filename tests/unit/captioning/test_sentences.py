"""A text that was cut ends at its last whole sentence, in any script."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from captioner.captioning.sentences import whole_sentences
from tests.hypothesis_profiles import max_examples


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("A dog runs. It wears a red coll", "A dog runs."),
        ("A dog runs. It barks! Does it bi", "A dog runs. It barks!"),
        ("Is it a dog? It may be a", "Is it a dog?"),
        ("A dog runs.  \n\nIt wears", "A dog runs."),
        ("a dog runs. it wears a red coll", "a dog runs."),
        ('He says "Come here." Then he', 'He says "Come here."'),
        ("It is a dog (or a wolf.) It ru", "It is a dog (or a wolf.)"),
        ("They call it \u00abun chien.\u00bb Il est", "They call it \u00abun chien.\u00bb"),
        ("The sign says 'Stop!' and the", "The sign says 'Stop!' and the"),
        ("What is it?! A dog that", "What is it?!"),
        ("一只狗在跑。它戴着红", "一只狗在跑。"),
        ("「犬が走る。」赤い首", "「犬が走る。」"),
        ("犬ですか？はい！赤い", "犬ですか？はい！"),  # noqa: RUF001
        ("هل هذا كلب؟ إنه يرتدي", "هل هذا كلب؟"),
        ("एक कुत्ता दौड़ता है। वह लाल", "एक कुत्ता दौड़ता है।"),
        ("Շունը վազում է։ Նա կարմիր", "Շունը վազում է։"),  # noqa: RUF001
        ("It is a dog, isn't it. It wears", "It is a dog, isn't it."),
        ("A cat that isn't. It wears", "A cat that isn't."),
        ("Собака бежит. Она в крас", "Собака бежит."),
    ],
)
def test_a_cut_text_ends_at_its_last_whole_sentence(text: str, kept: str) -> None:
    assert whole_sentences(text) == kept


@pytest.mark.parametrize(
    "text",
    [
        "",
        "A dog on a be",
        "A dog of 3.5 kg on a be",
        "A dog of 3.",
        "A portrait of Dr. Smith in a",
        "A portrait of Mr.",
        "A photograph by J. R. Smith of a",
        "A portrait (Dr. Smith) of",
        "A street in the U.S. with a",
        "A large animal, e.g. a dog, i.e. a",
        "A train at 5 p.m. in the",
        "A dog ... a cat ... A be",
        "A dog\u2026 A cat",
        "A page of www.example.com with",
        "1. A red dog 2. A blu",
        "A poster of Yahoo! with a dog",
        "สุนัขวิ่งอยู่บนชายหาด",
    ],
)
def test_a_text_without_a_whole_sentence_stays_as_it_is(text: str) -> None:
    assert whole_sentences(text) == text


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("A dog runs. It belongs to Dr. Smith of", "A dog runs."),
        ("A dog runs. It weighs 3.5 kg and", "A dog runs."),
        ("A dog runs. It weighs 3.", "A dog runs."),
        ("A car of 1965. It is r", "A car of 1965."),
        ("A dog runs. It barks.", "A dog runs. It barks."),
        ("A ball, a bat, etc. They lie on", "A ball, a bat, etc."),
        ("A ball, a bat, etc. on a", "A ball, a bat, etc. on a"),
    ],
)
def test_abbreviations_initials_and_numbers_end_no_sentence(text: str, kept: str) -> None:
    assert whole_sentences(text) == kept


@max_examples(300)
@given(st.text(alphabet="aA1 .!?\u3002\u2026\"'()\n\u0964é", max_size=40) | st.text(max_size=40))
def test_what_is_kept_is_the_beginning_of_any_text(text: str) -> None:
    kept = whole_sentences(text)
    assert text.startswith(kept)
    assert bool(kept) == bool(text)
