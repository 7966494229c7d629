"""CLIPScore in the caption job: what transformers' CLIP says, whoever stands beside it; and the best of several."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from transformers import CLIPModel, CLIPTokenizer

from captioner import demo
from captioner.caption_columns import Caption
from captioner.captioning.caption_worker import CaptionWorker
from captioner.captioning.captioner import Captioner
from captioner.captioning.decode_worker import DecodeWorker
from captioner.captioning.plan import plan_job
from captioner.config import CaptionJobConfig, DecodingConfig, ImageConfig, ModelConfig, ScoringConfig
from captioner.errors import BundleError, ConfigError
from captioner.images import Decoded, Decoder, Preprocessing
from captioner.model.bundle import describe, save_bundle
from captioner.model.projector import ProjectorConfig, build_projector
from captioner.schema import captioned_schema, source_schema
from tests.bundles import save_tiny_bundle
from tests.sample_images import encoded

DRAWS = DecodingConfig(max_new_tokens=24, do_sample=True, temperature=2.5, num_captions=6)
SCORED = ScoringConfig(clip_score=True)
RERANKED = ScoringConfig(rerank="clip-score")
pytestmark = pytest.mark.usefixtures("kept_decode_children")


def demo_images(count: int) -> list[Path]:
    return sorted(demo.images_path().iterdir())[:count]


def captions_of(captioner: Captioner, images: list[Any]) -> list[Caption]:
    found = captioner.caption(images)
    assert all(isinstance(one, Caption) for one in found)
    return found  # type: ignore[return-value]


@pytest.fixture(scope="module")
def reranking() -> Iterator[Captioner]:
    captioner = Captioner.from_bundle("demo", DRAWS, scoring=RERANKED)
    yield captioner
    captioner.close()


def reference_scores(pixels: torch.Tensor, captions: list[str]) -> list[float]:
    """2.5 max(cos, 0) by transformers alone, with the paper's prefix."""
    folder = demo.bundle_path() / "clip"
    clip, tokenizer = CLIPModel.from_pretrained(folder).eval(), CLIPTokenizer.from_pretrained(folder)
    mean, std = (torch.tensor(part).view(3, 1, 1) for part in (
        [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
    ))  # fmt: skip
    scores = []
    with torch.no_grad():
        for own, caption in zip(pixels, captions, strict=True):
            image = clip.get_image_features((own[None].float() / 255 - mean) / std).pooler_output
            ids = tokenizer(f"A photo depicts {caption}", return_tensors="pt", truncation=True, max_length=64).input_ids
            text = clip.get_text_features(ids).pooler_output
            scores.append(2.5 * max(0.0, torch.cosine_similarity(image, text).item()))
    return scores


def pixels_of(captioner: Captioner, images: list[Path]) -> torch.Tensor:
    with Decoder(Preprocessing.from_config(captioner.model.preprocessing), ImageConfig()) as decoder:
        found = [decoder.decode(path.read_bytes()) for path in images]
    assert all(isinstance(one, Decoded) for one in found)
    return torch.from_numpy(np.stack([one.pixels for one in found if isinstance(one, Decoded)]))


def test_the_score_of_each_caption_is_what_transformers_says(reranking: Captioner) -> None:
    images = demo_images(3)
    pixels = pixels_of(reranking, images)
    for own, caption in zip(pixels, captions_of(reranking, images), strict=True):
        texts = [one.caption for one in caption.candidates]
        expected = reference_scores(own.expand(len(texts), -1, -1, -1), texts)
        assert [one.clip_score for one in caption.candidates] == pytest.approx(expected, abs=2e-5)


def test_the_best_of_several_is_the_one_that_clip_prefers_and_the_others_are_kept(reranking: Captioner) -> None:
    by_logprob = Captioner.from_bundle("demo", DRAWS, scoring=SCORED)
    images = demo_images(6)
    changed = 0
    for found, plain in zip(captions_of(reranking, images), captions_of(by_logprob, images), strict=True):
        scores = [one.clip_score for one in found.candidates]
        assert scores == sorted(scores, reverse=True)  # type: ignore[type-var]
        assert found.caption == found.candidates[0].caption
        assert sorted(one.caption for one in found.candidates) == sorted(one.caption for one in plain.candidates)
        assert [one.mean_logprob for one in plain.candidates] == sorted(
            (one.mean_logprob for one in plain.candidates), reverse=True
        )
        changed += found.caption != plain.caption
    by_logprob.close()
    assert changed > 0, "captions this wild are not ranked alike by LLaMA and by CLIP"


def test_a_score_does_not_depend_on_the_images_and_captions_beside_it(reranking: Captioner) -> None:
    images = demo_images(11)
    together = captions_of(reranking, images)
    for place in (0, 10):
        alone = reranking.caption([images[place]], [str(place)])[0]
        assert isinstance(alone, Caption)
        assert alone.caption == together[place].caption
        assert alone.clip_score == pytest.approx(together[place].clip_score, abs=1e-6)


def test_a_caption_longer_than_the_text_tower_is_cut_and_equal_ones_score_alike(reranking: Captioner) -> None:
    space = reranking.model.joint_space
    assert space is not None
    long = "a large blue square above a small red triangle " * 20
    first, _, again = space.of_captions([long, "", long])
    assert torch.equal(first, again)
    torch.testing.assert_close(first, space.of_captions([long + "and a cross"])[0])


def test_the_worker_writes_scores_of_captions_and_candidates(tmp_path: Path) -> None:
    config = CaptionJobConfig(
        input_path=str(tmp_path),
        output=str(tmp_path / "out"),
        model=ModelConfig(model="demo"),
        decoding=DRAWS,
        scoring=ScoringConfig(clip_score=True),
    )
    rows: list[dict[str, Any]] = [{"key": key, "image_id": str(key), "attempt": 1, "data": b""} for key in range(3)]
    for row, image in zip(rows, demo_images(2), strict=False):
        row["data"] = image.read_bytes()
    decoded = DecodeWorker(config, describe("demo").preprocessing)(pa.Table.from_pylist(rows, source_schema()))
    found = CaptionWorker(config)(decoded)
    assert found.schema == captioned_schema()
    assert found["clip_score"].is_valid().to_pylist() == [True, True, False]
    assert all(0.0 < one["clip_score"] <= 2.5 for one in found["candidates"][0].as_py())
    assert found["is_repetitive"].to_pylist()[2] is None


def test_a_model_that_reads_patches_looks_at_the_pixels_again(tmp_path: Path) -> None:
    clip = str(demo.bundle_path() / "clip")
    config = ProjectorConfig(kind="mlp", num_features=128, width=128, num_image_tokens=16)
    llama = str(demo.bundle_path() / "llama")
    torch.manual_seed(0)
    save_bundle(tmp_path, build_projector(config), config, clip=clip, llama=llama)
    captioner = Captioner.from_bundle(str(tmp_path), DecodingConfig(max_new_tokens=6), scoring=SCORED)
    images = demo_images(2)
    found = captions_of(captioner, images)
    expected = reference_scores(pixels_of(captioner, images), [one.caption for one in found])
    captioner.close()
    assert [one.clip_score for one in found] == pytest.approx(expected, abs=2e-5)


def test_without_the_flag_there_is_no_score_and_no_text_tower() -> None:
    captioner = Captioner.from_bundle("demo", DecodingConfig(max_new_tokens=4))
    [caption] = captions_of(captioner, demo_images(1))
    captioner.close()
    assert caption.clip_score is None
    assert captioner.model.joint_space is None


@pytest.mark.parametrize(("scoring", "flag"), [(SCORED, "--clip-score"), (RERANKED, "--rerank clip-score")])
def test_a_model_without_text_tower_is_refused_before_the_start(
    tmp_path: Path, scoring: ScoringConfig, flag: str
) -> None:
    bundle = save_tiny_bundle(tmp_path / "bundle")
    (tmp_path / "one.png").write_bytes(encoded("PNG"))
    config = CaptionJobConfig(
        input_path=str(tmp_path / "one.png"),
        output=str(tmp_path / "out"),
        model=ModelConfig(model=bundle),
        decoding=DRAWS,
        scoring=scoring,
    )
    with pytest.raises(ConfigError, match=rf"{flag} compares .* has none; expected a bundle over a whole CLIP"):
        plan_job(config)
    with pytest.raises(BundleError, match="no tokenizer"):
        Captioner.from_bundle(bundle, scoring=SCORED)


def test_reranking_a_single_caption_is_refused() -> None:
    with pytest.raises(ConfigError, match="--rerank is clip-score; expected --num-captions of 2 or more"):
        CaptionJobConfig(scoring=RERANKED)


def test_what_is_scored_is_part_of_what_the_table_is_and_tables_without_stay_what_they_were(tmp_path: Path) -> None:
    def identity(name: str, **flags: Any) -> dict[str, Any]:
        plan = plan_job(CaptionJobConfig(output=str(tmp_path / name), decoding=DRAWS, **flags))
        found = plan.table.identity()
        assert found is not None
        return found

    assert "scoring" not in identity("plain")
    assert identity("scored", scoring=SCORED)["scoring"]["text_tower"] == describe("demo").text_fingerprint
    assert identity("reranked", scoring=RERANKED)["scoring"]["rerank"] == "clip-score"
