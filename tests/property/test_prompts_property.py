"""An answer is a function of its image and prompt: any subset and order of both gives what each gets alone."""

import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from captioner.captioning.captioner import Captioner
from captioner.captioning.questions import Answer
from captioner.config import DecodingConfig
from captioner.model.bundle import load
from captioner.model.caption_model import CaptionModel
from captioner.prompts import Prompt, read_prompts
from tests.hypothesis_profiles import max_examples
from tests.unit.model.test_model_oracle import pixels
from tests.unit.model.tiny_models import save_llava

NUM_IMAGES = 6
DECODING = DecodingConfig(max_new_tokens=12)
VALUES: list[dict[str, object]] = [{"alt": text} for text in ("a dog", None, "eine Straße", "x" * 40, "", "cat")]
PROMPTS = """
caption: Describe the image.
tags: {text: "List tags. {?alt: The page says: {alt}.}", max_new_tokens: 5, max_value_tokens: 9}
system: {text: "Why?", system: "Be brief, {alt}."}
whole: {text: "<|begin_of_text|>{alt}: {image}Q", trim_to_sentence: true, temperature: 1.0}
drawn: {texts: [{text: Draw it., weight: 2}, "Who?"], do_sample: true, num_captions: 2, trim_to_sentence: true}
again: {text: "Once more.", redraw_repetitive: 2, temperature: 2.0, trim_to_sentence: true}
several: {text: "Twice.", do_sample: true, top_k: 0, num_captions: 2, redraw_repetitive: 1, max_new_tokens: 7}
yes: {text: "Is it?", choice: [yes, no, "no, never"]}
held: {text: "Letters.", regex: "[ab]{4,9}c", max_new_tokens: 6, redraw_repetitive: 2}
beams: {text: "Beams.", num_beams: 3, num_captions: 2, trim_to_sentence: true, max_new_tokens: 9}
until: {text: "Describe the image.", stop: ["a", "b"]}
"""
NAMES = [line.partition(":")[0] for line in PROMPTS.split("\n") if line]


@pytest.fixture(autouse=True, scope="module")
def with_full_stops() -> Iterator[None]:
    """A random model writes none: some letters are taken for one."""
    text_of = CaptionModel.text
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CaptionModel, "text", lambda self, ids: re.sub("[A-Zd-z]", ". ", text_of(self, ids)).strip())
        yield


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@cache
def model() -> CaptionModel:
    with TemporaryDirectory() as folder:
        return load(str(save_llava(Path(folder))))


@cache
def prompts() -> tuple[Prompt, ...]:
    with TemporaryDirectory() as folder:
        file = Path(folder) / "prompts.yaml"
        file.write_text(PROMPTS)
        return read_prompts(file, DECODING, frozenset())


def answers(some: list[Prompt], images: list[int], calls: int = 1) -> dict[tuple[int, str], Answer]:
    """Ask some prompts about some images, so many at a time."""
    squares = pixels(NUM_IMAGES)
    found: dict[tuple[int, str], Answer] = {}
    with Captioner(model(), DECODING, prompts=some) as captioner:
        for start in range(0, len(images), calls):
            few = images[start : start + calls]
            values = [VALUES[image] for image in few]
            rows = captioner.answer_pixels(squares[few], [f"{i}.jpg" for i in few], [(32, 32)] * len(few), values)
            for image, row in zip(few, rows, strict=True):
                found |= {(image, prompt.name): answer for prompt, answer in zip(some, row, strict=True)}
    return found


@cache
def alone(name: str) -> dict[tuple[int, str], Answer]:
    [prompt] = [one for one in prompts() if one.name == name]
    return {key: answer for image in range(NUM_IMAGES) for key, answer in answers([prompt], [image]).items()}


def told(answer: Answer) -> tuple[object, ...]:
    """All but the last bits of scores, which depend on what else a step holds."""
    tries = answer.caption.candidates or (answer.caption,)
    texts = [(one.caption, one.num_tokens, one.finish_reason, one.is_trimmed, one.is_whole) for one in tries]
    return (answer.caption.caption, sorted(texts), answer.text_number, answer.num_cut_values)


def test_the_prompts_take_every_way_that_an_answer_can_end() -> None:
    every = [answer.caption for prompt in prompts() for answer in alone(prompt.name).values()]
    assert {one.finish_reason for one in every} == {"stop", "length"}
    assert any(one.is_trimmed for one in every)
    assert any(not one.is_whole for one in every)
    names = ("again", "several", "held")
    assert {len(one.caption.candidates) for name in names for one in alone(name).values()} >= {0, 3, 4}


@max_examples(12)
@given(
    names=st.lists(st.sampled_from(NAMES), min_size=1, unique=True),
    images=st.lists(st.integers(0, NUM_IMAGES - 1), min_size=1, unique=True),
    calls=st.integers(1, NUM_IMAGES),
)
def test_any_subset_and_order_of_prompts_gives_the_same_answers(
    names: list[str], images: list[int], calls: int
) -> None:
    by_name = {prompt.name: prompt for prompt in prompts()}
    for (image, name), answer in answers([by_name[name] for name in names], images, calls).items():
        assert told(answer) == told(alone(name)[image, name]), name
