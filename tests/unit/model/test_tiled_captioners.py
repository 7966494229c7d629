"""Captioners that cut images into tiles see what transformers' own classes see: fp32 on a CPU, tiny weights."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from captioner.errors import BundleError, ShapeError
from captioner.images import Preprocessing, pixels_of
from captioner.model.bundle import describe, load
from captioner.model.caption_model import CaptionModel
from captioner.model.image_encoder import ImageEncoder
from tests.unit.model.operation_recorder import OperationRecorder
from tests.unit.model.original_llava import save_original
from tests.unit.model.tiled_llavas import (
    NEXT_GRIDS,
    ONEVISION_GRIDS,
    Reference,
    photographs,
    save_llava_next,
    save_onevision,
)
from tests.unit.model.tiny_models import edit_json, preprocessor_config, siglip_preprocessor, write_json

PROMPT = "<|begin_of_text|>USER: {image}\nDescribe. ASSISTANT:"
KINDS: dict[str, Callable[[Path], Path]] = {
    "next-llama": lambda folder: save_llava_next(folder, "llama"),
    "next-mistral": lambda folder: save_llava_next(folder, "mistral"),
    "onevision-qwen2": save_onevision,
}


@pytest.fixture(scope="module", params=KINDS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return KINDS[request.param](tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def model(folder: Path) -> CaptionModel:
    return load(str(folder), device="cpu", prompt=PROMPT)


def encoded(model: CaptionModel, **options: Any) -> tuple[list[torch.Tensor], list[tuple[int, int]]]:
    images = photographs()
    preprocessing = Preprocessing.from_config(model.preprocessing)
    pixels = torch.from_numpy(np.concatenate([pixels_of(image, preprocessing) for image in images]))
    encoder = ImageEncoder(model, num_rows=8, is_scored=False, **options)
    prefixes, joint = encoder(pixels, [image.size for image in images])
    assert joint.shape == (len(images), 0)
    return list(prefixes), [image.size for image in images]


def test_the_image_tokens_are_those_of_transformers(folder: Path, model: CaptionModel) -> None:
    reference = Reference(folder)
    prefixes, sizes = encoded(model, recorder=None)
    suffix = len(model.template.suffix_ids)
    assert model.packer is not None
    for image, prefix, size in zip(photographs(), prefixes, sizes, strict=True):
        expected = reference.features(reference.seen(image))
        assert len(prefix) - suffix == len(expected) == model.packer.anyres.num_tokens(*size)
        # pixels differ by 1 or 2 levels of 255, and a tower of random weights by as little
        assert torch.nn.functional.cosine_similarity(prefix[:-suffix], expected).min() > 0.999
    assert len({len(prefix) for prefix in prefixes}) > 5, "images of many numbers of tokens"


def test_the_same_pixels_give_the_same_image_tokens(folder: Path, model: CaptionModel) -> None:
    reference = Reference(folder)
    for image in photographs():
        pixels = pixels_of(image, Preprocessing.from_config(model.preprocessing))
        seen = reference.seen(image)
        seen["pixel_values"] = model.vision.normalised(torch.from_numpy(pixels))[None]
        expected = reference.features(seen)
        tokens = model.pack(model.encode(torch.from_numpy(pixels)), [image.size])[0]
        torch.testing.assert_close(tokens, expected, rtol=1e-4, atol=1e-5)


def test_an_image_is_encoded_alike_in_any_company(model: CaptionModel) -> None:
    together, _ = encoded(model, recorder=None)
    recorded, _ = encoded(model, recorder=OperationRecorder())
    assert all(torch.equal(one, other) for one, other in zip(together, recorded, strict=True))
    encoder = ImageEncoder(model, num_rows=8, is_scored=False, recorder=None)
    for image, expected in zip(photographs()[:4], together, strict=False):
        pixels = torch.from_numpy(pixels_of(image, Preprocessing.from_config(model.preprocessing)))
        alone = encoder(pixels, [image.size])[0][0]
        torch.testing.assert_close(alone, expected, rtol=1e-5, atol=1e-6)


def test_it_is_described_without_its_weights(folder: Path, model: CaptionModel) -> None:
    described = describe(str(folder), prompt=PROMPT)
    assert described.num_image_tokens == model.num_image_tokens == described.anyres.most_tokens  # type: ignore[union-attr]
    assert described.fingerprint == model.fingerprint
    assert f"<image> x {model.num_image_tokens} at most" in described.prompt_tokens


def test_what_a_config_leaves_out_is_that_of_its_class(tmp_path: Path) -> None:
    folder = save_llava_next(tmp_path)
    edit_json(folder / "preprocessor_config.json", image_processor_type="CLIPImageProcessor")
    config = json.loads((folder / "preprocessor_config.json").read_text())
    del config["image_grid_pinpoints"], config["do_pad"]
    (folder / "preprocessor_config.json").write_text(json.dumps(config))
    read = Preprocessing.from_config(describe(str(folder), prompt=PROMPT).preprocessing)
    assert [list(size) for size in read.resolutions] == NEXT_GRIDS


@pytest.mark.parametrize("is_inside", [True, False], ids=["inside", "named"])
@pytest.mark.parametrize("kind", ["next-llama", "next-mistral", "onevision-qwen2"])
def test_the_original_layout_sees_what_the_converted_one_sees(tmp_path: Path, kind: str, is_inside: bool) -> None:
    theirs = KINDS[kind](tmp_path / "converted")
    is_next = kind != "onevision-qwen2"
    own = preprocessor_config() if is_next else siglip_preprocessor()
    folder = save_original(
        theirs,
        tmp_path / "original",
        tower=None if is_inside else tmp_path / "tower",
        image_aspect_ratio="anyres" if is_next else "anyres_max_4",
        mm_patch_merge_type="spatial_unpad",
        image_grid_pinpoints=NEXT_GRIDS if is_next else ONEVISION_GRIDS,
        mm_vision_select_layer=-2 if is_next else -1,
    )
    write_json(tmp_path / ("tower-config" if is_inside else "tower") / "preprocessor_config.json", own)
    ours, converted = (load(str(where), device="cpu", prompt=PROMPT) for where in (folder, theirs))
    found, expected = (encoded(model, recorder=None)[0] for model in (ours, converted))
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    edit_json(folder / "config.json", mm_patch_merge_type="spatial")
    with pytest.raises(BundleError, match="mm_patch_merge_type 'spatial'; supported is spatial_unpad"):
        describe(str(folder), prompt=PROMPT)
    edit_json(folder / "config.json", mm_patch_merge_type="spatial_unpad", image_aspect_ratio="anyres_best")
    with pytest.raises(BundleError, match="is 'anyres_best'; expected anyres or anyres_max_N"):
        describe(str(folder), prompt=PROMPT)


def without_newline(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if "image_newline" not in name}
    assert len(kept) == len(weights) - 1
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})


def narrow_newline(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if "image_newline" in name)
    save_file(weights | {name: weights[name][:5].clone()}, folder / "model.safetensors", metadata={"format": "pt"})


def change(**values: Any) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / "config.json", **values)


BROKEN: dict[str, tuple[Callable[[Path], None], str]] = {
    "newline": (without_newline, "weights have none; expected image_newline of width 64"),
    "width": (narrow_newline, r"image_newline is \[5\], its config says \[64\]"),
    "cls": (change(vision_feature_select_strategy="full"), "reads 17 states of each tile .* 4 x 4 patches"),
    "grids": (change(image_grid_pinpoints=[[32, 64]]), "image_grid_pinpoints 32x64, its image processor 32x64, 64x32"),
    "pinpoints": (change(image_grid_pinpoints=[[32]]), r"is \[\[32\]\]; expected a list of \[height, width\]"),
    "aspect": (change(vision_aspect_ratio="pad"), "is 'pad'; expected anyres or anyres_max_N"),
}


@pytest.mark.parametrize("broken", BROKEN)
def test_what_cannot_be_tiled_is_refused_with_both_sides(tmp_path: Path, broken: str) -> None:
    folder = save_llava_next(tmp_path)
    spoil, message = BROKEN[broken]
    spoil(folder)
    with pytest.raises((BundleError, ShapeError), match=message):
        describe(str(folder), prompt=PROMPT)
