"""The repetition flag: what goes round in circles, in any script, and what does not."""

import pytest

from captioner.repetition import is_repetitive, repetition, words


@pytest.mark.parametrize(
    "caption",
    [
        "a red bus on the street with a red bus on the street",
        "A man and a man and a man.",
        "dog Dog dog",
        "the of the of the of the",
        "一只猫在桌子上一只猫在桌子上",
        "!!! a a a !!!",
    ],
)
def test_a_caption_that_loops_is_repetitive(caption: str) -> None:
    assert is_repetitive(caption)


@pytest.mark.parametrize(
    "caption",
    [
        "",
        "...",
        "a dog",
        "a cat on the left and a cat on the right",
        "a large blue square above a small red triangle on a black background",
        "two people sit side by side by a very, very old wall",
        "一只猫坐在桌子旁边的椅子上",
    ],
)
def test_a_caption_that_only_says_a_word_again_is_not(caption: str) -> None:
    assert not is_repetitive(caption)


def test_repetition_is_the_share_of_4_grams_that_were_said_before() -> None:
    assert repetition("a b c d e a b c d") == pytest.approx(1 / 6)
    assert repetition("a b c") == 0


def test_words_are_those_of_any_script() -> None:
    assert words("Ein Café-Tisch, 3 Stühle") == ["ein", "café", "tisch", "3", "stühle"]
    assert words("猫とdog 강아지") == ["猫", "と", "dog", "강아지"]
