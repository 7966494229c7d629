"""CLIPScore and RefCLIPScore in jobs/evaluate.py: from the table, or from its images read again."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from transformers import CLIPModel, CLIPTokenizer

from captioner import demo
from captioner.captioning.caption_worker import CaptionWorker
from captioner.captioning.decode_worker import DecodeWorker
from captioner.captioning.plan import plan_job
from captioner.command_line import run
from captioner.config import CaptionJobConfig, DecodingConfig, EvaluateConfig, ModelConfig, ScoringConfig
from captioner.errors import BundleError, ConfigError
from captioner.evaluation import evaluate
from captioner.evaluation.caption_files import read_captions
from captioner.tables import Stamp
from captioner.tables.table_images import TableImages
from tests.bundles import save_tiny_bundle
from tests.unit.model.tiny_models import save_siglip

NUM_IMAGES = 8
pytestmark = pytest.mark.usefixtures("kept_decode_children")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    for path in sorted(demo.images_path().iterdir())[:NUM_IMAGES]:
        shutil.copy(path, folder)
    return folder


def caption(images: Path, output: Path, *, clip_score: bool) -> str:
    """A table as a caption job writes it, made in this process."""
    config = CaptionJobConfig(
        input_path=str(images),
        output=str(output),
        model=ModelConfig(model="demo"),
        decoding=DecodingConfig(max_new_tokens=12),
        scoring=ScoringConfig(clip_score=clip_score),
    )
    plan = plan_job(config)
    decode, write = DecodeWorker(plan.config, plan.model.preprocessing), CaptionWorker(plan.config)
    rows = pa.concat_tables(write(decode(rows)) for piece in plan.slices for rows in plan.reader.read(piece))
    plan.table.write(rows, Stamp("run-1", plan.table.digest))
    return str(output)


@pytest.fixture(scope="module")
def scored(images: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    return caption(images, tmp_path_factory.mktemp("scored") / "out", clip_score=True)


@pytest.fixture(scope="module")
def unscored(images: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    return caption(images, tmp_path_factory.mktemp("unscored") / "out", clip_score=False)


def summary_of(captions: str, **settings: Any) -> Mapping[str, Any]:
    return evaluate(EvaluateConfig(captions=captions, references="demo", num_resamples=50, **settings))


def mean_column(table: str) -> float:
    return float(np.mean([row.clip_score for row in read_captions(table) if row.clip_score is not None]))


def reference_figure(table: str) -> float:
    """Mean RefCLIPScore of a scored table by transformers alone, with the paper's prefix."""
    folder = demo.bundle_path() / "clip"
    clip, tokenizer = CLIPModel.from_pretrained(folder).eval(), CLIPTokenizer.from_pretrained(folder)

    def of(texts: list[str]) -> torch.Tensor:
        rows = [
            tokenizer(f"A photo depicts {text}", return_tensors="pt", truncation=True, max_length=64) for text in texts
        ]
        with torch.no_grad():
            found = torch.cat([clip.get_text_features(row.input_ids).pooler_output for row in rows])
        return found / found.norm(dim=-1, keepdim=True)

    references: dict[str, list[str]] = {}
    for row in read_captions("demo"):
        references.setdefault(row.image_id, []).append(row.caption)
    figures = []
    for row in read_captions(table):
        nearest = max(0.0, (of([row.caption]) @ of(references[row.image_id.rpartition("/")[2]]).T).max().item())
        assert row.clip_score is not None
        figures.append(2 * row.clip_score * nearest / (row.clip_score + nearest))
    return float(np.mean(figures))


def test_a_table_with_scores_tells_its_mean_without_a_model(scored: str, capsys: pytest.CaptureFixture[str]) -> None:
    summary = summary_of(scored)
    assert summary["clip_score"] == pytest.approx(mean_column(scored), abs=1e-6)
    low, high = summary["intervals"]["clip_score"]
    assert low < summary["clip_score"] < high
    assert "ref_clip_score" not in summary
    assert "CLIPScore" in capsys.readouterr().err


def test_a_model_adds_the_score_against_references_and_reads_no_image_whose_score_is_its_own(
    scored: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TableImages, "map_images", None)
    summary = summary_of(scored, model="demo")
    assert summary["ref_clip_score"] == pytest.approx(reference_figure(scored), abs=1e-5)
    assert summary["images_unread"] == {}


def test_images_of_a_table_without_scores_are_read_again(scored: str, unscored: str) -> None:
    with_column, without = summary_of(scored, model="demo"), summary_of(unscored, model="demo")
    for name in ("clip_score", "ref_clip_score"):
        assert without[name] == pytest.approx(with_column[name], abs=1e-5)
    assert "clip_score" not in summary_of(unscored)


def test_a_score_of_the_captions_is_not_taken_for_that_of_another_column(scored: str, unscored: str) -> None:
    for path in (scored, f"{scored}/captions"):
        assert "clip_score" in summary_of(path, caption_column="caption")
        assert "clip_score" not in summary_of(path, caption_column="image_id")
    of_column = {path: summary_of(path, caption_column="image_id", model="demo") for path in (scored, unscored)}
    assert of_column[scored]["clip_score"] == pytest.approx(of_column[unscored]["clip_score"], abs=1e-5)
    assert of_column[scored]["clip_score"] < summary_of(scored)["clip_score"]


def test_a_clip_alone_scores_captions_as_the_bundle_that_holds_it(scored: str, unscored: str) -> None:
    clip = str(demo.bundle_path() / "clip")
    alone, of_bundle = summary_of(unscored, clip_score_model=clip), summary_of(unscored, model="demo")
    for name in ("clip_score", "ref_clip_score", "images_unread"):
        assert alone[name] == of_bundle[name]
    assert summary_of(scored, clip_score_model=clip)["clip_score"] == pytest.approx(mean_column(scored), abs=1e-6)


def test_only_a_whole_clip_scores_captions(unscored: str, tmp_path: Path) -> None:
    with pytest.raises(
        BundleError, match=r"the SigLIP in \S+ has no text tower of CLIP; expected a whole CLIP: text_m"
    ):
        summary_of(unscored, clip_score_model=str(save_siglip(tmp_path / "siglip")))
    with pytest.raises(ConfigError, match=r"--clip-score-model is c; expected no CLIP beside --model demo"):
        summary_of(unscored, clip_score_model="c", model="demo")


def test_an_image_that_is_gone_has_no_score_and_is_counted(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "images"
    shutil.copytree(images, copy)
    table = caption(copy, tmp_path / "out", clip_score=False)
    gone, spoilt, *_ = sorted(copy.iterdir())
    gone.unlink()
    spoilt.write_bytes(b"\xff\xd8\xff and no image")
    summary = summary_of(table, model="demo")
    assert summary["images_unread"] == {"missing": 1, "corrupt": 1}
    assert summary["images"] == NUM_IMAGES
    assert 0 < summary["ref_clip_score"] < 2.5
    assert "2 images without CLIPScore, as they cannot be read again: 1 missing, 1 corrupt" in capsys.readouterr().err


def test_a_score_of_another_clip_is_not_mixed_with_this_one(scored: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    real = TableImages.map_images
    monkeypatch.setattr(
        TableImages, "map_images", lambda self, keys, *rest: (seen.extend(keys), real(self, keys, *rest))[1]
    )
    monkeypatch.setattr("captioner.model.bundle.BundleDescription.text_fingerprint", "of another tower")
    summary_of(scored, model="demo")
    assert len(seen) == NUM_IMAGES


@pytest.mark.parametrize(("lowest", "code"), [("0.01", 0), ("2.4", 1)])
def test_a_clip_score_below_its_gate_makes_the_job_exit_with_1(
    scored: str, lowest: str, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(EvaluateConfig, evaluate, [scored, "demo", "--min-clip-score", lowest]) == code
    assert json.loads(capsys.readouterr().out)["below"] == ["--min-clip-score 2.4"] * code


def test_what_cannot_be_scored_is_refused_with_what_to_do(unscored: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has no clip_score; expected a table of a job with --clip-score, or"):
        summary_of(unscored, min_clip_score=0.5)
    with pytest.raises(ConfigError, match=r"--model is .*has none; expected a bundle over a whole CLIP"):
        summary_of(unscored, model=save_tiny_bundle(tmp_path / "bundle"))
    rows = [{"image_id": row.image_id, "caption": row.caption} for row in read_captions("demo")]
    (tmp_path / "plain.json").write_text(json.dumps(rows))
    with pytest.raises(ConfigError, match=r"does not say where their images are; expected the OUTPUT of a caption job"):
        summary_of(str(tmp_path / "plain.json"), model="demo")
    with pytest.raises(ConfigError, match=r"--min-clip-score is 3.0; expected 0 to 2.5"):
        summary_of(unscored, min_clip_score=3.0)
