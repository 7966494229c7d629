"""How a vision tower wants its images: cropped, squeezed or padded to a square, or cut into tiles.

The one reader of preprocessor configs, which refuses steps that are not taken here. Knows the names of transformers'
image processors and nothing of pixels.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, Self

from PIL.Image import Resampling

from captioner.errors import BundleError
from captioner.images.grids import Resolution, best_resolution, fitted_size

__all__ = ["Box", "Preprocessing", "View"]

Box = tuple[float, float, float, float]
"""left, top, right, bottom, in pixels of the image it belongs to."""

_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
_CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
_HALF = (0.5, 0.5, 0.5)
_FILTERS = (Resampling.BILINEAR, Resampling.BICUBIC, Resampling.LANCZOS)
_CLIP, _SIGLIP, _LLAVA = "CLIPImageProcessor", "SiglipImageProcessor", "LlavaImageProcessor"
_ONEVISION = "LlavaOnevisionImageProcessor"
_TILED: dict[str, Sequence[Resolution]] = {
    "LlavaNextImageProcessor": [(336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008)],
    _ONEVISION: [(height * 384, width * 384) for height in range(1, 7) for width in range(1, 7)],
}
"""Processors that cut images into tiles, with the grids of a config that names none."""
_BLOCK_BYTES = 128 << 20  # 256 squares of 384 pixels take 108 MiB
_PROCESSORS = (_CLIP, "CLIPFeatureExtractor", _LLAVA, _SIGLIP, *_TILED)  # also with the suffix Fast or Pil


class View(NamedTuple):
    """One resize of an upright image or of a part of it."""

    box: Box
    """The part; where the image is padded it reaches beyond the image."""

    width: int
    """Width in pixels that the part is resized to."""

    height: int
    """Height in pixels that the part is resized to."""

    whole: tuple[int, int, int, int]
    """Width and height of the whole, padding included, before and after the resize that the part is cut out of."""

    canvas: Box | None = None
    """The padded image, in pixels of the image inside it; None without padding."""


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """How an image becomes one square, or several; on the device, `(pixels / 255 - mean) / std`.

    The short side is resized and the centre cropped, unless fields say otherwise. The defaults are those of
    openai/clip-vit-large-patch14.
    """

    size: int = 224
    """Side S of the square that the model reads, in pixels."""

    shortest_edge: int | None = 224
    """Length that the short side is resized to before the crop; None resizes the whole image to the square."""

    resample: Resampling = Resampling.BICUBIC
    """Filter of the resize, antialiased."""

    mean: tuple[float, ...] = _CLIP_MEAN
    """Mean of each channel, of values from 0 to 1."""

    std: tuple[float, ...] = _CLIP_STD
    """Standard deviation of each channel, of values from 0 to 1."""

    pads: bool = False
    """Whether an image is first padded to a square, with the colour that becomes about 0: LLaVA's expand2square."""

    resolutions: tuple[Resolution, ...] = ()
    """Sizes, (height, width) in pixels, of the grids of tiles to choose from: LLaVA's `image_grid_pinpoints`. An image
    then gives the whole, resized to the square, and each tile of its grid. Empty: one square an image."""

    def __post_init__(self) -> None:
        _require(self.size >= 1, "crop_size", self.size, "at least 1 pixel")
        _require(len(self.mean) == 3, "image_mean", self.mean, "3 channels")
        _require(len(self.std) == 3 and all(self.std), "image_std", self.std, "3 channels, none of them 0")
        if self.shortest_edge is not None:
            _require(
                self.shortest_edge >= self.size, "size", self.shortest_edge, f">= crop_size {self.size} (no padding)"
            )
        for height, width in self.resolutions:
            is_grid = min(height, width) > 0 and height % self.size == width % self.size == 0
            _require(is_grid, "image_grid_pinpoints", [height, width], f"multiples of the tile's side {self.size}")

    @classmethod
    def from_config(cls, config: Mapping[str, object]) -> Self:
        """Return the preprocessing of a `preprocessor_config.json` (or `processor_config.json`).

        Missing entries have the values of its `image_processor_type`, by default CLIPImageProcessor. Raises BundleError
        for steps that are none of this class: no resize, another rescaling, sides that are no square.
        """
        nested = config.get("image_processor")
        config = nested if isinstance(nested, Mapping) else config
        kind = _checked_kind(config)
        resolutions = _resolutions(config, _TILED[kind]) if kind in _TILED else ()
        crop, edge, whole = _siglip_size(config) if kind == _SIGLIP else _clip_size(config, kind)
        size = crop or whole or 224
        if resolutions:
            _require(edge in (None, size), "size", edge, f"the side of the tiles, {size}")
        mean, std = (_HALF, _HALF) if kind == _SIGLIP else (_CLIP_MEAN, _CLIP_STD)
        do_normalize = config.get("do_normalize", True)
        return cls(
            size=size,
            shortest_edge=None if resolutions else edge,
            resample=_filter(config.get("resample", Resampling.BICUBIC)),
            mean=_floats(config.get("image_mean", mean), "image_mean") if do_normalize else (0.0, 0.0, 0.0),
            std=_floats(config.get("image_std", std), "image_std") if do_normalize else (1.0, 1.0, 1.0),
            pads=kind == _LLAVA and bool(config.get("do_pad", False)),
            resolutions=resolutions,
        )

    @property
    def max_tiles(self) -> int:
        """Most squares that one image becomes."""
        return 1 + max((height * width // self.size**2 for height, width in self.resolutions), default=0)

    @property
    def max_bytes(self) -> int:
        """Most bytes of pixels that one image becomes."""
        return self.max_tiles * 3 * self.size**2

    @property
    def rows_per_block(self) -> int | None:
        """Most images that one block of rows may hold in tiles; None where each is one square."""
        return max(1, _BLOCK_BYTES // self.max_bytes) if self.resolutions else None

    @property
    def background(self) -> tuple[int, int, int]:
        """Colour of the padding to a square."""
        red, green, blue = (int(channel * 255) for channel in self.mean)
        return red, green, blue

    def identity(self) -> dict[str, Any]:
        """Return what decides the pixels, for records: fields that were added later stand in it only where they act."""
        later = {name for name in ("pads", "resolutions") if not getattr(self, name)}
        return {name: value for name, value in asdict(self).items() if name not in later}

    def square_view(self, width: int, height: int) -> View:
        """Return the view of an upright image that becomes one square, as in CLIPImageProcessor; first of the tiles."""
        side, pads = max(width, height), self.pads and width != height
        pad_x, pad_y = ((side - width) // 2, (side - height) // 2) if pads else (0, 0)
        canvas = (-pad_x, -pad_y, side - pad_x, side - pad_y) if pads else None
        width, height = (side, side) if pads else (width, height)
        resized_width, resized_height = self._resized_size(width, height)
        left, right = _centre(width, resized_width, self.size)
        top, bottom = _centre(height, resized_height, self.size)
        box = (left - pad_x, top - pad_y, right - pad_x, bottom - pad_y)
        return View(box, self.size, self.size, (width, height, resized_width, resized_height), canvas)

    def resolution(self, width: int, height: int) -> Resolution | None:
        """Return the size of the grid of tiles that an upright image gets; None for one square an image."""
        return best_resolution(width, height, self.resolutions) if self.resolutions else None

    def grid_view(self, width: int, height: int, resolution: Resolution) -> View:
        """Return the view of an upright image that is laid in the middle of its grid of tiles."""
        fitted = fitted_size(width, height, resolution)
        return View((0.0, 0.0, float(width), float(height)), *fitted, (width, height, *fitted))

    def views(self, width: int, height: int) -> list[View]:
        """Return the resizes that an upright image takes: of the square, and of the grid of tiles if it has one."""
        views = [self.square_view(width, height)]
        resolution = self.resolution(width, height)
        return [*views, self.grid_view(width, height, resolution)] if resolution else views

    def _resized_size(self, width: int, height: int) -> tuple[int, int]:
        if self.shortest_edge is None:
            return self.size, self.size
        short = min(width, height)
        return int(self.shortest_edge * width / short), int(self.shortest_edge * height / short)


def _centre(length: int, resized: int, size: int) -> tuple[float, float]:
    start = (resized - size) // 2
    return start * length / resized, (start + size) * length / resized


def _checked_kind(config: Mapping[str, object]) -> str:
    kind = str(config.get("image_processor_type") or config.get("feature_extractor_type") or _CLIP)
    name = kind.removesuffix("Fast").removesuffix("Pil")
    _require(name in _PROCESSORS, "image_processor_type", kind, " or ".join(_PROCESSORS))
    _require(config.get("do_resize", True) is True, "do_resize", config.get("do_resize"), "true")
    can_pad = name in (_LLAVA, *_TILED)  # tiles are padded in any case; do_pad is of their batches
    _require(can_pad or not config.get("do_pad", False), "do_pad", config.get("do_pad"), "false")
    _require(config.get("do_rescale", True) is True, "do_rescale", config.get("do_rescale"), "true")
    factor = config.get("rescale_factor", 1 / 255)
    _require(isinstance(factor, float) and abs(factor * 255 - 1) < 1e-3, "rescale_factor", factor, "1/255")
    return name


def _clip_size(config: Mapping[str, object], kind: str) -> tuple[int | None, int | None, int | None]:
    """Return the side of the crop, that of the short side before it, and that of a square resize, where each is."""
    is_onevision = kind == _ONEVISION
    crops = config.get("do_center_crop", not is_onevision)
    crop = _square(config.get("crop_size", 224), "crop_size") if crops else None
    given = config.get("size", {"height": 384, "width": 384} if is_onevision else 224)
    edge = _edge(given, default_to_square=bool(config.get("use_square_size", False)))
    _require(crop is not None or edge is None, "do_center_crop", False, 'true, or a square size {"height", "width"}')
    whole = _square(given, "size") if edge is None and ("size" in config or is_onevision) else None
    _require(crop is None or whole in (None, crop), "crop_size", crop, f"the resized side {whole}")
    return crop, edge, whole


def _siglip_size(config: Mapping[str, object]) -> tuple[None, None, int]:
    _require(not config.get("do_center_crop", False), "do_center_crop", True, "false")
    return None, None, _square(config.get("size", 224), "size")


def _resolutions(config: Mapping[str, object], default: Sequence[Resolution]) -> tuple[Resolution, ...]:
    found, expected = config.get("image_grid_pinpoints", default), "a list of [height, width]"
    if not isinstance(found, list | tuple) or not found:
        raise BundleError(_refusal("image_grid_pinpoints", found, expected))
    for pair in found:
        is_pair = isinstance(pair, list | tuple) and len(pair) == 2 and all(type(side) is int for side in pair)
        _require(is_pair, "image_grid_pinpoints", pair, expected)
    return tuple((height, width) for height, width in found)


def _edge(size: object, *, default_to_square: bool) -> int | None:
    if isinstance(size, Mapping) and set(size) == {"shortest_edge"}:
        size = size["shortest_edge"]
    if isinstance(size, int):
        return None if default_to_square else size
    expected = 'a number, {"shortest_edge"} or {"height", "width"}'
    _require(isinstance(size, Mapping) and set(size) == {"height", "width"}, "size", size, expected)
    return None


def _square(size: object, name: str) -> int:
    if isinstance(size, Mapping) and size.get("height") == size.get("width"):
        size = size.get("height", size.get("shortest_edge"))
    if not isinstance(size, int):
        raise BundleError(_refusal(name, size, "one number, or a height equal to its width"))
    return size


def _filter(number: object) -> Resampling:
    for known in _FILTERS:
        if number == known.value:
            return known
    names = ", ".join(f"{known.value} ({known.name.lower()})" for known in _FILTERS)
    raise BundleError(_refusal("resample", number, names))


def _floats(values: object, name: str) -> tuple[float, ...]:
    if not isinstance(values, list | tuple):
        raise BundleError(_refusal(name, values, "a list of 3 numbers"))
    return tuple(float(value) for value in values)


def _require(holds: bool, name: str, value: object, expected: str) -> None:
    if not holds:
        raise BundleError(_refusal(name, value, expected))


def _refusal(name: str, value: object, expected: str) -> str:
    return f"the preprocessor config has {name} = {value!r}; supported is {expected}: use another model"
