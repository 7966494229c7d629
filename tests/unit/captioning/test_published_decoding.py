"""Captions of published layouts are those of transformers' own classes for images of many shapes, by each strategy.

fp32 on a CPU, tiny random weights that the classes have saved. Ours come from a batch of mixed lengths, theirs one by
one from the same pixels.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import LlavaForConditionalGeneration, LogitsProcessor, PreTrainedModel

from captioner.caption_columns import Caption
from captioner.captioning.captioner import Captioner
from captioner.captioning.seeds import image_seed
from captioner.config import DecodingConfig, ModelConfig
from captioner.decoding.sampling import candidate_seed, sample, uniform
from captioner.images import Preprocessing, pixels_of
from captioner.model.bundle import load
from captioner.model.caption_model import CaptionModel
from tests.unit.model.original_llava import save_original
from tests.unit.model.tiled_llavas import Reference, photographs, save_llava_next, save_onevision
from tests.unit.model.tiny_models import clip_config, language_config, save_llava, siglip_config

PROMPT = "<|begin_of_text|>USER: {image}\nDescribe. ASSISTANT:"
LENGTH = 8
END = 257
SHAPES = [(200, 20), (20, 200), (64, 64), (150, 100), (7, 60), (33, 31), (96, 48), (90, 30)]
RATIOS = np.geomspace(0.1, 10, 100)
"""Width over height of images, from 1:10 to 10:1."""


def save_original_llava(folder: Path) -> Path:
    """The original LLaVA's layout with the tower in its weights; transformers reads what it was converted to."""
    return save_original(save_llava(folder / "converted"), folder / "original", tower=None)


def save_llava_of(vision: Any, language: str, strategy: str) -> Callable[[Path], Path]:
    return lambda folder: save_llava(
        folder, vision=vision(), language=language_config(language), vision_feature_select_strategy=strategy
    )


LAYOUTS: dict[str, Callable[[Path], Path]] = {
    "llava-clip-llama": save_llava_of(lambda: clip_config().vision_config, "llama", "default"),
    "llava-siglip-llama": save_llava_of(siglip_config, "llama", "full"),
    "llava-clip-mistral": save_llava_of(lambda: clip_config().vision_config, "mistral", "default"),
    "original-llama": save_original_llava,
    "next-llama": lambda folder: save_llava_next(folder, "llama"),
    "next-mistral": lambda folder: save_llava_next(folder, "mistral"),
    "onevision-qwen2": save_onevision,
}


class Theirs:
    """The class of transformers that reads a checkpoint, given the pixels and the prompt of our model."""

    def __init__(self, folder: Path, model: CaptionModel) -> None:
        self.ours = model
        self.tiled = Reference(folder) if model.packer else None
        source = folder.parent / "converted" if folder.name == "original" else folder
        self.model: PreTrainedModel = (
            self.tiled.model if self.tiled else LlavaForConditionalGeneration.from_pretrained(source)
        )
        self.image_token = getattr(self.model.config, "image_token_index", None) or self.model.config.image_token_id

    def _inputs(self, image: Image.Image) -> dict[str, Tensor]:
        found = torch.from_numpy(pixels_of(image, Preprocessing.from_config(self.ours.preprocessing)))
        pixels = self.ours.vision.normalised(found.reshape(-1, *found.shape[-3:]))
        if self.tiled is None:
            return {"pixel_values": pixels}
        return {**self.tiled.seen(image), "pixel_values": pixels[None]}

    def _num_tokens(self, inputs: dict[str, Tensor]) -> int:
        return len(self.tiled.features(inputs)) if self.tiled else self.ours.num_image_tokens

    def texts(self, image: Image.Image, copies: int = 1, **options: Any) -> list[str]:
        """Return what `generate` writes of so many copies of an image, the best of each first."""
        inputs, template = self._inputs(image), self.ours.template
        ids = torch.tensor(
            [[*template.prefix_ids, *[self.image_token] * self._num_tokens(inputs), *template.suffix_ids]] * copies
        )
        out: Any = self.model.generate(  # type: ignore[operator]
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            **{name: value.repeat(copies, *[1] * (value.ndim - 1)) for name, value in inputs.items()},
            max_new_tokens=LENGTH,
            do_sample=False,
            eos_token_id=END,
            pad_token_id=END,
            **options,
        )
        rows = out[:, ids.shape[1] :].tolist()
        return [self.ours.text(row[: row.index(END)] if END in row else row) for row in rows]


@pytest.fixture(scope="module", params=LAYOUTS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return LAYOUTS[request.param](tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def theirs(folder: Path) -> Theirs:
    return Theirs(folder, load(str(folder), device="cpu", prompt=PROMPT))


def ours(folder: Path, images: list[Image.Image], **decoding: Any) -> list[Caption]:
    """What a job writes of the images, side by side in slots for two of them."""
    settings = DecodingConfig(max_new_tokens=LENGTH, **decoding)
    slots = str(2 * max(settings.num_beams, settings.num_captions))
    config = ModelConfig(model=str(folder), device="cpu", dtype="float32", prompt=PROMPT)
    with Captioner.from_bundle(config, settings, slots=slots) as captioner:
        found = captioner.caption(images, [str(index) for index in range(len(images))])
    assert all(isinstance(one, Caption) for one in found), found
    return [one for one in found if isinstance(one, Caption)]


def images_for(theirs: Theirs) -> list[Image.Image]:
    """Images of all shapes for a model that reads tiles, and of some for one that reads each as one square."""
    return photographs(SHAPES if theirs.tiled else SHAPES[:4])


def test_beams_are_those_of_transformers(folder: Path, theirs: Theirs) -> None:
    images = images_for(theirs)
    found = ours(folder, images, num_beams=3, num_captions=3, length_penalty=0.7)
    for image, caption in zip(images, found, strict=True):
        expected = theirs.texts(image, num_beams=3, num_return_sequences=3, length_penalty=0.7)
        assert [one.caption for one in caption.candidates] == expected
    assert [one.caption for one in found] != [one.caption for one in ours(folder, images)], "beams make a difference"


class Drawn(LogitsProcessor):
    """Leaves of transformers' scores the one token of each row that our rule of drawing takes."""

    def __init__(self, seeds: Sequence[int], decoding: DecodingConfig) -> None:
        self.seeds, self.decoding, self.step = torch.tensor(seeds), decoding, 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        uniforms = uniform(self.seeds, torch.full_like(self.seeds, self.step))
        tokens, _ = sample(scores.float(), uniforms, self.decoding, looks_at_all=True)
        self.step += 1
        return torch.full_like(scores, -torch.inf).scatter(1, tokens[:, None], 0.0)


@pytest.mark.parametrize("options", [{"top_k": 20, "temperature": 1.3}, {"top_p": 0.9}], ids=["top-k", "top-p"])
def test_draws_are_those_from_the_scores_of_transformers(folder: Path, theirs: Theirs, options: Any) -> None:
    images = images_for(theirs)
    decoding = DecodingConfig(do_sample=True, num_captions=2, seed=5, max_new_tokens=LENGTH, **options)
    found = ours(folder, images, do_sample=True, num_captions=2, seed=5, **options)
    for index, (image, caption) in enumerate(zip(images, found, strict=True)):
        seeds = [candidate_seed(image_seed(5, str(index)), number) for number in range(2)]
        expected = theirs.texts(image, copies=2, logits_processor=[Drawn(seeds, decoding)])
        assert sorted(one.caption for one in caption.candidates) == sorted(expected)
    assert len({one.caption for caption in found for one in caption.candidates}) > len(images), "draws differ"


@pytest.mark.slow
def test_captions_of_a_hundred_shapes_are_those_of_transformers(folder: Path, theirs: Theirs) -> None:
    sizes = [(max(1, round(60 * ratio**0.5)), max(1, round(60 / ratio**0.5))) for ratio in RATIOS]
    images = photographs(sizes)
    found = [one.caption for one in ours(folder, images)]
    assert found == [theirs.texts(image)[0] for image in images]
    assert len(set(found)) > 5, "the images make a difference"
