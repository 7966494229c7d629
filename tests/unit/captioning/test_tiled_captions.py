"""Images of all shapes, captioned by LLaVAs that cut them into tiles: greedy tokens of transformers' own classes."""

import io
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

from captioner.caption_columns import Caption
from captioner.captioning import captioner as captioner_module
from captioner.captioning.caption_worker import CaptionWorker
from captioner.captioning.captioner import Captioner
from captioner.captioning.decode_worker import DecodeWorker
from captioner.captioning.image_values import decoded
from captioner.config import CaptionJobConfig, DecodingConfig, ModelConfig, ResourceConfig
from captioner.images import Preprocessing, pixels_of
from captioner.schema import decoded_schema, source_schema
from tests.unit.model.tiled_llavas import SIZES, Reference, photographs, save_llava_next, save_onevision

PROMPT = "<|begin_of_text|>USER: {image}\nDescribe. ASSISTANT:"
LENGTH = 8
ALL_SIZES = [*SIZES, *((height + 3, width + 1) for width, height in SIZES)]
KINDS = {
    "next-llama": lambda folder: save_llava_next(folder, "llama"),
    "next-mistral": lambda folder: save_llava_next(folder, "mistral"),
    "onevision-qwen2": save_onevision,
}


@pytest.fixture(scope="module", params=KINDS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return KINDS[request.param](tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def captioner(folder: Path) -> Iterator[Captioner]:
    config = ModelConfig(model=str(folder), device="cpu", dtype="float32", prompt=PROMPT)
    with Captioner.from_bundle(config, DecodingConfig(max_new_tokens=LENGTH), slots="4") as captioner:
        yield captioner


def expected(folder: Path, captioner: Captioner, images: list[Image.Image]) -> list[str]:
    """What transformers' generate writes of each image alone, whose pixels are ours."""
    reference, model = Reference(folder), captioner.model
    template, captions = model.template, []
    for image in images:
        seen = reference.seen(image)
        pixels = torch.from_numpy(pixels_of(image, Preprocessing.from_config(model.preprocessing)))
        assert torch.dist(model.vision.normalised(pixels), seen["pixel_values"][0], p=float("inf")) < 3 / 255 / 0.26
        seen["pixel_values"] = model.vision.normalised(pixels)[None]
        ids = reference.tokens(seen, list(template.prefix_ids), list(template.suffix_ids), LENGTH)
        captions.append(model.text(ids))
    return captions


def text(outcome: Any) -> str:
    assert isinstance(outcome, Caption), outcome
    return outcome.caption


def test_captions_of_images_of_all_shapes_are_those_of_transformers(folder: Path, captioner: Captioner) -> None:
    images = photographs(ALL_SIZES)
    assert len(images) >= 30
    wanted = expected(folder, captioner, images)
    assert [text(outcome) for outcome in captioner.caption(images)] == wanted, "side by side, of mixed lengths"
    assert [text(captioner.caption(image)) for image in images[::6]] == wanted[::6], "alone"
    assert len(set(wanted)) > 5, "the images make a difference"


def test_a_call_holds_the_pixels_of_few_images_at_once(captioner: Captioner, monkeypatch: pytest.MonkeyPatch) -> None:
    images, wanted = photographs()[:9], captioner.caption(photographs()[:9])
    held: list[Any] = []
    most: list[int] = []

    def watched(*arguments: Any) -> Any:
        outcome = decoded(*arguments)
        held.append(weakref.ref(outcome.pixels))
        most.append(sum(one() is not None for one in held))
        return outcome

    monkeypatch.setattr(captioner_module, "decoded", watched)
    monkeypatch.setattr(Preprocessing, "rows_per_block", 2)
    assert captioner.caption(images) == wanted
    assert (len(most), max(most)) == (9, 2)


def test_a_job_hands_tiles_from_decoding_to_captions(folder: Path, captioner: Captioner, tmp_path: Path) -> None:
    images = photographs()
    files = []
    for image in images:
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        files.append(buffer.getvalue())
    files[3] = b"no image"
    rows = pa.table(
        {
            "key": range(len(files)),
            "image_id": [str(index) for index in range(len(files))],
            "attempt": [1] * len(files),
            "reason": [None] * len(files),
            "detail": [None] * len(files),
            "uri": [None] * len(files),
            "data": files,
        },
        source_schema(),
    )
    config = CaptionJobConfig(
        input_path=str(tmp_path),
        output=str(tmp_path / "out"),
        model=ModelConfig(model=str(folder), device="cpu", dtype="float32", prompt=PROMPT),
        decoding=DecodingConfig(max_new_tokens=LENGTH),
        resources=ResourceConfig(slots="4"),
    )
    preprocessing = captioner.model.preprocessing
    decoded = DecodeWorker(config, preprocessing)(rows)
    assert decoded.schema == decoded_schema(32, in_tiles=True)
    packer = captioner.model.packer
    assert packer is not None
    for row, image in zip(decoded.to_pylist(), images, strict=True):
        if row["reason"] is None:
            tiles = np.frombuffer(b"".join(row["pixels"]), np.uint8).reshape(-1, 3, 32, 32)
            assert len(tiles) == packer.anyres.num_tiles(*image.size)
            assert (tiles == pixels_of(image, Preprocessing.from_config(preprocessing))).all()
    assert decoded.filter(pa.array([row == 3 for row in range(len(files))]))["pixels"].to_pylist() == [None]
    worker = CaptionWorker(config)
    found = worker(decoded.slice(1, 6))  # an array that begins within the tiles
    wanted = captioner.caption(images[1:7])
    assert found["caption"].to_pylist() == [None if row == 3 else text(wanted[row - 1]) for row in range(1, 7)]
    worker.captioner.close()
