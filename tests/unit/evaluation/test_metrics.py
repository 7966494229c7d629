"""BLEU, ROUGE-L, CIDEr-D against COCO's published figures and a plain rendering of their definitions; CLIPScore."""

import json
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from captioner.errors import InputError
from captioner.evaluation.metrics import (
    CaptionEncoder,
    EncodedCaptions,
    FloatArray,
    ImageScores,
    clip_scores,
    ref_clip_scores,
    score_captions,
    score_encoded,
    tokenize,
)

TEXT_METRICS = ("bleu_1", "bleu_2", "bleu_3", "bleu_4", "rouge_l", "cider_d")
GOLDEN = Path(__file__).parents[2] / "goldens" / "coco_captions_1000.json"


@pytest.fixture(scope="module")
def coco() -> dict[str, Any]:
    return dict(json.loads(GOLDEN.read_text()))


def score_coco(coco: dict[str, Any], encoder: CaptionEncoder | None = None) -> ImageScores:
    captions, references = [i["candidate"] for i in coco["images"]], [i["references"] for i in coco["images"]]
    return score_captions(captions, references, encoder=encoder)


def score_known(coco: dict[str, Any], known: dict[str, FloatArray]) -> ImageScores:
    encoder = CaptionEncoder()
    captions = encoder.encode(image["candidate"] for image in coco["images"])
    references = encoder.encode(text for image in coco["images"] for text in image["references"])
    owner = np.repeat(np.arange(len(captions)), [len(image["references"]) for image in coco["images"]])
    return score_encoded(captions, references, owner, known=known)


@pytest.fixture(scope="module")
def coco_scores(coco: dict[str, Any]) -> ImageScores:
    return score_coco(coco)


def test_the_figures_that_coco_publishes_come_out_to_three_decimals(
    coco: dict[str, Any], coco_scores: ImageScores
) -> None:
    assert {name: round(value, 3) for name, value in coco_scores.figures().items()} == coco["published"]


def test_on_the_tokens_of_the_file_the_figures_agree_to_four_decimals(coco: dict[str, Any]) -> None:
    figures = score_coco(coco, CaptionEncoder(str.split)).figures()
    assert {name: round(figures[name], 4) for name in coco["recomputed"]} == coco["recomputed"]


def test_tokenized_text_stays_as_it_is(coco: dict[str, Any]) -> None:
    captions = [text for image in coco["images"] for text in (image["candidate"], *image["references"])]
    changed = [caption for caption in captions if " ".join(tokenize(caption)) != caption]
    assert changed == ["a young baseball player in uniform getting ready to bat."]  # its period was doubled


@pytest.mark.parametrize(
    ("caption", "tokens"),
    [
        ("A dog, a cat; and -- (maybe) a bird!", "a dog a cat and maybe a bird"),
        ("The dog's ball isn't the boys' ball.", "the dog 's ball is n't the boys ball"),
        ("They\u2019re \u201chere\u201d \u2014 I've seen it\u2026", "they 're here i 've seen it"),
        ("You cannot say you're gonna go", "you can not say you 're gon na go"),
        ("A twin-hulled boat at 5:55 p.m. for $1,000", "a twin-hulled boat at 5:55 p.m. for $ 1,000"),
        ("On 11th St. near Dr. Who's, e.g. #25", "on 11th st. near dr. who 's e.g. # 25"),
        ("A refrigerator/freezer at the end of a street.", "a refrigerator/freezer at the end of a street"),
        ("'Same' o'clock. Man-", "same o'clock man"),
        ("Ein Caf\u00e9 in M\u00fcnchen", "ein caf\u00e9 in m\u00fcnchen"),
        (" .,!? ", ""),
    ],
)
def test_captions_are_cut_as_the_penn_treebank_does_without_punctuation(caption: str, tokens: str) -> None:
    assert tokenize(caption) == tokens.split()


def plain_figures(captions: list[list[str]], references: list[list[list[str]]]) -> dict[str, float]:
    """The definitions as the papers have them, one image after another, with nothing clever."""
    return {
        **plain_bleu(captions, references),
        "rouge_l": float(np.mean([plain_rouge(c, own) for c, own in zip(captions, references, strict=True)])),
        "cider_d": plain_cider(captions, references),
    }


def grams(words: list[str], order: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(words[i : i + order]) for i in range(len(words) - order + 1))


def plain_bleu(captions: list[list[str]], references: list[list[list[str]]]) -> dict[str, float]:
    figures, product = {}, 1.0
    length = sum(map(len, captions)) + 1e-15
    nearest = [min((abs(len(r) - len(c)), len(r)) for r in own)[1] for c, own in zip(captions, references, strict=True)]
    penalty = math.exp(min(0, 1 - (sum(nearest) + 1e-9) / length))
    for order in range(1, 5):
        right = total = 0
        for caption, own in zip(captions, references, strict=True):
            most: Counter[tuple[str, ...]] = Counter()
            for reference in own:
                most |= grams(reference, order)
            right += (grams(caption, order) & most).total()
            total += grams(caption, order).total()
        product *= (right + 1e-15) / (total + 1e-9)
        figures[f"bleu_{order}"] = product ** (1 / order) * penalty
    return figures


def plain_rouge(caption: list[str], references: list[list[str]]) -> float:
    common = [plain_longest_common(caption, reference) for reference in references]
    if not any(common):
        return 0.0
    precision = max(c / len(caption) for c in common)
    recall = max(c / len(reference) for c, reference in zip(common, references, strict=True))
    return (1 + 1.2**2) * precision * recall / (recall + 1.2**2 * precision)


def plain_longest_common(first: list[str], second: list[str]) -> int:
    table = np.zeros((len(first) + 1, len(second) + 1), int)
    for i, word in enumerate(first):
        for j, other in enumerate(second):
            table[i + 1, j + 1] = table[i, j] + 1 if word == other else max(table[i, j + 1], table[i + 1, j])
    return int(table[-1, -1])


def plain_cider(captions: list[list[str]], references: list[list[list[str]]]) -> float:
    documents: Counter[tuple[str, ...]] = Counter()
    for own in references:
        documents.update({gram for reference in own for order in range(1, 5) for gram in grams(reference, order)})

    def weigh(words: list[str], order: int) -> dict[tuple[str, ...], float]:
        found = grams(words, order)
        return {g: n * (math.log(len(captions)) - math.log(max(1, documents[g]))) for g, n in found.items()}

    def similarity(caption: list[str], reference: list[str], order: int) -> float:
        mine, theirs = weigh(caption, order), weigh(reference, order)
        dot = sum(min(weight, theirs.get(gram, 0.0)) * theirs.get(gram, 0.0) for gram, weight in mine.items())
        norms = math.hypot(*mine.values()) * math.hypot(*theirs.values())
        difference = grams(caption, 2).total() - grams(reference, 2).total()
        return dot / norms * math.exp(-(difference**2) / 72) if norms else 0.0

    each = [
        np.mean([similarity(caption, reference, order) for reference in own for order in range(1, 5)])
        for caption, own in zip(captions, references, strict=True)
    ]
    return float(10 * np.mean(each))


WORDS = st.lists(st.sampled_from(["a", "dog", "cat", "sits", "on", "the", "red", "mat", "by", "two"]), max_size=9)
IMAGES = st.lists(st.tuples(WORDS, st.lists(WORDS.filter(bool), min_size=1, max_size=4)), min_size=1, max_size=7)


@given(images=IMAGES, chunk=st.integers(1, 4))
@settings(max_examples=60, deadline=None)
def test_every_figure_is_its_plain_definition_however_the_images_are_cut_into_chunks(
    images: list[tuple[list[str], list[list[str]]]], chunk: int
) -> None:
    captions, references = [list(part) for part in zip(*images, strict=True)]
    scores = score_captions(
        [" ".join(c) for c in captions], [[" ".join(r) for r in own] for own in references], images_per_chunk=chunk
    )
    assert scores.figures() == pytest.approx(plain_figures(captions, references), rel=1e-9, abs=1e-12)


def test_a_caption_that_is_its_reference_scores_full_marks() -> None:
    captions = ["a dog sits on a wall", "two red cars pass by"]
    figures = score_captions(captions, [[caption] for caption in captions]).figures()
    assert figures == pytest.approx({name: 10.0 if name == "cider_d" else 1.0 for name in TEXT_METRICS})


def test_the_order_of_references_and_those_of_no_caption_change_nothing() -> None:
    encoder = CaptionEncoder()
    captions = encoder.encode(["a dog on a wall", "a red car"])
    references = encoder.encode(["the car is red", "a cat", "a dog on the wall", "", "one red car", "a wall"])
    shuffled = score_encoded(captions, references, np.array([1, -1, 0, 0, 1, 0]))
    plain = score_captions(
        ["a dog on a wall", "a red car"], [["a dog on the wall", "a wall"], ["the car is red", "one red car"]]
    )
    assert shuffled.figures() == plain.figures()


def test_an_image_without_a_reference_is_an_error_that_says_which() -> None:
    with pytest.raises(InputError, match=r"1 of 2 captions, from number 1 on, have no reference .* leave the others"):
        score_captions(["a dog", "a cat"], [["a dog"], ["...", ""]])
    with pytest.raises(InputError, match="no caption to score"):
        score_captions([], [])


def test_document_frequencies_counted_in_passes_are_those_counted_at_once() -> None:
    captions = [f"a {colour} {thing}" for colour in ("red", "blue") for thing in ("dog", "cat", "car")]
    references = [[caption, f"the {caption}"] for caption in captions[::-1]]
    expected = score_captions(captions, references).figures()
    in_passes = score_captions(captions, references, images_per_chunk=1, ngrams_per_pass=1)
    assert in_passes.figures() == pytest.approx(expected)


def test_captions_survive_being_encoded_joined_and_taken() -> None:
    encoder = CaptionEncoder()
    parts = [encoder.encode(["a dog", ""]), encoder.encode([]), encoder.encode(["dog a cat"])]
    joined = EncodedCaptions.concat(parts)
    assert joined.to_lists() == [[0, 1], [], [1, 0, 2]]
    assert joined.take(np.array([2, 1, 2])).to_lists() == [[1, 0, 2], [], [1, 0, 2]]


def test_intervals_hold_the_figure_and_are_the_same_for_the_same_seed(coco_scores: ImageScores) -> None:
    intervals, figures = coco_scores.intervals(seed=3), coco_scores.figures()
    assert intervals == coco_scores.intervals(seed=3) != coco_scores.intervals(seed=4)
    assert all(low < figures[name] < high for name, (low, high) in intervals.items())


def test_the_interval_of_a_mean_is_as_wide_as_its_standard_error_says(coco_scores: ImageScores) -> None:
    per_image = [replace(coco_scores, statistics=row[None]).figures()["rouge_l"] for row in coco_scores.statistics]
    width = 2 * 1.96 * np.std(per_image) / math.sqrt(len(per_image))
    low, high = coco_scores.intervals()["rouge_l"]
    assert high - low == pytest.approx(width, rel=0.1)


def test_sampling_groups_of_images_gives_the_spread_of_sampling_images(coco_scores: ImageScores) -> None:
    low, high = coco_scores.intervals()["cider_d"]
    grouped_low, grouped_high = coco_scores.intervals(max_groups=300)["cider_d"]
    assert grouped_high - grouped_low == pytest.approx(high - low, rel=0.25)
    assert (grouped_low, grouped_high) != (low, high)


def test_clip_score_is_two_and_a_half_times_the_cosine_and_never_negative() -> None:
    image = torch.tensor([[2.0, 0.0], [1.0, 1.0], [0.0, 0.0]], requires_grad=True)
    caption = torch.tensor([[3.0, 4.0], [-1.0, 0.0], [1.0, 0.0]])
    assert clip_scores(image, caption) == pytest.approx([2.5 * 0.6, 0.0, 0.0])


def test_a_score_from_elsewhere_is_the_mean_of_the_images_that_have_it(
    coco: dict[str, Any], coco_scores: ImageScores
) -> None:
    values = np.linspace(0, 2, len(coco_scores))
    values[::4] = np.nan
    scores = score_known(coco, {"clip_score": values, "ref_clip_score": np.full(len(values), np.nan)})
    figures, intervals = scores.figures(), scores.intervals(seed=3)
    assert figures["clip_score"] == pytest.approx(np.nanmean(values))
    low, high = intervals["clip_score"]
    error = np.nanstd(values) / np.sqrt(np.count_nonzero(~np.isnan(values)))
    assert (high - low) / (2 * 1.96 * error) == pytest.approx(1, abs=0.15)
    assert "ref_clip_score" not in figures  # no image has one
    assert {name: figures[name] for name in TEXT_METRICS} == coco_scores.figures()
    assert {name: intervals[name] for name in TEXT_METRICS} == coco_scores.intervals(seed=3)


def test_a_resample_without_a_known_score_counts_as_the_figure(coco: dict[str, Any]) -> None:
    values = np.full(len(coco["images"]), np.nan)
    values[0] = 1.5
    low, high = score_known(coco, {"clip_score": values}).intervals(num_resamples=20)["clip_score"]
    assert low == high == 1.5


def test_ref_clip_score_is_the_harmonic_mean_with_the_nearest_reference() -> None:
    image, caption = torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([[0.6, 0.8], [-1.0, 0.0]])
    references = [torch.tensor([[0.0, 5.0], [-1.0, 0.0]]), torch.tensor([[1.0, 0.0]])]
    with_image, nearest = 2.5 * 0.6, 0.8
    expected = 2 * with_image * nearest / (with_image + nearest)
    assert ref_clip_scores(clip_scores(image, caption), caption, references) == pytest.approx([expected, 0.0])
