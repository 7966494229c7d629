"""Images as people have them: real encodings of a made picture, and files that only claim to be images."""

import io
from typing import Any

import numpy as np
from PIL import Image


def picture(seed: int = 0, size: tuple[int, int] = (48, 40)) -> Image.Image:
    """A smooth random picture; another one for each seed."""
    noise = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)


def encoded(kind: str = "JPEG", seed: int = 0, size: tuple[int, int] = (48, 40), **options: Any) -> bytes:
    """That picture as the bytes of a file."""
    buffer = io.BytesIO()
    picture(seed, size).save(buffer, kind, **options)
    return buffer.getvalue()


BROKEN = {
    "empty": b"",
    "not_an_image": b"<!DOCTYPE html><title>404</title>",
    "corrupt": encoded("JPEG", size=(200, 150))[:2000],
    "too_many_pixels": encoded("PNG", size=(300, 300)),
}
"""Reason -> bytes that must be rejected with it (with --max-image-pixels 50000)."""
