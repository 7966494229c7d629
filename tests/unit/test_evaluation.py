"""jobs/evaluate.py: every kind of file, which caption belongs to which references, gates and errors."""

import csv
import json
import tracemalloc
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from captioner import demo, metrics
from captioner.caption_files import CaptionRow, read_captions
from captioner.command_line import parse, run
from captioner.config import EvaluateConfig
from captioner.demo.scenes import scene_at
from captioner.errors import ConfigError, InputError
from captioner.evaluation import Captions, evaluate, match, matching
from captioner.metrics import METRICS, CaptionEncoder, score_captions

CAPTIONS = {"7": ["a dog on a wall"], "8": ["two red cars"], "9": ["a cat sleeps on the mat"]}
REFERENCES = {
    "7": ["a dog sits on a wall", "the dog is on the wall"],
    "8": ["two red cars in the street", "cars"],
    "9": ["a cat is asleep on a mat", "the cat sleeps"],
}
ROWS = [CaptionRow(image_id, caption) for image_id, own in REFERENCES.items() for caption in own]


def write_rows(folder: Path, columns: tuple[str, str], delimiter: str) -> Path:
    path = folder / ("references.csv" if delimiter == "," else "references.tsv")
    with path.open("w", newline="") as file:
        writer = csv.writer(file, delimiter=delimiter)
        writer.writerows([("split", *columns), *(("val", row.image_id, row.caption) for row in ROWS)])
    return path


def write_jsonl(folder: Path, *, is_list: bool) -> Path:
    whole: list[dict[str, Any]] = [{"image_id": int(name), "captions": own} for name, own in REFERENCES.items()]
    single: list[dict[str, Any]] = [{"image": row.image_id, "caption": row.caption} for row in ROWS]
    lines = [json.dumps(found) for found in (whole if is_list else single)]
    path = folder / "references.jsonl"
    path.write_text("\n\n".join(lines) + "\n")
    return path


def write_parquet(folder: Path, name: str, columns: Mapping[str, Any]) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(dict(columns)), path)
    return path


def write_list_parquet(folder: Path) -> Path:
    columns = {"image_id": [float(name) for name in REFERENCES], "caption": list(REFERENCES.values())}
    return write_parquet(folder, "references.parquet", columns)


def write_image_parquet(folder: Path) -> Path:
    columns = {"file_name": list(REFERENCES), "caption": list(REFERENCES.values())}
    return write_parquet(folder, "references.parquet", {"image": [b"\xff\xd8"] * len(REFERENCES), **columns})


def write_parquet_folder(folder: Path) -> Path:
    for position, (image_id, own) in enumerate(REFERENCES.items()):
        write_parquet(folder, f"table/part-{position}.parquet", {"image_id": [image_id] * len(own), "caption": own})
    (folder / "table" / "_SUCCESS.parquet").write_text("a marker")
    return folder / "table"


def write_caption_table(folder: Path) -> Path:
    write_parquet_folder(folder / "out").rename(folder / "out" / "captions")
    write_parquet(folder, "out/failures/part-0.parquet", {"image_id": ["10"], "reason": ["missing"]})
    return folder / "out"


def write_token(folder: Path) -> Path:
    path = folder / "Flickr8k.token.txt"
    path.write_text("".join(f"{row.image_id}#{number}\t{row.caption}\n" for number, row in enumerate(ROWS)))
    return path


def write_json(folder: Path, value: Any) -> Path:
    path = folder / "references.json"
    path.write_text(json.dumps(value))
    return path


def annotations() -> list[dict[str, Any]]:
    return [{"image_id": int(row.image_id), "id": 0, "caption": row.caption} for row in ROWS]


def coco() -> dict[str, Any]:
    images = [{"id": int(name), "file_name": f"COCO_val_{name:0>12}.jpg"} for name in REFERENCES]
    return {"info": {}, "images": [*images, {"id": 10}], "annotations": annotations()}


def karpathy(*, has_cocoid: bool) -> dict[str, Any]:
    def image(name: str, own: list[str]) -> dict[str, Any]:
        sentences = [{"raw": own[0], "tokens": []}, {"tokens": own[1].split()}]
        ids = {"cocoid": int(name), "filename": f"{name}.jpg"} if has_cocoid else {"filename": name}
        return {**ids, "split": "test", "sentences": sentences}

    return {"dataset": "coco", "images": [image(name, own) for name, own in REFERENCES.items()]}


@pytest.mark.parametrize(
    "write",
    [
        pytest.param(lambda folder: write_rows(folder, ("image_id", "caption"), ","), id="csv"),
        pytest.param(lambda folder: write_rows(folder, ("uri", "caption"), "\t"), id="tsv"),
        pytest.param(lambda folder: write_jsonl(folder, is_list=True), id="jsonl of lists"),
        pytest.param(lambda folder: write_jsonl(folder, is_list=False), id="jsonl"),
        pytest.param(write_list_parquet, id="parquet of lists"),
        pytest.param(write_image_parquet, id="parquet with the images themselves"),
        pytest.param(write_parquet_folder, id="a folder of parquet"),
        pytest.param(write_caption_table, id="a caption table"),
        pytest.param(write_token, id="Flickr8k's token file"),
        pytest.param(lambda folder: write_json(folder, annotations()), id="COCO results"),
        pytest.param(lambda folder: write_json(folder, {"annotations": annotations()}), id="COCO without images"),
        pytest.param(lambda folder: write_json(folder, coco()), id="COCO"),
        pytest.param(lambda folder: write_json(folder, karpathy(has_cocoid=True)), id="Karpathy's COCO"),
        pytest.param(lambda folder: write_json(folder, karpathy(has_cocoid=False)), id="Karpathy's Flickr"),
    ],
)
def test_every_kind_of_file_gives_the_same_captions(write: Callable[[Path], Path], tmp_path: Path) -> None:
    rows = read_captions(str(write(tmp_path)))
    assert [row._replace(file_name="") for row in rows] == ROWS


def test_coco_and_karpathy_tell_the_file_names_too(tmp_path: Path) -> None:
    assert {row.file_name for row in read_captions(str(write_json(tmp_path, coco())))} == {
        f"COCO_val_{name:0>12}.jpg" for name in REFERENCES
    }
    assert {row.file_name for row in read_captions(str(write_json(tmp_path, karpathy(has_cocoid=True))))} == {
        f"{name}.jpg" for name in REFERENCES
    }


def test_captions_are_read_from_any_store(tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    memory.pipe_file("/evaluation/captions/part-0.parquet", write_list_parquet(tmp_path).read_bytes())
    assert list(read_captions("memory://evaluation")) == ROWS


def test_the_demo_images_have_the_captions_of_their_scenes() -> None:
    rows = list(read_captions("demo"))
    assert len({row.image_id for row in rows}) == len(list(demo.images_path().iterdir()))
    assert ("scene-0180.png", scene_at(180).captions[0]) in [row[:2] for row in rows]


def test_an_empty_caption_counts_as_one_and_an_empty_reference_as_none(tmp_path: Path) -> None:
    captions = write_parquet(tmp_path, "captions.parquet", {"image_id": ["7", "8"], "caption": ["a dog", None]})
    references = write_parquet(
        tmp_path, "r.parquet", {"image_id": ["7", "8", "8", "9"], "caption": ["a dog", "cars", " . ", ""]}
    )
    summary = evaluate(EvaluateConfig(captions=str(captions), references=str(references)))
    assert (summary["images"], summary["references"], summary["reference_images"]) == (2, 2, 2)
    assert summary["bleu_1"] == round(score_captions(["a dog", ""], [["a dog"], ["cars"]]).figures()["bleu_1"], 6)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.csv", None, r"none.csv does not exist; expected the OUTPUT of jobs/caption.py, a .parquet"),
        ("notes.txt", "a dog", r"notes.txt ends in .txt; expected the OUTPUT"),
        ("a.csv", "id,text\n1,a\n", r"a.csv has id, text; expected image_id and caption: rename them"),
        ("b.csv", "image_id,caption\n,a dog\n", r"b.csv, caption row 1: the image is '', .*; expected a text or a"),
        ("c.csv", "", r"c.csv has no columns; expected image_id and caption"),
        ("d.csv", 'image_id,caption\n7,"a' + "b" * 200_000 + '"\n', r"d.csv, line \d+: field larger .* a header"),
        ("a.jsonl", '{"image_id": 1,\n', r"a.jsonl, line 1 is not JSON: .*; expected image_id and caption"),
        ("b.jsonl", "[1, 2]\n", r"b.jsonl holds '\[1, 2\]'; expected objects with image_id and caption"),
        ("c.jsonl", '{"image_id": 1, "caption": [3]}', r"row 1: the image is '1', the caption '\[3\]'; expected"),
        ("a.json", '{"dog": 1}', r"a.json has neither annotations nor images; expected COCO's captions_\*.json"),
        ("b.json", '{"images": [{"id": 1}]}', r"b.json has an image without filename and sentences; expected Karpathy"),
        (
            "d.json",
            '{"images": [{"filename": "7", "sentences": [{"text": "a"}]}]}',
            r"caption \"\[\{'text': 'a'\}\]\"; exp",
        ),
        ("c.json", '[{"image_id": 1, "bbox": 2}]', r"c.json has image_id, bbox; expected image_id and caption"),
        ("a.parquet", "PAR1 and no more", r"a.parquet cannot be read: not a Parquet file"),
    ],
)
def test_what_holds_no_captions_is_an_error_that_names_it(
    name: str, content: str | None, message: str, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=message):
        list(read_captions(str(tmp_path / name)))


def test_a_folder_without_tables_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holds no .parquet and no captions/\*.parquet; expected the OUTPUT"):
        list(read_captions(str(tmp_path)))


def test_a_parquet_file_that_is_damaged_inside_is_an_error(tmp_path: Path) -> None:
    path = write_parquet(tmp_path, "captions.parquet", {"image_id": ["a" * 50] * 9, "caption": ["b" * 50] * 9})
    data = bytearray(path.read_bytes())
    data[4:60] = b"\xff" * 56
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"captions.parquet is damaged: .*; expected a whole Parquet file"):
        list(read_captions(str(path)))


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
    assert {name: summary[name] for name in METRICS} == {name: round(figures[name], 6) for name in METRICS}
    assert summary["intervals"] == {name: [round(bound, 6) for bound in intervals[name]] for name in METRICS}


def test_figures_are_those_of_the_matched_images_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    captions = {"x/7.jpg": CAPTIONS["7"], "x/none.jpg": ["nothing"], "x/9.jpg": [*CAPTIONS["9"], "again"]}
    summary = summary_of(tmp_path, captions)
    figures = score_captions([CAPTIONS["7"][0], CAPTIONS["9"][0]], [REFERENCES["7"], REFERENCES["9"]]).figures()
    assert {name: summary[name] for name in METRICS} == {name: round(figures[name], 6) for name in METRICS}
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
        ({"min_cider": 90.0}, "--min-cider is 90.0; expected 0 to 10"),
        ({"min_matched": -0.1}, "--min-matched is -0.1; expected 0 to 1"),
        ({"num_resamples": 0}, "--num-resamples is 0; expected at least 1"),
    ],
)
def test_a_setting_out_of_its_range_is_an_error(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        EvaluateConfig(**settings)


def test_a_config_file_may_name_both_sides(tmp_path: Path) -> None:
    file = tmp_path / "evaluate.yaml"
    file.write_text("references: labels.csv\ncaptions: out\nmin-cider: 0.9\n")
    config = parse(EvaluateConfig, ["--config", str(file)])
    assert (config.captions, config.references, config.min_cider) == ("out", "labels.csv", 0.9)


# Memory


def peak_bytes(folder: Path, num_images: int) -> int:
    """What an evaluation of so many images, with five references each of ten words, holds at most."""
    lots = np.random.default_rng(0)
    chances = 1 / np.arange(1, 5001)  # as words have them
    words = np.array([f"w{number}" for number in range(5000)])

    def captions(number: int) -> list[str]:
        drawn = lots.choice(5000, size=(number, 10), p=chances / chances.sum())
        return [" ".join(words[row]) for row in drawn]

    names = [f"{number:09}.jpg" for number in range(num_images)]
    write_parquet(folder, "c.parquet", {"image_id": [f"s3://b/{n}" for n in names], "caption": captions(num_images)})
    references = {"image_id": names * 5, "caption": captions(5 * num_images)}
    write_parquet(folder, "r.parquet", references)
    config = EvaluateConfig(
        captions=str(folder / "c.parquet"), references=str(folder / "r.parquet"), match_by="name", num_resamples=1
    )
    tracemalloc.start()
    evaluate(config)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def test_an_image_with_five_references_costs_less_than_800_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module, name, size in (  # what is held at once of all images, small enough not to be seen in so few
        (metrics, "_IMAGES_A_CHUNK", 64),
        (metrics, "_GRAMS_A_PASS", 4096),
        (metrics, "_CAPTIONS_A_COPY", 256),
        (metrics, "_BOOTSTRAP_GROUPS", 100),
        (matching, "_ROWS_A_BATCH", 256),
    ):
        monkeypatch.setattr(module, name, size)
    monkeypatch.setattr("captioner.caption_files._ROWS_A_BATCH", 256)
    fewer, more = (peak_bytes(tmp_path, num_images) for num_images in (1500, 4500))
    assert (more - fewer) / 3000 < 800
