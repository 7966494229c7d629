"""The curves of a fit: well-formed, with every line and label, whatever the numbers."""

import math
import re
from xml.etree import ElementTree

import pytest

from captioner.training.fit.curves import curves_svg

SVG = "{http://www.w3.org/2000/svg}"
HISTORY = [
    {"step": 10.0, "loss": 3.0},
    {"step": 20.0, "loss": 2.0, "val_loss": 2.2, "cider_d": 0.4, "bleu_4": 0.1, "rouge_l": 0.3},
    {"step": 30.0, "loss": 1.5, "val_loss": 2.0, "cider_d": 0.9, "bleu_4": 0.2, "rouge_l": 0.4},
]


def texts_of(svg):
    return [text.text for text in ElementTree.fromstring(svg).iter(f"{SVG}text")]


def test_each_figure_has_a_labelled_line_and_cider_an_axis_of_its_own():
    svg = curves_svg(HISTORY, "Fit")
    assert {"training", "validation", "CIDEr-D", "ROUGE-L", "BLEU-4", "loss per token", "step"} <= set(texts_of(svg))
    groups = [group.get("id", "") for group in ElementTree.fromstring(svg).iter(f"{SVG}g")]
    assert [name for name in groups if name.startswith("axes_")] == ["axes_1", "axes_2", "axes_3"]


def test_a_fit_without_captions_has_the_loss_alone():
    svg = curves_svg([{"step": 1.0, "loss": 3.0}, {"step": 2.0, "loss": 2.0, "val_loss": 2.2}])
    assert "axes_2" not in svg
    assert "CIDEr-D" not in texts_of(svg)


def test_the_same_rows_give_the_same_text():
    assert curves_svg(HISTORY, "Fit") == curves_svg(HISTORY, "Fit")


def test_the_background_is_left_to_the_page_and_no_text_is_black_or_white():
    svg = curves_svg(HISTORY, "Fit")
    assert "fill: #ffffff" not in svg
    assert all("fill: #" in text.get("style", "") for text in ElementTree.fromstring(svg).iter(f"{SVG}text"))


def test_every_colour_is_as_readable_on_white_as_on_black():
    """A contrast of 4.5 is what WCAG 2 asks of text."""
    for colour in {
        match.lower() for match in re.findall(r"(?:fill|stroke): (#[0-9a-fA-F]{6})", curves_svg(HISTORY, "Fit"))
    }:
        parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
        light = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        luminance = 0.2126 * light[0] + 0.7152 * light[1] + 0.0722 * light[2]
        assert min(1.05 / (luminance + 0.05), (luminance + 0.05) / 0.05) >= 4.5, colour


def test_a_title_is_text():
    title = "<script>alert(1)</script> & $x_1$ more"
    svg = curves_svg(HISTORY, title)
    assert ElementTree.fromstring(svg).find(f"{SVG}title").text == title
    assert title in texts_of(svg)


@pytest.mark.parametrize(
    "history",
    [
        [],
        HISTORY[:1],
        [{"step": 1.0, "loss": 0.0}],
        [{"step": 4.0, "loss": 5.0, "bleu_4": 1.5e-11, "cider_d": 0.0}],
        [{"step": 5.0, "loss": math.nan}, {"step": 9.0, "loss": 1e-9}],
        [{"step": float(step), "loss": 7e5 / step} for step in range(1, 500)],
    ],
    ids=["nothing", "one row", "zero", "next to zero", "no number", "many"],
)
def test_any_history_can_be_drawn(history):
    text = curves_svg(history)
    ElementTree.fromstring(text)
    assert "nan" not in text
    assert "inf" not in text
