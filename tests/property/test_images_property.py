"""Whatever the bytes: pixels of the right shape, or a reason; never an exception, never a warning."""

import io
import warnings
from collections.abc import Callable
from functools import cache

import numpy as np
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

from captioner.config import ImageConfig
from captioner.images import Decoded, Preprocessing, decode
from captioner.schema import Reject
from tests.hypothesis_profiles import max_examples

CLIP = Preprocessing(size=32, shortest_edge=32)
CONFIG = ImageConfig(max_image_pixels=200_000)
KINDS = {
    **{kind: {} for kind in ("PNG", "BMP", "DIB", "GIF", "PPM", "TGA", "PCX", "SGI", "QOI", "DDS", "ICNS", "SPIDER")},
    **{kind: {} for kind in ("JPEG", "WEBP", "AVIF", "JPEG2000", "ICO", "XBM", "MSP")},
    "TIFF": {"compression": "tiff_lzw"},
}
MODES = {"SPIDER": "F", "XBM": "1", "MSP": "1"}


@cache
def file(kind: str, mode: str) -> bytes:
    """A small real file with EXIF, a text chunk or a second frame where its format has them."""
    noise = np.random.default_rng(0).integers(0, 256, (24, 40, 3), dtype=np.uint8)
    image, exif, buffer = Image.fromarray(noise).convert(mode), Image.Exif(), io.BytesIO()
    exif[0x0112], exif[0x010E] = 6, "a description"
    frames = {"save_all": True, "append_images": [image]} if kind in ("GIF", "PNG", "WEBP") else {}
    marked = {"exif": exif} if kind in ("JPEG", "PNG", "WEBP", "AVIF", "TIFF") else {}
    image.save(buffer, kind, **KINDS[kind], **frames, **marked)
    return buffer.getvalue()


def files() -> st.SearchStrategy[bytes]:
    plain = [(kind, MODES.get(kind, "RGB")) for kind in KINDS]
    more = [("PNG", "P"), ("PNG", "LA"), ("PNG", "1"), ("TIFF", "I;16"), ("TIFF", "F"), ("JPEG", "CMYK"), ("GIF", "P")]
    return st.sampled_from(plain + more).map(lambda choice: file(*choice))


@st.composite
def damaged(draw: Callable[..., object]) -> bytes:
    data = bytearray(draw(files()))
    for _ in range(draw(st.integers(0, 4))):
        at = draw(st.integers(0, len(data)) | st.integers(0, min(len(data), 64)))
        match draw(st.sampled_from(["flip", "cut", "insert", "overwrite", "splice"])):
            case "flip" if at < len(data):
                data[at] ^= 1 << draw(st.integers(0, 7))
            case "cut":
                del data[at : at + draw(st.sampled_from([1, 4, 100, 1 << 20]))]
            case "insert":
                data[at:at] = draw(st.binary(max_size=16))
            case "overwrite":
                filler = draw(st.sampled_from([b"\xff\xff\xff\xff", b"\0\0\0\0", b"\x7f\xff\xff\xff", b"\xff\xff"]))
                data[at : at + len(filler)] = filler
            case "splice":
                data[at:] = draw(files())[at:]
    return bytes(data)


def assert_pixels_or_reason(data: bytes) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        outcome = decode(data, CLIP, CONFIG)
    if isinstance(outcome, Decoded):
        assert outcome.pixels.shape == (3, 32, 32)
        assert outcome.pixels.dtype == np.uint8
        assert outcome.width * outcome.height <= CONFIG.max_image_pixels
    else:
        assert isinstance(outcome, Reject)
        assert outcome.detail
        assert "\n" not in outcome.detail
        outcome.detail.encode()


@max_examples(150)
@given(damaged())
def test_a_damaged_file_of_any_format_gives_pixels_or_a_reason(data: bytes) -> None:
    assert_pixels_or_reason(data)


@max_examples(150)
@given(st.binary(max_size=300) | st.text(max_size=100).map(lambda text: text.encode("utf-8", "surrogatepass")))
@example(b"P6\n-1 5\n255\n")
@example(b"\0" * 64)
def test_random_bytes_give_pixels_or_a_reason(data: bytes) -> None:
    assert_pixels_or_reason(data)


@max_examples(150)
@given(files(), st.binary(max_size=200))
def test_a_known_header_followed_by_random_bytes_gives_pixels_or_a_reason(data: bytes, rest: bytes) -> None:
    assert_pixels_or_reason(data[:16] + rest)


@max_examples(60)
@given(st.integers(1, 400), st.integers(1, 400), st.sampled_from(["L", "RGB", "RGBA", "1", "I;16"]))
def test_an_image_of_any_size_and_mode_gives_pixels(width: int, height: int, mode: str) -> None:
    outcome = decode(png(width, height, mode), CLIP, CONFIG)
    assert isinstance(outcome, Decoded)
    assert (outcome.width, outcome.height) == (width, height)


def png(width: int, height: int, mode: str) -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, (width, height)).save(buffer, "PNG")
    return buffer.getvalue()
