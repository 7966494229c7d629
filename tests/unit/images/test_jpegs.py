"""JPEGs by simplejpeg are those by Pillow, pixel by pixel; what it refuses is Pillow's."""

import io
from itertools import product
from typing import Any

import numpy as np
import pytest
from PIL import Image

from captioner.config import ImageConfig
from captioner.images import Decoded, Preprocessing, decode, jpegs
from captioner.images.jpegs import read_jpeg

pytestmark = pytest.mark.skipif(not jpegs.HAS_SIMPLEJPEG, reason="a platform without simplejpeg")


def jpeg(width: int, height: int, mode: str = "RGB", **options: Any) -> bytes:
    """Smooth colours with some noise."""
    y, x = np.mgrid[:height, :width]
    samples = np.stack([x * 255 / width, y * 255 / height, (x + y) % 256], axis=2)
    samples += np.random.default_rng(0).normal(0, 12, samples.shape)
    file = io.BytesIO()
    image = Image.fromarray(samples.clip(0, 255).astype(np.uint8)).convert(mode)
    image.save(file, "JPEG", **{"quality": 90, **options})
    return file.getvalue()


def by_pillow(data: bytes, scale: int) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as image:
        if scale > 1:
            image.draft(None, (image.width // scale, image.height // scale))
        return np.asarray(image)


@pytest.mark.parametrize("scale", [1, 2, 4, 8])
@pytest.mark.parametrize(("subsampling", "is_progressive"), list(product([0, 1, 2], [False, True])))
def test_pixels_are_those_of_pillow(subsampling: int, is_progressive: bool, scale: int) -> None:
    for size in ((160, 120), (163, 121), (97, 250)):
        data = jpeg(*size, subsampling=subsampling, progressive=is_progressive)
        found = read_jpeg(data, Image.open(io.BytesIO(data)), scale)
        assert found is not None
        assert np.array_equal(np.asarray(found)[..., :3], by_pillow(data, scale))


def test_what_simplejpeg_refuses_or_warns_of_is_left_to_pillow() -> None:
    whole = jpeg(160, 120)
    for data in (jpeg(160, 120, "L"), jpeg(160, 120, "CMYK"), whole[:-200], whole[:-2]):
        assert read_jpeg(data, Image.open(io.BytesIO(data)), 1) is None


@pytest.mark.parametrize("is_fast", [False, True])
def test_an_image_is_the_same_without_simplejpeg(is_fast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    preprocessing, config = Preprocessing(size=16, shortest_edge=16), ImageConfig(fast_decode=is_fast)
    exif = Image.Exif()
    exif[0x0112] = 6
    files = [jpeg(160, 120, exif=exif), jpeg(97, 250), jpeg(160, 120, keep_rgb=True), jpeg(160, 120) + bytes(9)]
    found = [decode(data, preprocessing, config) for data in files]
    monkeypatch.setattr(jpegs, "simplejpeg", None)
    for data, with_it in zip(files, found, strict=True):
        without = decode(data, preprocessing, config)
        assert isinstance(with_it, Decoded)
        assert isinstance(without, Decoded)
        assert (with_it.width, with_it.height) == (without.width, without.height)
        assert np.array_equal(with_it.pixels, without.pixels)
