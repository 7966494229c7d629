"""Images of any shape -> the pixels of each family's own processor: SigLIP, LLaVA's padding, AnyRes in tiles.

The processors are transformers' on Pillow, as a user without torchvision gets them.
"""

import io
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image, ImageDraw, ImageOps
from transformers.image_processing_utils import get_patch_output_size, select_best_resolution
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from captioner.config import ImageConfig
from captioner.errors import BundleError
from captioner.images import Decoded, Decoder, Preprocessing, decode, pixels_of
from captioner.images.grids import best_resolution, fitted_size
from captioner.images.reader import jpeg_scale

Pixels = npt.NDArray[np.uint8]

SIDE = 56
GRIDS = [[112, 56], [56, 112], [112, 112], [168, 56], [56, 168]]
SHAPES = [
    *((640, 64), (64, 640), (600, 75), (90, 480), (512, 128), (300, 301), (301, 300), (480, 320), (323, 487)),
    *((56, 56), (30, 20), (1, 1), (3, 40), (700, 600), (400, 1100)),
]

SIGLIP = {"image_processor_type": "SiglipImageProcessor", "size": {"height": SIDE, "width": SIDE}}
SIGLIP_2 = SIGLIP | {"resample": 2}
CROP = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
LLAVA = {"image_processor_type": "LlavaImageProcessor", **CROP, "do_pad": True}
LLAVA_CROPPED = LLAVA | {"size": {"shortest_edge": 70}}
NEXT = {"image_processor_type": "LlavaNextImageProcessor", **CROP, "image_grid_pinpoints": GRIDS}
ONEVISION = {
    "image_processor_type": "LlavaOnevisionImageProcessor",
    "size": {"height": SIDE, "width": SIDE},
    "image_grid_pinpoints": [[SIDE * rows, SIDE * columns] for rows in (1, 2, 3, 4) for columns in (1, 2, 3, 4)],
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}
PROCESSORS = {
    "SiglipImageProcessor": SiglipImageProcessorPil,
    "LlavaImageProcessor": LlavaImageProcessorPil,
    "LlavaNextImageProcessor": LlavaNextImageProcessorPil,
    "LlavaOnevisionImageProcessor": LlavaOnevisionImageProcessorPil,
}
CONFIGS = [SIGLIP, SIGLIP_2, LLAVA, LLAVA_CROPPED, NEXT, ONEVISION]
NAMES = ["siglip", "siglip2", "llava", "llava-cropped", "next", "onevision"]


def photograph(width: int, height: int, seed: int = 0) -> Image.Image:
    """Texture, hard edges, noise, and no symmetry."""
    random = np.random.default_rng(seed)
    coarse = Image.fromarray(random.integers(0, 256, (9, 11, 3), dtype=np.uint8))
    image = coarse.resize((width, height), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(image)
    for _ in range(12):
        x, y, r = random.random(3) * (width, height, min(width, height) / 3)
        colour = tuple(int(channel) for channel in random.integers(0, 256, 3))
        draw.ellipse((x - r, y - r, x + r, y + r), fill=colour)  # type: ignore[arg-type]
    noise = random.normal(0, 6, (height, width, 3))
    return Image.fromarray(np.clip(np.asarray(image) + noise, 0, 255).astype(np.uint8))


def theirs(image: Image.Image, config: dict[str, Any]) -> Pixels:
    """What transformers' processor sees, before it normalises."""
    options = {name: value for name, value in config.items() if name not in ("image_processor_type", "do_pad")}
    processor = PROCESSORS[config["image_processor_type"]](**options, do_pad=True, do_rescale=False, do_normalize=False)
    return np.asarray(processor(image)["pixel_values"][0]).astype(np.uint8)


def assert_close(ours: Pixels, theirs: Pixels, *, most: int = 2, mean: float = 0.05) -> None:
    assert ours.shape == theirs.shape
    difference = np.abs(ours.astype(int) - theirs)
    assert difference.max() <= most, f"max {difference.max()}"
    assert difference.mean() <= mean, f"mean {difference.mean():.3f}"


def saved(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def seen(data: bytes, config: dict[str, Any], image: ImageConfig | None = None) -> Pixels:
    outcome = decode(data, Preprocessing.from_config(config), image or ImageConfig())
    assert isinstance(outcome, Decoded), outcome
    assert outcome.pixels.flags.c_contiguous
    assert outcome.pixels.flags.writeable
    return outcome.pixels


@pytest.mark.parametrize("config", CONFIGS, ids=NAMES)
def test_an_image_of_any_shape_gives_the_pixels_of_its_processor(config: dict[str, Any]) -> None:
    for size in SHAPES:
        image = photograph(*size)
        is_small = max(size) < 4 * SIDE  # not reduced before a resize
        bounds = (2, 0.05) if is_small else (3, 0.3)
        ours = pixels_of(image, Preprocessing.from_config(config))
        assert_close(ours, theirs(image, config), most=bounds[0], mean=bounds[1])


@pytest.mark.parametrize("config", CONFIGS, ids=NAMES)
@pytest.mark.parametrize("size", [(1600, 500), (600, 1500), (1201, 1200)], ids=str)
def test_a_large_jpeg_stays_within_three_levels(config: dict[str, Any], size: tuple[int, int]) -> None:
    data = saved(photograph(*size), "JPEG", quality=92)
    assert_close(seen(data, config), theirs(Image.open(io.BytesIO(data)), config), most=3, mean=0.3)


@pytest.mark.parametrize("config", [LLAVA, NEXT, ONEVISION], ids=["llava", "next", "onevision"])
@pytest.mark.parametrize("orientation", range(2, 9))
def test_each_exif_orientation_gives_the_upright_image(config: dict[str, Any], orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = saved(photograph(230, 90), exif=exif)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    assert_close(seen(data, config), theirs(upright, config))


@pytest.mark.parametrize("mode", ["L", "RGBA", "P"])
@pytest.mark.parametrize("config", [LLAVA, NEXT], ids=["llava", "next"])
def test_padding_has_its_colour_whatever_the_mode(config: dict[str, Any], mode: str) -> None:
    image = photograph(300, 100).convert(mode)
    assert_close(pixels_of(image, Preprocessing.from_config(config)), theirs(image.convert("RGB"), config))


def test_the_padding_is_the_mean_colour_as_in_llavas_expand2square() -> None:
    """As the original code does it: a canvas in Pillow, then the resize."""
    image = photograph(400, 100)
    background = tuple(int(channel * 255) for channel in Preprocessing.mean)
    assert background == (122, 116, 104)
    canvas = Image.new("RGB", (400, 400), background)
    canvas.paste(image, (0, 150))
    expected = np.asarray(canvas.resize((SIDE, SIDE), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
    pixels = pixels_of(image, Preprocessing.from_config(LLAVA))
    assert_close(pixels, expected)
    assert (pixels[:, 0, 0] == background).all()


@pytest.mark.parametrize(("pad", "factor"), [(1, 2), (2, 4), (9, 2)])
def test_a_reduced_image_has_its_padding_where_it_was(pad: int, factor: int) -> None:
    """An image that is reduced before its resize begins within a sample of the reduced canvas."""
    side = 4 * factor * SIDE
    image = photograph(side, side - 2 * pad - 1)
    assert_close(pixels_of(image, Preprocessing.from_config(LLAVA)), theirs(image, LLAVA), most=3, mean=0.3)


@pytest.mark.parametrize("config", [SIGLIP, LLAVA, NEXT, ONEVISION], ids=["siglip", "llava", "next", "onevision"])
def test_fast_decode_keeps_one_and_a_half_times_the_pixels_of_every_tile(config: dict[str, Any]) -> None:
    preprocessing, fast = Preprocessing.from_config(config), ImageConfig(fast_decode=True)
    for width, height in [(1200, 900), (2000, 200), (200, 2000), (700, 600)]:
        scale = jpeg_scale((width, height), preprocessing)
        for box, columns, rows, *_ in preprocessing.views(width, height):
            spare = min((box[2] - box[0]) / columns, (box[3] - box[1]) / rows)
            assert scale == 1 or spare / scale >= 1.5
        data = saved(photograph(width, height), "JPEG", quality=92)
        assert_close(seen(data, config, fast), theirs(Image.open(io.BytesIO(data)), config), most=60, mean=2.5)
    scales = {
        kind: jpeg_scale((1200, 900), Preprocessing.from_config(kind_config))
        for kind, kind_config in {"square": SIGLIP, "tiles": ONEVISION}.items()
    }
    assert scales == {"square": 8, "tiles": 2}


def test_a_child_process_gives_tiles_as_this_process_does() -> None:
    preprocessing = Preprocessing.from_config(ONEVISION)
    files = [saved(photograph(*size)) for size in [(640, 64), (56, 56), (300, 301)]]
    files.insert(1, b"no image")
    with Decoder(preprocessing, ImageConfig()) as decoder:
        found = decoder.decode_batch(files)
    expected = [decode(data, preprocessing, ImageConfig()) for data in files]
    shapes = [outcome.pixels.shape for outcome in expected if isinstance(outcome, Decoded)]
    assert shapes == [(5, 3, SIDE, SIDE), (2, 3, SIDE, SIDE), (17, 3, SIDE, SIDE)]
    for ours, theirs in zip(found, expected, strict=True):
        assert type(ours) is type(theirs)
        if isinstance(ours, Decoded) and isinstance(theirs, Decoded):
            assert (ours.pixels == theirs.pixels).all()
            assert (ours.width, ours.height) == (theirs.width, theirs.height)


def test_the_grid_of_an_image_is_that_of_transformers() -> None:
    random = np.random.default_rng(0)
    sizes = [tuple(int(side) for side in np.exp(random.uniform(0, 9, 2))) for _ in range(500)]
    for grids in (NEXT["image_grid_pinpoints"], ONEVISION["image_grid_pinpoints"]):
        for width, height in [*sizes, (50, 50), (5000, 1), (1, 5000)]:
            best = best_resolution(width, height, [(rows, columns) for rows, columns in grids])
            assert best == tuple(select_best_resolution((height, width), grids))
            expected = get_patch_output_size(np.empty((3, height, width), bool), best, "channels_first")
            assert fitted_size(width, height, best) == (expected[1], expected[0])


def test_what_a_processor_leaves_out_is_that_of_its_class() -> None:
    assert Preprocessing.from_config({"image_processor_type": "SiglipImageProcessor"}) == Preprocessing(
        shortest_edge=None, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)
    )
    onevision = Preprocessing.from_config({"image_processor_type": "LlavaOnevisionImageProcessorFast"})
    assert (onevision.size, onevision.max_tiles) == (384, 37)
    next_ = Preprocessing.from_config(
        NEXT | {"size": {"shortest_edge": 336}, "crop_size": 336, "image_grid_pinpoints": [[336, 672], [672, 672]]}
    )
    assert (next_.size, next_.max_tiles, next_.max_bytes) == (336, 5, 5 * 3 * 336**2)


def test_a_block_of_images_in_tiles_holds_fewer_of_them() -> None:
    assert Preprocessing().rows_per_block is None, "as many as ever"
    for config, rows in [(NEXT, 2853), (ONEVISION, 839), ({"image_processor_type": "LlavaOnevisionImageProcessor"}, 8)]:
        preprocessing = Preprocessing.from_config(config)
        assert preprocessing.rows_per_block == rows
        assert rows * preprocessing.max_bytes <= 128 << 20


def test_records_of_images_without_padding_and_tiles_stay_as_they_were() -> None:
    assert set(Preprocessing().identity()) == {"size", "shortest_edge", "resample", "mean", "std"}
    assert "pads" in Preprocessing.from_config(LLAVA).identity()
    assert "resolutions" in Preprocessing.from_config(NEXT).identity()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (NEXT | {"image_grid_pinpoints": [[112, 100]]}, r"\[112, 100\]; supported is multiples of the tile's side 56"),
        (NEXT | {"image_grid_pinpoints": []}, r"image_grid_pinpoints = \[\]; supported is a list of \[height, width\]"),
        (NEXT | {"image_grid_pinpoints": [[56]]}, r"image_grid_pinpoints = \[56\]; supported"),
        (NEXT | {"size": {"shortest_edge": 60}}, "size = 60; supported is the side of the tiles, 56"),
        (SIGLIP | {"size": {"height": 30, "width": 20}}, "size = .*; supported is one number"),
        (SIGLIP | {"do_pad": True}, "do_pad = True; supported is false"),
        (SIGLIP | {"do_center_crop": True}, "do_center_crop = True; supported is false"),
    ],
)
def test_steps_that_no_processor_takes_are_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(BundleError, match=message):
        Preprocessing.from_config(config)
