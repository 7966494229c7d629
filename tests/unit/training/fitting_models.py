"""A model, features and captions to fit on, at toy size, at random."""

from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from captioner.config import TrainingConfig
from captioner.model.adapter import AdapterConfig
from captioner.model.bundle import load, save_bundle
from captioner.model.caption_model import CaptionModel
from captioner.model.folder import Folder
from captioner.model.language.table import read_language
from captioner.model.projector import ProjectorConfig, build_projector
from captioner.training.fit.batches import IntArray, PixelStream, TokenizedSplit
from captioner.training.fit.fit_loop import Listener
from captioner.training.fit.fit_state import FitState
from captioner.training.fit.projector import ProjectorFit, end_token_id
from captioner.training.fit.validation import Validation
from tests.unit.model import tiny_models

TEMPLATE = "<|begin_of_text|>Look: {image} It shows "
NUM_TRAIN, NUM_VALIDATION = 40, 12


LORA = AdapterConfig(rank=3, alpha=4.0, modules=("q_proj", "down_proj"))


def save_model(
    folder: Path,
    *,
    kind: str = "linear",
    image_tokens: int = 2,
    template: str = TEMPLATE,
    lora: AdapterConfig | None = None,
) -> str:
    """A bundle; lora: with a random adapter, whose second matrices are not zero."""
    tiny_models.save_clip(folder / "clip")
    tiny_models.save_llama(folder / "llama")
    config = ProjectorConfig(
        kind=kind,
        num_features=tiny_models.CLIP_WIDTH,
        width=tiny_models.LLAMA_WIDTH,
        num_image_tokens=image_tokens,
    )
    torch.manual_seed(7)
    projector = build_projector(config)
    adapter = (lora, random_adapter(folder, lora)) if lora else None
    save_bundle(folder, projector, config, clip="clip", llama="llama", template=template, adapter=adapter)
    return str(folder)


def random_adapter(folder: Path, lora: AdapterConfig, seed: int = 3) -> dict[str, torch.Tensor]:
    """Weights of an adapter of the language model of a bundle."""
    language = read_language(Folder.local(folder / "llama"), template=TEMPLATE)
    draw = torch.Generator().manual_seed(seed)
    shapes = lora.shapes(language.family.shapes(language.config))
    return {name: 0.2 * torch.randn(shape, generator=draw) for name, shape in shapes.items()}


def fresh(model_folder: str, dtype: str = "float32", **options: bool) -> CaptionModel:
    return load(model_folder, dtype=dtype, device="cpu", **options)


def captions(num_images: int, *, seed: int) -> list[list[str]]:
    rng = np.random.default_rng(seed)
    words = ["red", "blue", "a", "square", "there is", "of"]
    return [
        [" ".join(rng.choice(words, rng.integers(1, 6))) for _ in range(rng.integers(1, 4))] for _ in range(num_images)
    ]


def features(num_images: int, *, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(num_images, tiny_models.CLIP_WIDTH)).astype(np.float16)


def pixels(num_images: int, *, seed: int) -> np.ndarray:
    shape = (num_images, 3, tiny_models.IMAGE_SIZE, tiny_models.IMAGE_SIZE)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def stream_of(images: np.ndarray) -> PixelStream:
    """The pixels of images that are in memory already, batch by batch."""

    def stream(batches: Iterator[IntArray]) -> Generator[np.ndarray]:
        yield from (images[batch] for batch in batches)

    return stream


def split(model: CaptionModel, num_images: int, *, seed: int, max_tokens: int = 64) -> TokenizedSplit:
    return TokenizedSplit.tokenize(
        features(num_images, seed=seed),
        captions(num_images, seed=seed),
        model.tokenizer,
        end_token_id=end_token_id(model.tokenizer, model.template.text, model.eos_token_ids),
        max_tokens=max_tokens,
    )


def train_split(model: CaptionModel) -> TokenizedSplit:
    return split(model, NUM_TRAIN, seed=1)


def validation(model: CaptionModel, num_scored: int = 0) -> Validation:
    return Validation(split(model, NUM_VALIDATION, seed=2), captions(NUM_VALIDATION, seed=2)[:num_scored])


def config(**changes: object) -> TrainingConfig:
    settings = TrainingConfig(batch_size=8, epochs=2, learning_rate=1e-2, log_every=3, num_scored_images=0)
    return replace(settings, **changes)  # type: ignore[arg-type]


class FitEndedError(Exception):
    """A test has ended a fit."""


class Stop:
    """Ends a fit at the checkpoint of a step, which it keeps."""

    def __init__(self, step: int) -> None:
        self.step, self.saved = step, b""
        self.state = FitState()

    @property
    def listener(self) -> Listener:
        return Listener(on_checkpoint=self._on_checkpoint)

    def _on_checkpoint(self, state: FitState, fit: ProjectorFit) -> None:
        if state.step == self.step:
            self.saved, self.state = state.to_bytes(fit), state
            raise FitEndedError


def interrupted(
    fit: Callable[[bytes | None, Listener | None], FitState], steps: Iterable[int], listener: Listener | None = None
) -> FitState:
    """The end of a fit that was ended after each of these steps, and went on from its checkpoint each time.

    fit: goes on from the bytes of a state to the end. listener: of the last part."""
    saved = None
    for step in steps:
        stop = Stop(step)
        try:
            fit(saved, stop.listener)
        except FitEndedError:
            saved = stop.saved
        else:
            raise AssertionError(f"no checkpoint of step {step}")
    return fit(saved, listener)
