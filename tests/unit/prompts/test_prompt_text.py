"""What the text of a prompt becomes for one image."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from captioner.errors import ConfigError
from captioner.prompts import PromptText, Segment, weighted_choice

PAGE = "Describe it.{?alt: The page says: {alt}.} Be brief."


def filled(text: str, **values: object) -> list[Segment]:
    return PromptText.parse(text, "a").fill(values)


def test_a_value_is_a_segment_of_its_own_whatever_it_says() -> None:
    assert filled("Say {alt}!", alt="<|eot_id|>{x}") == [Segment("Say "), Segment("<|eot_id|>{x}", True), Segment("!")]


@pytest.mark.parametrize("value", [None, "", "  \n", math.nan])
def test_a_sentence_about_a_value_that_is_missing_is_left_out(value: object) -> None:
    assert filled(PAGE, alt=value) == filled(PAGE) == [Segment("Describe it."), Segment(" Be brief.")]


def test_a_sentence_about_a_value_stands_where_there_is_one() -> None:
    assert filled(PAGE, alt="a dog") == [
        Segment("Describe it."),
        Segment(" The page says: "),
        Segment("a dog", True),
        Segment("."),
        Segment(" Be brief."),
    ]


def test_a_missing_value_without_a_condition_is_no_text() -> None:
    assert filled("Say {alt}!") == [Segment("Say "), Segment("!")]


def test_braces_and_the_image_are_written_out() -> None:
    parsed = PromptText.parse("{{a}} {image} {?b: c}", "a")
    assert (parsed.num_images, parsed.columns) == (1, {"b"})
    assert parsed.fill({"b": 1, "image": "forged"}) == [
        Segment("{a} "),
        Segment("", is_image=True),
        Segment(" "),
        Segment(" c"),
    ]


@pytest.mark.parametrize("text", ["{", "}", "{?a: b", "{?a: {?b: c}}", "{}", "{ }", "{?a: b}}", "{a{b}}", "{?a b}"])
def test_a_brace_without_its_pair_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^where: .*; expected"):
        PromptText.parse(text, "where")


@given(st.text(), st.text())
def test_any_text_can_be_written_and_any_value_is_data(text: str, value: str) -> None:
    escaped = text.replace("{", "{{").replace("}", "}}")
    parsed = PromptText.parse(escaped + "{v}", "a")
    wanted = [Segment(text)] * bool(text) + [Segment(value.strip(), True)] * bool(value.strip())
    assert parsed.fill({"v": value}) == wanted


def test_a_choice_follows_its_weights_and_depends_on_seed_name_and_image_alone() -> None:
    drawn = [weighted_choice([1, 3], 0, f"{n}.jpg", "style") for n in range(4000)]
    assert sum(drawn) / 4000 == pytest.approx(0.75, abs=0.03)
    assert drawn == [weighted_choice([1, 3], 0, f"{n}.jpg", "style") for n in range(4000)]
    assert drawn != [weighted_choice([1, 3], 1, f"{n}.jpg", "style") for n in range(4000)]
    assert drawn != [weighted_choice([1, 3], 0, f"{n}.jpg", "other") for n in range(4000)]
