"""jobs/evaluate.py: which caption belongs to which references, gates, memory and errors."""

import json
import tracemalloc
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from captioner.command_line import parse, run
from captioner.config import EvaluateConfig
from captioner.errors import ConfigError, InputError
from captioner.evaluation import BatchSizes, Captions, describe_metrics, evaluate, match
from captioner.evaluation.caption_files import CaptionRow
from captioner.evaluation.gates import gates_of
from captioner.evaluation.metrics import METRICS, CaptionEncoder, FloatArray, ImageChunk, Metric, score_captions
from tests.unit.evaluation.reference_files import REFERENCES, write_jsonl, write_parquet

CAPTIONS = {"7": ["a dog on a wall"], "8": ["two red cars"], "9": ["a cat sleeps on the mat"]}


def test_an_empty_caption_counts_as_one_and_an_empty_reference_as_none(tmp_path: Path) -> None:
    captions = write_parquet(tmp_path, "captions.parquet", {"image_id": ["7", "8"], "caption": ["a dog", None]})
    references = write_parquet(
        tmp_path, "r.parquet", {"image_id": ["7", "8", "8", "9"], "caption": ["a dog", "cars", " . ", ""]}
    )
    summary = evaluate(EvaluateConfig(captions=str(captions), references=str(references)))
    assert (summary["images"], summary["references"], summary["reference_images"]) == (2, 2, 2)
    assert summary["bleu_1"] == round(score_captions(["a dog", ""], [["a dog"], ["cars"]]).figures()["bleu_1"], 6)


# Which caption belongs to which references


def side(*image_ids: str, file_names: Mapping[str, str] | None = None) -> Captions:
    rows = [CaptionRow(name, "a dog", (file_names or {}).get(name, "")) for name in image_ids]
    return Captions.read(iter(rows), CaptionEncoder())


def matches(captions: Captions, references: Captions, rule: str) -> dict[str, str]:
    found = match(captions, references, rule)
    names, others = captions.image_ids.to_pylist(), references.image_ids.to_pylist()
    rows = captions.image[found.rows].tolist()
    return {names[row]: others[image] for row, image in zip(rows, found.images.tolist(), strict=True)}


@pytest.mark.parametrize(
    ("caption", "reference", "rules"),
    [
        ("400", "400", {"id", "name", "number"}),
        ("s3://bucket/photos/dog.JPG", "dog", {"name"}),
        ("s3://bucket/photos/dog.jpg", "/data/dog.png", {"name"}),
        ("https://host/dog.jpg?X-Amz-Signature=***&t=1", "dog.jpg", {"name"}),
        ("shard-0001.tar/000400.jpg", "000400", {"name", "number"}),
        ("/data/COCO_val2014_000000000400.jpg", "400", {"number"}),
        ("photo.2020", "photo", set()),
        ("table.parquet#12", "12", set()),
        ("dog.jpg", "cat.jpg", set()),
        ("img_000", "0", {"number"}),
    ],
)
def test_two_names_mean_the_same_image_by_these_rules(caption: str, reference: str, rules: set[str]) -> None:
    captions, references = side("other-1x", caption), side(reference, "another-2y")
    found = {rule for rule in ("id", "name", "number") if matches(captions, references, rule) == {caption: reference}}
    assert found == rules
    assert all(not matches(captions, references, rule) for rule in {"id", "name", "number"} - rules)


def test_a_name_that_two_images_share_belongs_to_none() -> None:
    assert matches(side("train/1.jpg", "val/1.jpg", "2.jpg"), side("1", "2"), "name") == {"2.jpg": "2"}
    assert matches(side("1.jpg", "2.jpg"), side("train/1", "val/1", "2"), "name") == {"2.jpg": "2"}


def test_an_image_is_found_by_its_other_name_too() -> None:
    references = side("17", "18", file_names={"17": "cat.jpg", "18": "dog.jpg"})
    assert matches(side("s3://b/cat.png", "s3://b/18.png"), references, "name") == {
        "s3://b/cat.png": "17",
        "s3://b/18.png": "18",
    }


def test_captions_with_file_names_match_by_either_name_unless_these_disagree() -> None:
    captions = side("17", "18", "19", file_names={"17": "a/cat.jpg", "18": "b/dog.jpg", "19": "c/cow.jpg"})
    matching = match(captions, side("cat", "dog", "19", "cow"), "name")
    assert (matching.rows.tolist(), matching.images.tolist(), matching.num_unmatched) == ([0, 1], [0, 1], 1)


def test_of_several_captions_of_an_image_the_first_counts() -> None:
    found = match(side("b", "a", "b", "c", "b"), side("a", "b"), "id")
    assert (sorted(found.rows.tolist()), found.num_repeated, found.num_unmatched) == ([0, 1], 2, 1)
    assert found.unmatched_examples == ["c"]


def write_captions(folder: Path, captions: Mapping[str, list[str]]) -> str:
    rows = [(name, caption) for name, own in captions.items() for caption in own]
    names, texts = zip(*rows, strict=True)
    return str(write_parquet(folder, "captions.parquet", {"image_id": names, "caption": texts}))


def summary_of(folder: Path, captions: Mapping[str, list[str]], **settings: Any) -> Mapping[str, Any]:
    references = str(write_jsonl(folder, is_list=True))
    return evaluate(EvaluateConfig(captions=write_captions(folder, captions), references=references, **settings))


def test_the_summary_has_the_figures_and_intervals_of_the_metrics(tmp_path: Path) -> None:
    summary = summary_of(tmp_path, CAPTIONS, num_resamples=9, seed=5)
    scores = score_captions([own[0] for own in CAPTIONS.values()], list(REFERENCES.values()))
    figures, intervals = scores.figures(), scores.intervals(num_resamples=9, seed=5)
    assert {name: summary[name] for name in figures} == {name: round(figures[name], 6) for name in figures}
    assert summary["intervals"] == {name: [round(bound, 6) for bound in intervals[name]] for name in figures}


def test_figures_are_those_of_the_matched_images_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    captions = {"x/7.jpg": CAPTIONS["7"], "x/none.jpg": ["nothing"], "x/9.jpg": [*CAPTIONS["9"], "again"]}
    summary = summary_of(tmp_path, captions)
    figures = score_captions([CAPTIONS["7"][0], CAPTIONS["9"][0]], [REFERENCES["7"], REFERENCES["9"]]).figures()
    assert {name: summary[name] for name in figures} == {name: round(figures[name], 6) for name in figures}
    counts = ("images", "matched_by", "captions", "captions_unmatched", "captions_repeated")
    assert [summary[name] for name in counts] == [2, "name", 4, 1, 1]
    assert summary["reference_images_without_caption"] == 1
    shown = capsys.readouterr().err
    assert "2 images have a caption and references, matched by file name without folder and suffix" in shown
    assert "1 captions without references, such as x/none.jpg" in shown
    assert f"CIDEr-D     {figures['cider_d']:8.3f}" in shown


def test_the_rule_that_finds_most_is_taken_and_of_equals_the_strictest(tmp_path: Path) -> None:
    assert summary_of(tmp_path, CAPTIONS)["matched_by"] == "id"
    mixed = {"7": ["a dog"], "img_8.jpg": ["cars"], "img_9.jpg": ["a cat"]}
    assert summary_of(tmp_path, mixed)["matched_by"] == "number"
    assert summary_of(tmp_path, mixed, match_by="id")["images"] == 1


def test_when_nothing_matches_the_error_shows_names_of_both_sides(tmp_path: Path) -> None:
    with pytest.raises(
        InputError,
        match=r"no caption has a reference by image_id or .* has 'dog.jpg';.* has '7', '8', '9'. Expected .*",
    ):
        summary_of(tmp_path, {"dog.jpg": ["a dog"]})
    with pytest.raises(InputError, match=r"no caption has a reference by file name without folder and suffix: "):
        summary_of(tmp_path, {"img_7.jpg": ["a dog"]}, match_by="name")


@pytest.mark.parametrize("empty", ["captions", "references"])
def test_a_side_without_captions_is_an_error(empty: str, tmp_path: Path) -> None:
    full, bare = tmp_path / "full.csv", tmp_path / "bare.csv"
    full.write_text("image_id,caption\n7,a dog\n")
    bare.write_text("image_id,caption\n")
    paths = {"captions": str(full), "references": str(full), empty: str(bare)}
    with pytest.raises(InputError, match=r"bare.csv holds no caption; expected at least one"):
        evaluate(EvaluateConfig(**paths))


# The command


@pytest.mark.parametrize(
    ("flags", "code", "below"),
    [
        (["--min-cider", "0.1", "--min-bleu-4", "0.00001", "--min-rouge-l", "0.1", "--min-matched", "1"], 0, []),
        (["--min-cider", "9.5"], 1, ["--min-cider 9.5"]),
        (["--min", "cider_d=0.1", "--min", "bleu_4=0.00001,rouge_l=0.1"], 0, []),
        (["--min", "cider_d=9.5", "--min", "bleu_1=0.1"], 1, ["--min cider_d=9.5"]),
        (["--min-bleu-4", "0.99", "--min-rouge-l", "0.99"], 1, ["--min-bleu-4 0.99", "--min-rouge-l 0.99"]),
    ],
)
def test_a_figure_below_its_gate_makes_the_job_exit_with_1(
    flags: list[str], code: int, below: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    captions, references = write_captions(tmp_path, CAPTIONS), str(write_jsonl(tmp_path, is_list=True))
    assert run(EvaluateConfig, evaluate, [captions, references, *flags]) == code
    streams = capsys.readouterr()
    summary = json.loads(streams.out.splitlines()[-1])
    assert (summary["ok"], summary["below"]) == (not below, below)
    assert [line for line in streams.err.splitlines() if "below" in line] == [f"below {gate}" for gate in below]


def test_too_few_matched_captions_make_the_job_exit_with_1(tmp_path: Path) -> None:
    summary = summary_of(tmp_path, {"7": ["a dog"], "70": ["a cat"]}, min_matched=0.6)
    assert (summary["ok"], summary["below"]) == (False, ["--min-matched 0.6"])


def test_without_arguments_the_demo_captions_meet_the_demo_references() -> None:
    config = parse(EvaluateConfig, [])
    assert (config.captions, config.references) == ("captions-demo", "demo")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"captions": "out"}, "REFERENCES is missing; expected what out is to be measured against"),
        ({"num_resamples": 0}, "--num-resamples is 0; expected at least 1"),
    ],
)
def test_a_setting_out_of_its_range_is_an_error(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        EvaluateConfig(**settings)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--min-cider", "90"], "--min-cider is 90.0; expected 0 to 10"),
        (["--min-matched", "-0.1"], "--min-matched is -0.1; expected 0 to 1"),
        (["--min", "cider_d=90"], "--min is cider_d=90; expected 0 to 10"),
        (
            ["--min", "cider=0.9"],
            "--min is cider=0.9; expected NAME=VALUE, NAME one of bleu_1, bleu_2, bleu_3,",
        ),
        (["--min", "cider_d"], "--min is cider_d; expected a number, as in cider_d=0.5"),
        (["--min", "cider_d=nan"], "--min is cider_d=nan; expected 0 to 10"),
        (["--min", "ref_clip_score=1"], "--min ref_clip_score=1 is set without --model; expected a bundle whose CLIP"),
    ],
)
def test_a_gate_that_no_evaluation_could_pass_is_wrong_use(
    flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(EvaluateConfig, evaluate, ["not-there.csv", "not-there.csv", *flags]) == 2
    assert message in capsys.readouterr().err


def mean_num_words(chunk: ImageChunk) -> FloatArray:
    return chunk.captions.lengths.astype(float)


def test_a_metric_from_outside_the_package_is_in_the_help_the_report_the_summary_and_the_gates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(METRICS, "num_words", Metric("num_words", "Words", 100, mean_num_words))
    captions, references = write_captions(tmp_path, CAPTIONS), str(write_jsonl(tmp_path, is_list=True))
    assert run(EvaluateConfig, evaluate, [captions, references, "--min", "num_words=5"]) == 1
    streams = capsys.readouterr()
    summary = json.loads(streams.out.splitlines()[-1])
    assert (summary["num_words"], summary["below"]) == (round(14 / 3, 6), ["--min num_words=5"])
    low, high = summary["intervals"]["num_words"]
    assert 3 <= low < summary["num_words"] < high <= 6
    assert "Words          4.667   " in streams.err
    assert "num_words (0 to 100)" in describe_metrics()


def test_a_config_file_may_set_gates_that_flags_add_to(tmp_path: Path) -> None:
    file = tmp_path / "evaluate.yaml"
    file.write_text("references: labels.csv\ncaptions: out\nmin: [cider_d=0.9, bleu_4=0.2]\n")
    config = parse(EvaluateConfig, ["--config", str(file), "--min", "rouge_l=0.4"])
    assert [gate.figure for gate in gates_of(config)] == ["cider_d", "bleu_4", "rouge_l"]


def test_a_config_file_may_name_both_sides(tmp_path: Path) -> None:
    file = tmp_path / "evaluate.yaml"
    file.write_text("references: labels.csv\ncaptions: out\nmin-cider: 0.9\n")
    config = parse(EvaluateConfig, ["--config", str(file)])
    assert (config.captions, config.references, config.min_cider) == ("out", "labels.csv", 0.9)


# Memory


def peak_bytes(folder: Path, num_images: int) -> int:
    """What an evaluation of so many images, with five references each of ten words, holds at most."""
    rng = np.random.default_rng(0)
    chances = 1 / np.arange(1, 5001)  # as words have them
    words = np.array([f"w{number}" for number in range(5000)])

    def captions(number: int) -> list[str]:
        chosen = rng.choice(5000, size=(number, 10), p=chances / chances.sum())
        return [" ".join(words[row]) for row in chosen]

    names = [f"{number:09}.jpg" for number in range(num_images)]
    write_parquet(folder, "c.parquet", {"image_id": [f"s3://b/{n}" for n in names], "caption": captions(num_images)})
    references = {"image_id": names * 5, "caption": captions(5 * num_images)}
    write_parquet(folder, "r.parquet", references)
    config = EvaluateConfig(
        captions=str(folder / "c.parquet"), references=str(folder / "r.parquet"), match_by="name", num_resamples=1
    )
    # too small to be seen in so few images
    sizes = BatchSizes(rows_per_batch=256, images_per_chunk=64, ngrams_per_pass=4096, bootstrap_groups=100)
    tracemalloc.start()
    evaluate(config, sizes)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def test_an_image_with_five_references_costs_less_than_800_bytes(tmp_path: Path) -> None:
    fewer, more = (peak_bytes(tmp_path, num_images) for num_images in (1500, 3000))
    assert (more - fewer) / 1500 < 800
