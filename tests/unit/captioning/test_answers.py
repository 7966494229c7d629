"""Named prompts: each answer is that of transformers for its prompt alone, whatever is asked beside it."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerFast

from captioner.captioning.captioner import Captioner
from captioner.captioning.questions import Answer
from captioner.config import DecodingConfig, ScoringConfig
from captioner.decoding.memory import auto_slots
from captioner.errors import ConfigError
from captioner.model.constraints import Constraint
from captioner.prompts import Prompt, read_prompts
from tests.bundles import save_tiny_bundle
from tests.unit.model.test_model_oracle import pixels
from tests.unit.model.tiny_models import save_llava

DECODING = DecodingConfig(max_new_tokens=8)
IDS = ["a.jpg", "b.jpg", "c.jpg"]
SIZES = [(32, 32)] * 3
VALUES: list[dict[str, object]] = [{"alt": "a dog", "n": 3}, {"alt": None}, {"alt": "eine Straße <|eot_id|>"}]
HEADER = "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n"
END = "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
PROMPTS = """
caption: Describe the image.
tags:
  text: "List tags. {?alt: The page says: {alt}.}"
  max_new_tokens: 5
told: {text: "Why?", system: "Be brief, {alt}."}
whole: "<|begin_of_text|>{alt}: {image}\\nQ "
braces: "Is it {{n}} or {n}?"
"""


def read(tmp_path: Path, text: str = PROMPTS) -> tuple[Prompt, ...]:
    (tmp_path / "prompts.yaml").write_text(text)
    return read_prompts(tmp_path / "prompts.yaml", DECODING, frozenset())


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llava(tmp_path_factory.mktemp("llava"))


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Prompt, ...]:
    return read(tmp_path_factory.mktemp("prompts"))


@pytest.fixture(scope="module")
def captioner(llava: Path, prompts: tuple[Prompt, ...]) -> Iterator[Captioner]:
    with Captioner.from_bundle(str(llava), DECODING, prompts=prompts) as captioner:
        yield captioner


def ask(captioner: Captioner, values: list[dict[str, object]] = VALUES) -> list[tuple[Answer, ...]]:
    return captioner.answer_pixels(pixels(), IDS, SIZES, values)


def of_transformers(folder: Path, text: str, image: Tensor, **options: Any) -> str:
    """What transformers' own class says to a whole prompt, tokenised by its own tokenizer."""
    model = LlavaForConditionalGeneration.from_pretrained(folder)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    ids = torch.tensor([tokenizer(text.replace("<image>", "<image>" * 16), add_special_tokens=False).input_ids])
    out = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        pixel_values=image[None],
        do_sample=False,
        eos_token_id=[257, 265],
        pad_token_id=257,
        **{"max_new_tokens": 8, **options},
    )
    return tokenizer.decode(
        out[0, ids.shape[1] :], skip_special_tokens=True, clean_up_tokenization_spaces=False
    ).strip()


def test_every_answer_is_that_of_transformers_for_the_prompt_alone(llava: Path, captioner: Captioner) -> None:
    image = captioner.model.vision.normalised(pixels())
    first, second, _ = ask(captioner)
    turn = HEADER + "<image>\n{}" + END
    wanted = [
        (first[0], 0, turn.format("Describe the image."), 8),
        (first[1], 0, turn.format("List tags.  The page says: a dog."), 5),
        (second[1], 1, turn.format("List tags."), 5),
        (first[2], 0, HEADER.replace("user", "system") + "Be brief, a dog.<|eot_id|>" + turn.format("Why?")[17:], 8),
        (second[2], 1, HEADER.replace("user", "system") + "Be brief, .<|eot_id|>" + turn.format("Why?")[17:], 8),
        (first[3], 0, "<|begin_of_text|>a dog: <image>\nQ ", 8),
        (first[4], 0, turn.format("Is it {n} or 3?"), 8),
    ]
    for answer, number, text, length in wanted:
        assert answer.caption.caption == of_transformers(llava, text, image[number], max_new_tokens=length), text


def test_the_first_answer_is_the_caption_of_the_same_prompt_without_others(llava: Path, captioner: Captioner) -> None:
    with Captioner.from_bundle(str(llava), DECODING, prompt="Describe the image.") as alone:
        captions = alone.caption_pixels(pixels(), IDS)
    assert [one[0].caption.caption for one in ask(captioner)] == [one.caption for one in captions]


@pytest.mark.parametrize("names", [["tags"], ["told", "caption"], ["whole", "braces", "tags"]])
def test_any_subset_and_order_of_prompts_has_the_same_answers(
    llava: Path, captioner: Captioner, prompts: tuple[Prompt, ...], names: list[str]
) -> None:
    by_name = {prompt.name: number for number, prompt in enumerate(prompts)}
    all_texts = [[answer.caption.caption for answer in of_image] for of_image in ask(captioner)]
    with Captioner.from_bundle(str(llava), DECODING, prompts=[prompts[by_name[name]] for name in names]) as some:
        texts = [[answer.caption.caption for answer in of_image] for of_image in ask(some)]
    assert texts == [[of_image[by_name[name]] for name in names] for of_image in all_texts]


@pytest.mark.parametrize(
    "asked", [[["told"], ["caption", "tags"], ["whole"]], [["tags", "braces"], ["tags"], ["told"]]]
)
def test_each_image_may_be_asked_other_prompts_and_answers_as_to_all(
    captioner: Captioner, prompts: tuple[Prompt, ...], asked: list[list[str]]
) -> None:
    names = [prompt.name for prompt in prompts]
    of_all = [dict(zip(names, of_image, strict=True)) for of_image in ask(captioner)]
    found = captioner.answer_pixels(pixels(), IDS, SIZES, VALUES, asked)
    wanted = [[of_image[name] for name in these] for of_image, these in zip(of_all, asked, strict=True)]
    assert [[one.caption.caption for one in of_image] for of_image in found] == [
        [one.caption.caption for one in of_image] for of_image in wanted
    ]


def test_images_are_counted_when_all_their_answers_are_there(captioner: Captioner) -> None:
    before = captioner.engine.num_finished
    ask(captioner)
    assert captioner.engine.num_finished == before + 3


def test_each_image_gets_one_of_a_prompts_texts_whatever_its_neighbours(llava: Path, tmp_path: Path) -> None:
    weighted = read(tmp_path, 'style: {texts: [Name its style., {text: "Who?", weight: 3}]}')
    with Captioner.from_bundle(str(llava), DECODING, prompts=weighted) as captioner:
        found = [answer for [answer] in captioner.answer_pixels(pixels(8), list("abcdefgh"), [(32, 32)] * 8, [{}] * 8)]
        [alone] = captioner.answer_pixels(pixels(8)[6:7], ["g"], [(32, 32)], [{}])
    assert {answer.text_number for answer in found} == {0, 1}
    assert (alone[0].text_number, alone[0].caption.caption) == (found[6].text_number, found[6].caption.caption)


def test_an_overlong_value_is_cut_and_counted(llava: Path, tmp_path: Path) -> None:
    prompts = read(tmp_path, 'a: {text: "{alt}, {n}?", max_value_tokens: 5}')
    with Captioner.from_bundle(str(llava), DECODING, prompts=prompts) as captioner:
        values: list[dict[str, object]] = [{"alt": "abcdefg", "n": "1234567"}, {"alt": "abcde", "n": "12345"}, {}]
        long, cut, none = ask(captioner, values)
    assert [one[0].num_cut_values for one in (long, cut, none)] == [2, 0, 0]


def test_a_prompt_that_the_context_does_not_hold_is_refused(llava: Path, tmp_path: Path) -> None:
    for text, words in [
        ("a: " + "x" * 500, r"the prompt a takes 5\d\d tokens, an image 16 and its answer 8, 5\d\d together; the"),
        ('b: {text: "{alt}", max_value_tokens: 500}', r"5\d\d tokens with values of 500, .*: expected fewer .* by 44"),
    ]:
        with pytest.raises(ConfigError, match=words):
            Captioner.from_bundle(str(llava), DECODING, prompts=read(tmp_path, text))


def test_a_bundle_is_asked_behind_the_image_or_around_it(tmp_path: Path) -> None:
    bundle = save_tiny_bundle(tmp_path / "bundle")
    prompts = read(tmp_path, 'a: "w1 {v}"\nb: "w2 {image} w3"')
    with Captioner.from_bundle(bundle, DECODING, prompts=prompts) as captioner:
        size = captioner.model.image_size
        images = torch.randint(0, 256, (2, 3, size, size), dtype=torch.uint8)
        found = captioner.answer_pixels(images, ["a", "b"], [(size, size)] * 2, [{"v": "w4"}, {}])
        model = captioner.model
        writer = model.prompt_writer
        text = model.template.text.replace("{image}", "w2 {image} w3")
        before, after = (model.tokenizer(part, add_special_tokens=False).input_ids for part in text.split("{image}"))
        assert [list(ids) for ids in writer.tokens(prompts[1], 0, {})[:2]] == [before, after]
    assert [len(of_image) for of_image in found] == [2, 2]
    with pytest.raises(ConfigError, match="a: system is given, but the model is a bundle, whose template"):
        Captioner.from_bundle(bundle, DECODING, prompts=read(tmp_path, "a: {text: x, system: s}"))


def test_a_whole_prompt_takes_no_system_text(llava: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="a: there is a system text beside a whole prompt"):
        Captioner.from_bundle(str(llava), DECODING, prompts=read(tmp_path, 'a: {text: "{image} x", system: s}'))


KINDS = """
caption: Describe the image.
drawn: {text: "Draw.", do_sample: true, num_captions: 2}
yes: {text: "Is it?", choice: [yes, no]}
beams: {text: "Beams.", num_beams: 2}
until: {text: "Describe the image.", stop: ["W"], max_new_tokens: 30}
"""


def test_each_prompt_has_its_own_decoding(llava: Path, tmp_path: Path, captioner: Captioner) -> None:
    kinds = read(tmp_path, KINDS)
    with Captioner.from_bundle(str(llava), DECODING, prompts=kinds) as every:
        found = ask(every)
    assert [one[0].caption.caption for one in found] == [one[0].caption.caption for one in ask(captioner)]
    assert all(len(one[1].caption.candidates) == 2 for one in found)
    assert {one[2].caption.caption for one in found} <= {"yes", "no"}
    assert {one[2].caption.finish_reason for one in found} == {"stop"}
    assert all("W" not in one[4].caption.caption for one in found)
    for number in range(len(kinds)):
        with Captioner.from_bundle(str(llava), DECODING, prompts=kinds[number : number + 1]) as alone:
            assert [one[0].caption.caption for one in ask(alone)] == [one[number].caption.caption for one in found]


def test_a_captioner_of_prompts_says_so_when_it_is_asked_for_a_caption_alone(llava: Path, captioner: Captioner) -> None:
    with pytest.raises(ConfigError, match="made with prompts; expected answer_pixels"):
        captioner.caption_pixels(pixels(), IDS)
    with (
        Captioner.from_bundle(str(llava), DECODING) as plain,
        pytest.raises(ConfigError, match="made without prompts; expected caption or caption_pixels"),
    ):
        plain.answer_pixels(pixels(), IDS, SIZES, VALUES)


def test_the_systems_text_of_the_job_is_that_of_prompts_without_their_own(llava: Path, tmp_path: Path) -> None:
    two = read(tmp_path, 'a: "Why?"\nb: {text: "Why?", system: "Be long."}')
    with Captioner.from_bundle(str(llava), DECODING, system_prompt="Be brief.", prompts=two) as captioner:
        image, [first, *_] = captioner.model.vision.normalised(pixels()), ask(captioner)
    for answer, system in zip(first, ("Be brief.", "Be long."), strict=True):
        turn = f"{HEADER.replace('user', 'system')}{system}<|eot_id|>{HEADER[17:]}<image>\nWhy?{END}"
        assert answer.caption.caption == of_transformers(llava, turn, image[0])


CONSTRAINED = """
choice: {text: "Is it?", choice: [yes, no, "no, never"]}
regex: {text: "Count.", regex: "[0-9]{3}-[a-c]+x", max_new_tokens: 30}
schema:
  text: JSON.
  max_new_tokens: 60
  json_schema:
    type: object
    additionalProperties: false
    required: [n, kind]
    properties: {n: {type: integer, minimum: 10, maximum: 99}, kind: {type: string, enum: [photo, drawing]}}
"""

WHOLE = {
    "choice": "yes|no|no, never",
    "regex": "[0-9]{3}-[a-c]+x",
    "schema": r"\{\s*\"n\"\s*:\s*[1-9][0-9]\s*,\s*\"kind\"\s*:\s*\"(photo|drawing)\"\s*\}",
}


def test_constrained_answers_are_those_of_transformers_with_the_masks_of_llguidance(
    llava: Path, tmp_path: Path
) -> None:
    prompts = read(tmp_path, CONSTRAINED)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(llava)
    with Captioner.from_bundle(str(llava), DECODING, prompts=prompts) as captioner:
        image, found = captioner.model.vision.normalised(pixels()), ask(captioner)
    for place, prompt in enumerate(prompts):
        assert prompt.constraint is not None
        made = Constraint(prompt.constraint, tokenizer.backend_tokenizer.to_str(), [257, 265], prompt.name)
        text = HEADER + "<image>\n" + prompt.texts[0].text.text + END
        length = len(tokenizer(text.replace("<image>", "<image>" * 16), add_special_tokens=False).input_ids)

        def allowed(_: int, ids: Tensor, made: Constraint = made, length: int = length) -> list[int]:
            return [int(token) for token in made.allowed_tokens(ids[length:].tolist()).nonzero()]

        for number in range(3):
            wanted = of_transformers(
                llava,
                text,
                image[number],
                max_new_tokens=prompt.decoding.max_new_tokens,
                prefix_allowed_tokens_fn=allowed,
            )
            assert found[number][place].caption.caption == wanted, prompt.name
            assert found[number][place].caption.is_whole == bool(re.fullmatch(WHOLE[prompt.name], wanted)), wanted
    assert any(answer.caption.is_whole for of_image in found for answer in of_image)


def test_an_answer_cut_at_its_length_is_whole_only_where_the_constraint_allows_it_to_end(
    llava: Path, tmp_path: Path
) -> None:
    lengths = "\n".join(
        f"{name}: {{text: x, regex: '[ab]{{3}}', max_new_tokens: {length}}}"
        for name, length in [("two", 2), ("three", 3), ("four", 4), ("eight", 8)]
    )
    with Captioner.from_bundle(str(llava), DECODING, prompts=read(tmp_path, lengths)) as captioner:
        answers = [answer for of_image in ask(captioner) for answer in of_image]
    assert all(answer.caption.is_whole == (len(answer.caption.caption) == 3) for answer in answers)
    ends = {(answer.caption.finish_reason.value, answer.caption.is_whole) for answer in answers}
    assert ends == {("stop", True), ("length", False), ("length", True)}


def test_engines_of_one_card_share_its_memory(llava: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shares: list[float] = []

    def counted(*arguments: Any, memory_share: float) -> int:
        shares.append(memory_share)
        return auto_slots(*arguments, memory_share=memory_share)

    monkeypatch.setattr("captioner.decoding.engine.auto_slots", counted)
    kinds = read(tmp_path, "a: x\nb: {text: x, num_beams: 2}\nc: {text: x, num_beams: 3}\nd: {text: x, stop: [q]}")
    with Captioner.from_bundle(str(llava), DECODING, prompts=kinds):
        assert shares == pytest.approx([1 / 3, 1 / 2, 1])  # each of what those before it left


def test_clip_scores_are_those_of_the_captions_alone(tmp_path: Path) -> None:
    text = "other: {text: 'w', do_sample: true, num_captions: 2}\ncaption: 'a'"
    prompts = read(tmp_path, text)
    scoring = ScoringConfig(clip_score=True)
    with Captioner.from_bundle("demo", DECODING, scoring=scoring, prompts=prompts) as both:
        size = both.model.image_size
        images = torch.arange(2 * 3 * size * size).reshape(2, 3, size, size).to(torch.uint8)
        found = both.answer_pixels(images, ["a", "b"], [(size, size)] * 2, [{}] * 2)
    with Captioner.from_bundle("demo", DECODING, scoring=scoring, prompts=prompts[1:]) as alone:
        wanted = alone.answer_pixels(images, ["a", "b"], [(size, size)] * 2, [{}] * 2)
    assert [one[0].caption.clip_score for one in found] == [None, None]
    scores = [one[0].caption.clip_score for one in wanted]
    assert [one[1].caption.clip_score for one in found] == pytest.approx(scores)
    assert None not in scores
