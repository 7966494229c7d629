"""The plot of a fit: well-formed, with every line and label, whatever the numbers."""

import math
from xml.etree import ElementTree

import pytest

from captioner.fitting.curves import curves_svg

SVG = "{http://www.w3.org/2000/svg}"
HISTORY = [
    {"step": 10.0, "loss": 3.0},
    {"step": 20.0, "loss": 2.0, "val_loss": 2.2, "cider_d": 0.4, "bleu_4": 0.1, "rouge_l": 0.3},
    {"step": 30.0, "loss": 1.5, "val_loss": 2.0, "cider_d": 0.9, "bleu_4": 0.2, "rouge_l": 0.4},
]


def test_each_figure_has_a_line_and_a_label():
    drawn = ElementTree.fromstring(curves_svg(HISTORY, "Fit"))
    texts = {text.text for text in drawn.iter(f"{SVG}text")}
    assert {"training", "validation", "CIDEr-D", "ROUGE-L", "BLEU-4", "loss per token"} <= texts
    assert len(list(drawn.iter(f"{SVG}path"))) == 5
    assert len(list(drawn.iter(f"{SVG}circle"))) == 2 * 4


def test_a_title_is_text():
    drawn = ElementTree.fromstring(curves_svg(HISTORY, "<script>alert(1)</script> & more"))
    assert drawn.find(f"{SVG}title").text == "<script>alert(1)</script> & more"


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


def test_labels_of_lines_that_end_together_do_not_lie_on_each_other():
    rows = [{"step": 2.0, "cider_d": 0.5, "bleu_4": 0.5, "rouge_l": 0.5}]
    drawn = ElementTree.fromstring(curves_svg(rows))
    places = [float(t.get("y")) for t in drawn.iter(f"{SVG}text") if t.text in ("CIDEr-D", "ROUGE-L", "BLEU-4")]
    assert min(abs(a - b) for i, a in enumerate(places) for b in places[:i]) >= 14
