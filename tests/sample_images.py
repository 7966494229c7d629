"""Sample images: real encodings of a generated image, and files that only claim to be images."""

import io
from typing import Any

import numpy as np
from PIL import Image


def sample_image(seed: int = 0, size: tuple[int, int] = (48, 40)) -> Image.Image:
    """Return a smooth random image, a different one for each seed."""
    noise = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)


def encoded(kind: str = "JPEG", seed: int = 0, size: tuple[int, int] = (48, 40), **options: Any) -> bytes:
    """Return that image as the bytes of a file."""
    buffer = io.BytesIO()
    sample_image(seed, size).save(buffer, kind, **options)
    return buffer.getvalue()


BROKEN = {
    "empty": b"",
    "not_an_image": b"<!DOCTYPE html><title>404</title>",
    "corrupt": encoded("JPEG", size=(200, 150))[:2000],
    "too_many_pixels": encoded("PNG", size=(300, 300)),
}
"""Reason -> bytes that must be rejected with it (with --max-image-pixels 50000)."""
