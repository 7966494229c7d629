"""Tiny bundles with random weights, made of transformers' own classes, as a user would make one."""

from pathlib import Path

from captioner.model.bundle import save_bundle
from captioner.model.projector import ProjectorConfig, build_projector
from tests.unit.model import tiny_models


def save_tiny_bundle(folder: Path, num_image_tokens: int = 1, image_size: int = tiny_models.IMAGE_SIZE) -> str:
    """Write a linear bundle that quickly captions small images with random text, and return its folder."""
    tiny_models.save_clip(folder / "clip", tiny_models.clip_config(image_size=image_size))
    tiny_models.save_llama(folder / "llama")
    config = ProjectorConfig(
        kind="linear",
        num_features=tiny_models.CLIP_WIDTH,
        width=tiny_models.LLAMA_WIDTH,
        num_image_tokens=num_image_tokens,
    )
    save_bundle(folder, build_projector(config), config, clip="clip", llama="llama")
    return str(folder)
