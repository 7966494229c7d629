"""What a CLIP asks of an image: read from its preprocessor config, or refused.

Knows the names of transformers' image processors and nothing of pixels.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

from PIL.Image import Resampling

from captioner.errors import BundleError

__all__ = ["Box", "Preprocessing"]

Box = tuple[float, float, float, float]
"""left, top, right, bottom, in pixels of the image it belongs to."""

_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
_CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
_FILTERS = (Resampling.BILINEAR, Resampling.BICUBIC, Resampling.LANCZOS)
_SAME_STEPS = ("CLIPImageProcessor", "CLIPFeatureExtractor", "LlavaImageProcessor")  # also with Fast or Pil behind


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """Resize the short side, crop the centre, and later `(pixels / 255 - mean) / std`.

    The defaults are those of openai/clip-vit-large-patch14.
    """

    size: int = 224
    """Side S of the square that the model sees, in pixels."""

    shortest_edge: int | None = 224
    """Length that the short side is resized to before the crop; None squeezes the whole image into the square."""

    resample: Resampling = Resampling.BICUBIC
    """Filter of the resize, antialiased."""

    mean: tuple[float, ...] = _CLIP_MEAN
    """Mean of each channel, of values from 0 to 1. For the device-side normalisation."""

    std: tuple[float, ...] = _CLIP_STD
    """Standard deviation of each channel, of values from 0 to 1. For the device-side normalisation."""

    def __post_init__(self) -> None:
        _require(self.size >= 1, "crop_size", self.size, "at least 1 pixel")
        _require(len(self.mean) == 3, "image_mean", self.mean, "3 channels")
        _require(len(self.std) == 3 and all(self.std), "image_std", self.std, "3 channels, none of them 0")
        if self.shortest_edge is not None:
            _require(
                self.shortest_edge >= self.size, "size", self.shortest_edge, f">= crop_size {self.size} (no padding)"
            )

    @classmethod
    def from_config(cls, config: Mapping[str, object]) -> Self:
        """Return what a `preprocessor_config.json` (or `processor_config.json`) of the CLIP family describes.

        Missing entries have the values of CLIPImageProcessor. Raises BundleError when it describes anything but one
        square picture of fixed size: padding, tiles, no resize, another rescaling.
        """
        nested = config.get("image_processor")
        config = nested if isinstance(nested, Mapping) else config
        _check_steps(config)
        crop = _square(config.get("crop_size", 224), "crop_size") if config.get("do_center_crop", True) else None
        edge = _edge(config.get("size", 224), default_to_square=bool(config.get("use_square_size", False)))
        _require(
            crop is not None or edge is None, "do_center_crop", False, 'true, or a square size {"height", "width"}'
        )
        whole = _square(config["size"], "size") if edge is None and "size" in config else None
        _require(crop is None or whole in (None, crop), "crop_size", crop, f"the resized side {whole}")
        do_normalize = config.get("do_normalize", True)
        return cls(
            size=crop or whole or 224,
            shortest_edge=edge,
            resample=_filter(config.get("resample", Resampling.BICUBIC)),
            mean=_floats(config.get("image_mean", _CLIP_MEAN), "image_mean") if do_normalize else (0.0, 0.0, 0.0),
            std=_floats(config.get("image_std", _CLIP_STD), "image_std") if do_normalize else (1.0, 1.0, 1.0),
        )

    def crop_box(self, width: int, height: int) -> Box:
        """Return the part of an upright image that becomes the square, as CLIPImageProcessor would."""
        if self.shortest_edge is None:
            return 0.0, 0.0, float(width), float(height)
        short = min(width, height)
        left, right = _centre(width, int(self.shortest_edge * width / short), self.size)
        top, bottom = _centre(height, int(self.shortest_edge * height / short), self.size)
        return left, top, right, bottom


def _centre(length: int, resized: int, size: int) -> tuple[float, float]:
    start = (resized - size) // 2
    return start * length / resized, (start + size) * length / resized


def _check_steps(config: Mapping[str, object]) -> None:
    kind = str(config.get("image_processor_type") or config.get("feature_extractor_type") or _SAME_STEPS[0])
    known = kind.removesuffix("Fast").removesuffix("Pil") in _SAME_STEPS
    _require(known, "image_processor_type", kind, " or ".join(_SAME_STEPS))
    _require(config.get("do_resize", True) is True, "do_resize", config.get("do_resize"), "true")
    _require(not config.get("do_pad", False), "do_pad", config.get("do_pad"), "false")
    _require(config.get("do_rescale", True) is True, "do_rescale", config.get("do_rescale"), "true")
    factor = config.get("rescale_factor", 1 / 255)
    _require(isinstance(factor, float) and abs(factor * 255 - 1) < 1e-3, "rescale_factor", factor, "1/255")


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
        raise BundleError(_complaint(name, size, "one number, or a height equal to its width"))
    return size


def _filter(number: object) -> Resampling:
    for known in _FILTERS:
        if number == known.value:
            return known
    names = ", ".join(f"{known.value} ({known.name.lower()})" for known in _FILTERS)
    raise BundleError(_complaint("resample", number, names))


def _floats(values: object, name: str) -> tuple[float, ...]:
    if not isinstance(values, list | tuple):
        raise BundleError(_complaint(name, values, "a list of 3 numbers"))
    return tuple(float(value) for value in values)


def _require(holds: bool, name: str, value: object, expected: str) -> None:
    if not holds:
        raise BundleError(_complaint(name, value, expected))


def _complaint(name: str, value: object, expected: str) -> str:
    return f"the CLIP's preprocessor config has {name} = {value!r}; supported is {expected}: use another model"
