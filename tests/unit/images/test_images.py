"""Any image file -> the pixels of CLIP's own preprocessing, or a reject with a reason."""

import io
import re
import struct
import threading
import zlib
from collections.abc import Callable
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hostile_decoders import crash_on_c, greedy_on_g, hang_always, hang_on_h, killed_on_k, killed_once
from PIL import Image, ImageDraw, ImageOps
from PIL.PngImagePlugin import PngInfo
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from captioner.config import ImageConfig
from captioner.errors import BundleError, JobError
from captioner.images import Decoded, Decoder, Preprocessing, decode, pixels_of
from captioner.images.pixel_blocks import PixelBlocks, Places
from captioner.schema import Reject, RejectReason

CLIP = Preprocessing()
CONFIG = ImageConfig()
Pixels = npt.NDArray[np.uint8]


@cache
def scene(width: int, height: int, *, seed: int = 0) -> Image.Image:
    """An image with soft and hard edges, fine print and noise, and no symmetry that could hide a turn."""
    random = np.random.default_rng(seed)
    coarse = Image.fromarray(random.integers(0, 256, (5, 7, 3), dtype=np.uint8))
    image = coarse.resize((width, height), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(image)
    draw.rectangle((width // 2, height // 8, width * 3 // 4, height // 2), fill=(255, 0, 0))
    draw.text((width // 4, height // 2), "The quick brown fox", fill=(255, 255, 255))
    tile = random.normal(0, 4, (256, 256, 3)).astype(np.int16)  # to draw a whole image of noise takes longest of all
    noise = np.tile(tile, (height // 256 + 1, width // 256 + 1, 1))[:height, :width]
    return Image.fromarray(np.clip(np.asarray(image) + noise, 0, 255).astype(np.uint8))


def saved(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    quick = {"compress_level": 1} if kind == "PNG" else {}
    image.save(buffer, kind, **quick | options)
    return buffer.getvalue()


def seen(data: bytes, preprocessing: Preprocessing = CLIP, config: ImageConfig = CONFIG) -> Decoded:
    outcome = decode(data, preprocessing, config)
    assert isinstance(outcome, Decoded), outcome
    assert outcome.pixels.shape == (3, preprocessing.size, preprocessing.size)
    assert outcome.pixels.dtype == np.uint8
    assert outcome.pixels.flags.c_contiguous
    assert outcome.pixels.flags.writeable
    return outcome


def refused(data: bytes, config: ImageConfig = CONFIG) -> Reject:
    outcome = decode(data, CLIP, config)
    assert isinstance(outcome, Reject), outcome
    return outcome


def clip_pixels(image: Image.Image, **options: Any) -> Pixels:
    """What transformers' processor sees, before it normalises."""
    processor = CLIPImageProcessorPil(do_rescale=False, do_normalize=False, **options)
    return np.asarray(processor(image)["pixel_values"][0]).astype(np.uint8)


def assert_close(ours: Pixels, theirs: Pixels, *, most: int = 2, mean: float = 0.05) -> None:
    difference = np.abs(ours.astype(int) - theirs)
    assert difference.max() <= most, f"max {difference.max()}"
    assert difference.mean() <= mean, f"mean {difference.mean():.3f}"


# --- the same pixels as transformers' CLIPImageProcessor ---

SIZES = [
    *((224, 224), (640, 480), (480, 640), (225, 224), (223, 301), (1024, 768), (1001, 667)),
    *((50, 40), (1, 1), (2, 3), (17, 300), (300, 17), (3, 900), (900, 3)),
]


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_a_lossless_image_of_any_size_gives_the_pixels_of_clip(size: tuple[int, int]) -> None:
    image = scene(*size)
    outcome = seen(saved(image))
    assert_close(outcome.pixels, clip_pixels(image))
    assert (outcome.width, outcome.height) == size


@pytest.mark.parametrize("size", [(640, 480), (1024, 768), (1344, 1350), (1801, 1403), (2001, 3003)], ids=str)
@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:0"])
def test_a_jpeg_of_any_size_stays_within_three_levels_of_clip(size: tuple[int, int], subsampling: str) -> None:
    data = saved(scene(*size), "JPEG", quality=88, subsampling=subsampling)
    assert_close(seen(data).pixels, clip_pixels(Image.open(io.BytesIO(data))), most=3, mean=0.3)


@pytest.mark.parametrize("drawn", ["noise", "print", "stripes"])
def test_a_jpeg_full_of_detail_stays_within_three_levels(drawn: str) -> None:
    random = np.random.default_rng(1)
    image = Image.new("RGB", (1500, 1400), (255, 0, 0))
    if drawn == "noise":
        image = Image.fromarray(random.integers(0, 256, (1400, 1500, 3), dtype=np.uint8))
    draw = ImageDraw.Draw(image)
    for y in range(0, 1400, 14):
        if drawn == "print":
            draw.text((3, y), "The quick brown fox jumps over the lazy dog " * 6, fill=(255, 255, 255))
        if drawn == "stripes":
            draw.line((0, y, 1500, y + 99), fill=(0, 0, 255), width=3)
    data = saved(image, "JPEG", quality=88)
    assert_close(seen(data).pixels, clip_pixels(image := Image.open(io.BytesIO(data))), most=3, mean=0.3)
    reduced = seen(data, config=ImageConfig(fast_decode=True)).pixels
    assert np.abs(reduced.astype(int) - clip_pixels(image)).max() > 3, "too easy an image to prove anything"


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_a_large_image_is_reduced_before_its_resize_and_stays_within_three_levels(kind: str) -> None:
    image = scene(2100, 1800)
    data = saved(image, kind)
    theirs = clip_pixels(Image.open(io.BytesIO(data)))
    assert_close(seen(data).pixels, theirs, most=3, mean=0.3)
    assert (np.abs(seen(data).pixels.astype(int) - theirs) > 1).any(), "not reduced, or too easy an image"


TALL = [(300, 630), (600, 1100), (1000, 2000), (1000, 2001), (630, 300), (1170, 2532)]


@pytest.mark.parametrize("size", TALL, ids=str)
@pytest.mark.parametrize("orientation", [1, 6])
def test_a_tall_image_is_resized_in_the_order_of_the_installed_pillow(size: tuple[int, int], orientation: int) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = saved(Image.fromarray(noise), exif=exif)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    assert_close(seen(data).pixels, clip_pixels(upright), most=1)
    squeezed = Preprocessing(size=256, shortest_edge=None)
    processor = {"size": {"height": 256, "width": 256}, "do_center_crop": False}
    assert_close(pixels_of(upright, squeezed), clip_pixels(upright, **processor), most=1)


def test_fast_decode_stays_near_the_pixels_of_clip() -> None:
    data = saved(scene(1024, 768), "JPEG", quality=88)
    fast = seen(data, config=ImageConfig(fast_decode=True)).pixels
    assert_close(fast, clip_pixels(Image.open(io.BytesIO(data))), most=40, mean=2.5)


def alpha_scene(mode: str) -> Image.Image:
    image = scene(320, 240).convert(mode)
    image.putalpha(Image.linear_gradient("L").resize((320, 240)))
    return image


MODES: dict[str, tuple[Callable[[], Image.Image], str]] = {
    "grey": (lambda: scene(320, 240).convert("L"), "PNG"),
    "one bit": (lambda: scene(320, 240).convert("1"), "PNG"),
    "palette": (lambda: scene(320, 240).quantize(64), "PNG"),
    "grey with alpha": (lambda: alpha_scene("L"), "PNG"),
    "colour with alpha": (lambda: alpha_scene("RGB"), "PNG"),
    "alpha in WebP": (lambda: alpha_scene("RGB"), "WEBP"),
    "CMYK TIFF": (lambda: scene(320, 240).convert("CMYK"), "TIFF"),
    "CMYK JPEG": (lambda: scene(320, 240).convert("CMYK"), "JPEG"),
    "YCbCr": (lambda: scene(320, 240).convert("YCbCr"), "TIFF"),
    "LAB": (lambda: Image.merge("LAB", scene(320, 240).split()), "TIFF"),
}


@pytest.mark.parametrize("name", MODES)
def test_every_mode_gives_the_pixels_of_clip(name: str) -> None:
    draw, kind = MODES[name]
    data = saved(draw(), kind)
    assert_close(seen(data).pixels, clip_pixels(Image.open(io.BytesIO(data))))


@pytest.mark.parametrize("mode", ["HSV", "RGBa", "RGBX", "PA"])
def test_modes_that_files_rarely_have_give_the_pixels_of_clip(mode: str) -> None:
    image = (alpha_scene("RGB") if mode in ("RGBa", "PA") else scene(320, 240)).convert(mode)
    assert_close(pixels_of(image, CLIP), clip_pixels(image.convert("RGBA") if mode == "RGBa" else image))


def test_transparent_colours_of_a_palette_are_white() -> None:
    image = Image.new("P", (40, 40), 1)
    image.putpalette([9, 9, 9, 200, 10, 10])
    assert (seen(saved(image, "PNG", transparency=1)).pixels == 255).all()
    assert (seen(saved(image, "GIF", transparency=1)).pixels == 255).all()


def test_transparent_pixels_are_white_whatever_their_colour() -> None:
    clear = Image.new("RGBA", (30, 30), (200, 0, 0, 0))
    half = Image.new("RGBA", (30, 30), (0, 0, 0, 128))
    assert (seen(saved(clear)).pixels == 255).all()
    assert (seen(saved(half)).pixels == 127).all()


def test_a_plain_colour_stays_exactly_itself() -> None:
    for colour in ((255, 255, 255), (0, 0, 0), (1, 128, 254)):
        for size in ((640, 480), (1999, 1501), (9, 300)):
            pixels = seen(saved(Image.new("RGB", size, colour))).pixels
            assert (pixels == np.array(colour)[:, None, None]).all()


@pytest.mark.parametrize("dtype", ["<u2", ">u2"])
def test_sixteen_bit_grey_is_scaled_not_clipped(dtype: str) -> None:
    grey = np.asarray(scene(320, 240).convert("L"))
    deep = Image.fromarray((grey.astype(np.uint16) * 257).astype(dtype))
    expected = seen(saved(Image.fromarray(grey))).pixels
    assert_close(pixels_of(deep, CLIP), expected)
    assert_close(seen(saved(deep, "TIFF")).pixels, expected)
    if dtype == "<u2":
        assert_close(seen(saved(deep, "PNG")).pixels, expected)


@pytest.mark.parametrize(
    ("peak", "dtype"),
    [(1, "float32"), (255, "float32"), (65535, "float32"), (1, "int32"), (255, "int32"), (65535, "int32")],
)
def test_deep_samples_take_the_smallest_white_that_holds_them(peak: int, dtype: str) -> None:
    grey = np.tile(np.linspace(0, peak, 256), (256, 1)).astype(dtype)
    pixels = seen(saved(Image.fromarray(grey), "TIFF")).pixels
    expected = seen(saved(Image.fromarray(np.rint(grey * (255 / peak)).astype(np.uint8)))).pixels
    assert_close(pixels, expected)


def test_deep_samples_outside_every_range_span_black_to_white() -> None:
    grey = np.tile(np.linspace(-3, 70_000, 256), (256, 1)).astype(np.float32)
    grey[0, 0], grey[5, 5], grey[7, 7] = np.nan, np.inf, -np.inf
    pixels = seen(saved(Image.fromarray(grey), "TIFF")).pixels
    assert pixels.min() == 0
    assert pixels.max() == 255


@pytest.mark.parametrize(("width", "height"), [(1, 20_000), (20_000, 1), (7, 65_000), (100_000, 3)])
def test_the_longest_strips_neither_fail_nor_fill_the_memory(width: int, height: int) -> None:
    stripes = np.arange(width * height, dtype=np.uint8).reshape(height, width)
    outcome = seen(saved(Image.fromarray(stripes)))
    assert (outcome.width, outcome.height) == (width, height)


# --- turned by EXIF ---


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("size", [(321, 240), (240, 321), (1500, 2025)], ids=str)
def test_each_exif_orientation_gives_the_upright_image(orientation: int, size: tuple[int, int]) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = saved(scene(*size), "JPEG", quality=92, exif=exif)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    outcome = seen(data)
    assert_close(outcome.pixels, clip_pixels(upright), most=3, mean=0.3)
    assert (outcome.width, outcome.height) == upright.size


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF", "AVIF"])
def test_other_formats_are_turned_as_well(kind: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = saved(scene(321, 240), kind, exif=exif)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    assert upright.size == (240, 321)
    assert_close(seen(data).pixels, clip_pixels(upright))


@pytest.mark.parametrize(
    "exif",
    [
        b"",
        b"Exif\0\0",
        b"Exif\0\0II*\0",
        b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + b"\xff" * 40,
        b"Exif\0\0" + b"MM\0*" * 30,
    ],
)
def test_a_broken_exif_block_does_not_cost_the_image(exif: bytes) -> None:
    image = scene(320, 240)
    plain = saved(image, "JPEG", quality=90)
    block = b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif
    assert (seen(plain[:2] + block + plain[2:]).pixels == seen(plain).pixels).all()


def test_a_broken_exif_text_of_a_png_does_not_cost_the_image() -> None:
    info = PngInfo()
    info.add_text("Raw profile type exif", "\nexif\n  8\nnot hex\n")
    image = scene(320, 240)
    assert (seen(saved(image, pnginfo=info)).pixels == seen(saved(image)).pixels).all()


def test_exif_that_a_png_has_behind_its_pixels_turns_it() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    image = scene(321, 240)
    plain, block = saved(image), b"eXIf" + exif.tobytes().removeprefix(b"Exif\0\0")
    chunk = struct.pack(">I", len(block) - 4) + block + struct.pack(">I", zlib.crc32(block))
    outcome = seen(plain[:-12] + chunk + plain[-12:])
    assert (outcome.width, outcome.height) == (240, 321)
    assert (outcome.pixels == seen(saved(image, exif=exif)).pixels).all()


@pytest.mark.parametrize("orientation", [0, 9, 255])
def test_an_exif_orientation_that_does_not_exist_turns_nothing(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = scene(320, 240)
    plain, turned = saved(image, "JPEG"), saved(image, "JPEG", exif=exif)
    assert (seen(plain).pixels == seen(turned).pixels).all()


# --- formats ---

LOSSLESS = ["PNG", "BMP", "DIB", "GIF", "TIFF", "PPM", "TGA", "PCX", "SGI", "QOI", "DDS", "ICO"]
LOSSY = ["JPEG", "MPO", "WEBP", "AVIF", "JPEG2000", "ICNS"]


@pytest.mark.parametrize("kind", LOSSLESS + LOSSY)
def test_every_format_is_read(kind: str) -> None:
    image = scene(128, 128)
    data = saved(image, kind, **({"sizes": [(128, 128)]} if kind == "ICO" else {}))
    same = Image.open(io.BytesIO(data))
    assert_close(seen(data).pixels, clip_pixels(same))
    assert np.abs(seen(data).pixels.astype(int) - clip_pixels(image)).mean() < 12, "another image"


@pytest.mark.parametrize("kind", ["GIF", "PNG", "TIFF", "WEBP", "AVIF"])
def test_of_several_frames_the_first_is_read(kind: str) -> None:
    red, blue = Image.new("RGB", (50, 40), (250, 0, 0)), Image.new("RGB", (50, 40), (0, 0, 250))
    pixels = seen(saved(red, kind, save_all=True, append_images=[blue])).pixels
    assert pixels[0].min() > 230
    assert pixels[2].max() < 20


# --- rejects ---


def test_no_bytes_are_empty() -> None:
    assert refused(b"") == Reject(RejectReason.EMPTY, "0 bytes")


def test_too_many_bytes_are_too_large() -> None:
    refusal = refused(b"x" * 1001, ImageConfig(max_image_bytes=1000))
    assert refusal == Reject(RejectReason.TOO_LARGE, "1001 bytes; --max-image-bytes is 1000")


def png_header(width: int, height: int) -> bytes:
    """A PNG that promises more pixels than it has."""
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    idat = b"IDAT" + zlib.compress(b"\0" * 100)
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(part) - 4) + part + struct.pack(">I", zlib.crc32(part)) for part in (chunk, idat)
    )


def test_too_many_pixels_are_refused_before_they_are_decoded() -> None:
    refusal = refused(png_header(30_000, 30_000))
    assert refusal.reason is RejectReason.TOO_MANY_PIXELS
    assert "900000000 pixels" in refusal.detail
    assert refusal.detail.endswith("--max-image-pixels is 100000000")


def test_the_pixel_limit_is_exact_and_can_be_raised_above_pillows_own() -> None:
    data = saved(Image.new("L", (100, 100)))
    assert refused(data, ImageConfig(max_image_pixels=9_999)).reason is RejectReason.TOO_MANY_PIXELS
    seen(data, config=ImageConfig(max_image_pixels=10_000))
    before = Image.MAX_IMAGE_PIXELS
    large = refused(png_header(20_000, 20_000), ImageConfig(max_image_pixels=10**9))
    assert large.reason is RejectReason.CORRUPT
    assert before == Image.MAX_IMAGE_PIXELS


def test_an_icon_whose_header_lies_about_its_size_is_refused_too() -> None:
    inner = saved(Image.new("RGB", (200, 200)))
    icon = struct.pack("<HHHBBBBHHII", 0, 1, 1, 16, 16, 0, 0, 1, 32, len(inner), 22) + inner
    assert refused(icon, ImageConfig(max_image_pixels=10_000)).reason is RejectReason.TOO_MANY_PIXELS


@pytest.mark.parametrize(
    ("data", "detail"),
    [
        (b"<!DOCTYPE html><html><body>404", r"starts with '<!DOCTYPE html><html><bo': HTML or XML; 30 bytes"),
        (b'{"error": "no such key"}', r"starts with '{\"error\": \"no such key\"}': JSON; 24 bytes"),
        (b"version https://git-lfs.github.com/spec/v1\n", r"Git LFS pointer"),
        (b"PK\3\4" + bytes(40), r"starts with bytes 50 4b 03 04 00 .*: ZIP; 44 bytes"),
        (b"hello", r"starts with 'hello'; 5 bytes"),
        (bytes(5000), r"zeros; 5000 bytes"),
        (b"\x07", r"starts with bytes 07; 1 bytes"),
    ],
)
def test_other_bytes_are_not_an_image_and_the_detail_names_their_likely_format(data: bytes, detail: str) -> None:
    refusal = refused(data)
    assert refusal.reason is RejectReason.NOT_AN_IMAGE
    assert re.search(detail, refusal.detail), refusal.detail


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 99 99\n%%EndComments\n", "EPS"),
        (b"%PDF-1.7\n%\xe2\xe3", "PDF"),
        (b'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg"/>', "SVG"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIC"),
        (b"\xff\x0a\xfa\x7f", "JPEG XL"),
        (b"\xd7\xcd\xc6\x9a" + bytes(40), "WMF"),
    ],
)
def test_image_formats_that_are_not_read_are_unsupported_by_name(data: bytes, name: str) -> None:
    refusal = refused(data)
    assert refusal.reason is RejectReason.UNSUPPORTED
    assert f": {name}" in refusal.detail


def test_a_variant_that_the_decoder_lacks_is_unsupported() -> None:
    data = bytearray(saved(scene(40, 30), "BMP"))
    data[30:34] = struct.pack("<I", 77)  # compression
    refusal = refused(bytes(data))
    assert refusal.reason is RejectReason.UNSUPPORTED
    assert "Unsupported BMP compression (77)" in refusal.detail


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "AVIF", "JPEG2000"])
@pytest.mark.parametrize("share", [0.03, 0.3, 0.9])
def test_a_file_cut_short_is_corrupt(kind: str, share: float) -> None:
    data = saved(scene(200, 150), kind)
    refusal = refused(data[: max(16, int(len(data) * share))])
    assert refusal.reason is RejectReason.CORRUPT, refusal
    assert kind in refusal.detail


def test_the_detail_of_a_cut_jpeg_is_pillows_message() -> None:
    refusal = refused(saved(scene(640, 480), "JPEG")[:2000])
    assert re.fullmatch(r"JPEG: OSError: image file is truncated \(\d+ bytes not processed\)", refusal.detail)


def test_a_broken_header_is_corrupt_not_unknown() -> None:
    assert refused(b"\xff\xd8\xff\xe0").detail.startswith("JPEG: ")
    assert refused(b"\x89PNG\r\n\x1a\n" + bytes(30)).reason is RejectReason.CORRUPT


def test_a_detail_is_one_line_of_valid_text() -> None:
    for data in (b"a\nb\xff\xfe\ttext", b"P6\n\xff\n", "BM\ud800".encode("utf-8", "surrogatepass")):
        detail = refused(data).detail
        assert detail == " ".join(detail.split())
        detail.encode()


@pytest.mark.parametrize("error", [ValueError, RecursionError, struct.error, KeyError, AssertionError])
def test_any_error_of_a_decoder_is_a_reject_that_names_it(
    error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise error("of\n two lines \ud800")

    monkeypatch.setattr(Image, "open", fail)
    refusal = refused(b"GIF89a")
    assert refusal.reason is RejectReason.CORRUPT
    assert refusal.detail.startswith(f"GIF: {error.__name__}: ")
    assert "\n" not in refusal.detail
    refusal.detail.encode()


# --- a PIL image, for notebooks ---


def test_an_open_image_gives_the_pixels_of_its_file_and_stays_as_it_is() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    for kind in ("PNG", "JPEG"):
        data = saved(scene(321, 240), kind, exif=exif)
        image = Image.open(io.BytesIO(data))
        assert (pixels_of(image, CLIP) == seen(data).pixels).all()
        assert image.size == (321, 240)


def test_an_open_image_that_cannot_be_loaded_is_a_reject() -> None:
    with Decoder(CLIP, CONFIG) as decoder:
        cut = Image.open(io.BytesIO(saved(scene(640, 480), "JPEG")[:2000]))
        outcome = decoder.decode_image(cut)
        assert isinstance(outcome, Reject)
        assert outcome.reason is RejectReason.CORRUPT
        good = decoder.decode_image(scene(64, 48))
        assert isinstance(good, Decoded)
        assert (good.width, good.height) == (64, 48)


def test_an_open_image_of_too_many_pixels_is_a_reject() -> None:
    outcome = Decoder(CLIP, ImageConfig(max_image_pixels=99)).decode_image(Image.new("L", (10, 10)))
    detail = "Image size (100 pixels) exceeds limit; --max-image-pixels is 99"
    assert outcome == Reject(RejectReason.TOO_MANY_PIXELS, detail)


# --- what a bundle's processor may ask for ---


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"size": 224, "crop_size": 224},
        {"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}},
        {"size": {"shortest_edge": 64}, "crop_size": 48, "resample": 2},
        {"size": {"shortest_edge": 65}, "crop_size": 65, "resample": 1},
        {"size": {"height": 96, "width": 96}, "do_center_crop": False},
        {"size": {"height": 96, "width": 96}, "crop_size": 96},
        {"do_normalize": False, "do_convert_rgb": True, "image_processor_type": "CLIPImageProcessorFast"},
    ],
    ids=str,
)
@pytest.mark.parametrize("size", [(301, 207), (207, 301)], ids=str)
def test_a_preprocessor_config_gives_the_pixels_of_its_processor(config: dict[str, Any], size: tuple[int, int]) -> None:
    image = scene(*size)
    options = {name: value for name, value in config.items() if name not in ("image_processor_type", "do_normalize")}
    assert_close(pixels_of(image, Preprocessing.from_config(config)), clip_pixels(image, **options))


def test_mean_and_std_are_read_for_the_device() -> None:
    config = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.2, 0.1]}
    preprocessing = Preprocessing.from_config({"image_processor": config})
    assert preprocessing.mean == (0.5, 0.4, 0.3)
    assert preprocessing.std == (0.2, 0.2, 0.1)
    assert Preprocessing.from_config({"do_normalize": False}).std == (1.0, 1.0, 1.0)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"do_resize": False}, "do_resize = False; supported is true"),
        ({"do_pad": True}, "do_pad = True; supported is false"),
        ({"do_rescale": False}, "do_rescale = False; supported is true"),
        ({"rescale_factor": 1.0}, "rescale_factor = 1.0; supported is 1/255"),
        ({"resample": 0}, r"resample = 0; supported is 2 \(bilinear\), 3 \(bicubic\), 1 \(lanczos\)"),
        ({"do_center_crop": False}, "do_center_crop = False; supported is true, or a square size"),
        ({"size": {"shortest_edge": 200}}, "size = 200; supported is >= crop_size 224"),
        ({"size": {"shortest_edge": 224, "longest_edge": 400}}, "size = .*; supported is a number"),
        ({"crop_size": {"height": 224, "width": 100}}, "crop_size = .*; supported is one number"),
        ({"size": {"height": 96, "width": 96}, "crop_size": 64}, "crop_size = 64; supported is the resized side 96"),
        ({"image_mean": [0.5]}, r"image_mean = \(0.5,\); supported is 3 channels"),
        ({"image_std": 0.5}, "image_std = 0.5; supported is a list of 3 numbers"),
        ({"image_processor_type": "ViTImageProcessor"}, "image_processor_type = 'ViTImageProcessor'"),
    ],
)
def test_a_processor_that_does_something_else_is_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(BundleError, match=message):
        Preprocessing.from_config(config)


# --- the deadline, and crashes ---


def test_an_image_that_hangs_in_c_is_a_timeout_and_the_next_one_is_decoded() -> None:
    config = ImageConfig(decode_timeout_s=5)  # of wall clock: a good image must make it on a busy machine
    with Decoder(CLIP, config, decode_one=hang_on_h) as decoder:
        good = saved(scene(64, 48))
        decoder.decode(good)
        outcomes = decoder.decode_batch([good, b"h", good])
        assert outcomes[1] == Reject(RejectReason.DECODE_TIMEOUT, "not decoded in time; --decode-timeout-s is 5")
        assert isinstance(outcomes[0], Decoded)
        assert isinstance(outcomes[2], Decoded)
        assert decoder.num_killed == 1


def test_an_image_that_crashes_its_decoder_is_corrupt_and_the_next_one_is_decoded() -> None:
    with Decoder(CLIP, CONFIG, decode_one=crash_on_c) as decoder:
        outcomes = decoder.decode_batch([b"c", saved(scene(64, 48))])
    assert outcomes[0] == Reject(RejectReason.CORRUPT, "crashed its decoder twice (SIGSEGV)")
    assert isinstance(outcomes[1], Decoded)
    assert decoder.num_killed == 2


def test_an_image_whose_decoder_is_killed_is_out_of_memory_and_no_other_image_is_lost() -> None:
    files = [saved(scene(64, 48, seed=seed)) for seed in range(5)]
    with Decoder(CLIP, CONFIG, decode_one=killed_on_k) as decoder:
        outcomes = decoder.decode_batch([*files[:3], b"k", b"", b"x", *files[3:]])
        assert decoder.num_killed == 2
    killed, empty, strange = outcomes[3:6]
    assert isinstance(killed, Reject)
    assert isinstance(empty, Reject)
    assert isinstance(strange, Reject)
    assert (killed.reason, empty.reason, strange.reason) == ("out_of_memory", "empty", "not_an_image")
    for outcome, data in zip(outcomes[:3] + outcomes[6:], files, strict=True):
        assert same(outcome, decode(data, CLIP, CONFIG))


@pytest.mark.parametrize("num_processes", [1, 2])
def test_pixels_come_into_their_places_whatever_becomes_of_other_images(num_processes: int) -> None:
    files = [saved(scene(64, 48, seed=seed)) for seed in range(4)]
    batch = [files[0], b"", b"c", files[1], b"x", files[2], b"c", files[3]]
    block = PixelBlocks().lend(len(batch), 3 * 224 * 224)
    assert block
    block.rows[:] = 7
    with Decoder(CLIP, CONFIG, num_processes=num_processes, decode_one=crash_on_c) as decoder:
        outcomes = decoder.decode_batch(batch, Places(block, range(len(batch))))
    for data, outcome, place in zip(batch, outcomes, block.rows, strict=True):
        if data not in files:
            assert isinstance(outcome, Reject)
            assert (place == 7).all(), "no image was decoded here"
            continue
        assert isinstance(outcome, Decoded)
        assert np.shares_memory(outcome.pixels, place)
        alone = decode(data, CLIP, CONFIG)
        assert isinstance(alone, Decoded)
        assert (place == alone.pixels.reshape(-1)).all()


def test_pixels_of_an_image_whose_decoder_was_killed_once_come_into_its_place(tmp_path: Path) -> None:
    files = [saved(scene(64, 48, seed=seed)) for seed in range(3)]
    block = PixelBlocks().lend(len(files), 3 * 224 * 224)
    assert block
    with Decoder(CLIP, CONFIG, decode_one=killed_once) as decoder:
        marked = b"once:%s|%s" % (bytes(tmp_path / "killed"), files[1])
        decoder.decode_batch([files[0], marked, files[2]], Places(block, range(len(files))))
        assert decoder.num_killed == 1
    for data, place in zip(files, block.rows, strict=True):
        alone = decode(data, CLIP, CONFIG)
        assert isinstance(alone, Decoded)
        assert (place == alone.pixels.reshape(-1)).all()


def test_an_image_that_asks_for_too_much_memory_is_refused_and_its_process_lives_on() -> None:
    with Decoder(CLIP, CONFIG, decode_one=greedy_on_g) as decoder:
        greedy, good = decoder.decode_batch([b"g", saved(scene(64, 48))])
        assert decoder.num_killed == 0
    assert isinstance(greedy, Reject)
    assert greedy.reason is RejectReason.OUT_OF_MEMORY
    assert "--max-image-pixels" in greedy.detail
    assert isinstance(good, Decoded)


def test_an_image_that_was_opened_but_not_loaded_has_the_deadline_too(tmp_path: Path) -> None:
    path = tmp_path / "lazy.png"
    path.write_bytes(saved(scene(64, 48)))
    with Decoder(CLIP, ImageConfig(decode_timeout_s=0.5), decode_one=hang_always) as decoder, Image.open(path) as image:
        lazy = decoder.decode_image(image)
        assert isinstance(lazy, Reject)
        assert lazy.reason is RejectReason.DECODE_TIMEOUT
        image.load()
        assert same(decoder.decode_image(image), decode(path.read_bytes(), CLIP, CONFIG))


def test_a_child_process_gives_what_this_process_gives() -> None:
    files = [saved(scene(300, 200, seed=seed), kind) for seed, kind in enumerate(("PNG", "JPEG", "GIF", "WEBP"))]
    files += [b"", b"hello", files[1][:900], b"x" * 10]
    with Decoder(CLIP, CONFIG) as decoder:
        outcomes = decoder.decode_batch(files)
    for outcome, data in zip(outcomes, files, strict=True):
        assert same(outcome, decode(data, CLIP, CONFIG))


def same(one: Decoded | Reject, other: Decoded | Reject) -> bool:
    if isinstance(one, Decoded) and isinstance(other, Decoded):
        return (one.width, one.height) == (other.width, other.height) and bool((one.pixels == other.pixels).all())
    return one == other


def test_many_threads_get_the_answers_to_their_own_images() -> None:
    files = [saved(Image.new("L", (9, 9), shade)) for shade in range(40)]
    with Decoder(CLIP, CONFIG, num_processes=2) as decoder:
        shades: dict[int, set[int]] = {}

        def ask(shade: int) -> None:
            outcome = decoder.decode(files[shade])
            assert isinstance(outcome, Decoded)
            shades[shade] = set(outcome.pixels.ravel().tolist())

        threads = [threading.Thread(target=ask, args=(shade,)) for shade in range(40)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        batch = decoder.decode_batch(files)
    assert shades == {shade: {shade} for shade in range(40)}
    assert [outcome.pixels[0, 0, 0] for outcome in batch if isinstance(outcome, Decoded)] == list(range(40))


def test_an_image_after_a_large_one_gets_its_own_pixels() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (1300, 1300, 3), dtype=np.uint8)
    large, small = saved(Image.fromarray(noise), "BMP"), saved(scene(64, 48))
    assert len(large) > 5_000_000
    with Decoder(CLIP, CONFIG) as decoder:
        for data in (large, small, large[:-1000], small):
            assert same(decoder.decode(data), decode(data, CLIP, CONFIG))


def test_messages_that_a_library_prints_about_a_broken_file_are_discarded(capfd: pytest.CaptureFixture[str]) -> None:
    data = bytearray(saved(scene(64, 48), "TIFF", compression="tiff_lzw"))
    data[200:400] = b"\xff" * 200
    assert refused(bytes(data)).reason is RejectReason.CORRUPT
    assert capfd.readouterr().err, "too quiet a file to prove anything"
    with Decoder(CLIP, CONFIG) as decoder:
        assert isinstance(decoder.decode(bytes(data)), Reject)
    assert capfd.readouterr() == ("", "")


def test_closing_ends_the_child_process_and_another_image_starts_a_new_one() -> None:
    decoder = Decoder(CLIP, CONFIG)
    for _ in range(2):
        assert isinstance(decoder.decode(saved(scene(64, 48))), Decoded)
        decoder.close()


def test_a_decoder_whose_process_cannot_start_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.executable", "/bin/false")
    with pytest.raises(JobError, match=r"the process that decodes images did not start \(exit status 1\)"):
        Decoder(CLIP, CONFIG).decode(b"any")


def test_a_child_that_is_killed_while_it_starts_is_started_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    was_killed = tmp_path / "killed"
    (tmp_path / "killed_at_import.py").write_text(
        "import os, pathlib, sys\n"
        "from captioner.images import decode\n"
        f"path = pathlib.Path({str(was_killed)!r})\n"
        "if any('captioner.images.child' in word for word in sys.orig_argv) and not path.exists():\n"
        "    path.touch()\n"
        "    os.kill(os.getpid(), 9)\n"
        "def decode_one(*arguments):\n"
        "    return decode(*arguments)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with Decoder(CLIP, CONFIG, decode_one=import_module("killed_at_import").decode_one) as decoder:
        assert isinstance(decoder.decode(saved(scene(64, 48))), Decoded)
        assert decoder.num_killed == 0
    assert was_killed.exists(), "the injector did nothing"
