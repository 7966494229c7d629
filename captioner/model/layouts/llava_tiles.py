"""transformers' LLaVAs that cut an image into tiles: `LlavaNextForConditionalGeneration`, and LLaVA-OneVision's.

Both are a LLaVA whose image tokens differ in number by image; they differ in what a config leaves out.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from captioner.model.configs import check_not_quantized
from captioner.model.folder import Folder
from captioner.model.layouts.layout import CheckpointOptions, Layout, Opener
from captioner.model.layouts.llava import LlavaConfig, llava_parts
from captioner.model.layouts.tiles import Tiles
from captioner.model.parts import Parts

__all__ = ["LLAVA_NEXT", "LLAVA_ONEVISION"]

_SIGLIP_OF_ONEVISION = {
    "model_type": "siglip_vision_model",
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "patch_size": 14,
    "image_size": 384,
    "num_hidden_layers": 26,
    "num_attention_heads": 16,
    "vision_use_head": False,
}


@dataclass(frozen=True, kw_only=True)
class LlavaNextConfig(LlavaConfig):
    """transformers' LlavaNextConfig."""

    model_type: ClassVar[str] = "llava_next"
    class_name: ClassVar[str] = "LlavaNextConfig"
    processor: ClassVar[str] = "LlavaNextImageProcessor"
    unchecked: ClassVar[tuple[str, ...]] = (*LlavaConfig.unchecked, "image_grid_pinpoints", "vision_aspect_ratio")
    image_grid_pinpoints: Any = None
    vision_aspect_ratio: Any = "anyres"

    def tiles(self, where: str) -> Tiles:
        """Return how it cuts images. Raises BundleError for a value that cannot be."""
        pinpoints = self.image_grid_pinpoints or self.default_pinpoints()
        return Tiles.read(self.processor, pinpoints, self.vision_aspect_ratio, where=f"{where}/config.json")

    @classmethod
    def default_pinpoints(cls) -> list[list[int]]:
        """Return the grids of a config that names none."""
        return [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]


@dataclass(frozen=True, kw_only=True)
class LlavaOnevisionConfig(LlavaNextConfig):
    """transformers' LlavaOnevisionConfig."""

    model_type: ClassVar[str] = "llava_onevision"
    class_name: ClassVar[str] = "LlavaOnevisionConfig"
    processor: ClassVar[str] = "LlavaOnevisionImageProcessor"
    default_image_token: ClassVar[int] = 151646
    default_tower: ClassVar[Mapping[str, Any]] = _SIGLIP_OF_ONEVISION
    default_language: ClassVar[str] = "qwen2"
    vision_feature_select_strategy: Any = "full"
    vision_feature_layer: Any = -1
    vision_aspect_ratio: Any = "anyres_max_9"

    @classmethod
    def default_pinpoints(cls) -> list[list[int]]:
        """Return the grids of a config that names none."""
        return [[rows * 384, columns * 384] for rows in range(1, 7) for columns in range(1, 7)]


def _layout(name: str, config_class: type[LlavaNextConfig]) -> Layout:
    def matches(config: Mapping[str, Any]) -> bool:
        return config.get("model_type") == config_class.model_type or name in (config.get("architectures") or ())

    def read(folder: Folder, options: CheckpointOptions, opener: Opener) -> Parts:
        raw = folder.read_json("config.json")
        check_not_quantized(raw, where=folder.name)
        config = config_class.read(raw, where=folder.name)
        return llava_parts(config, raw, folder, options, opener, config.tiles(folder.name))

    return Layout(name=name, matches=matches, read=read)


LLAVA_NEXT = _layout("LlavaNextForConditionalGeneration", LlavaNextConfig)
LLAVA_ONEVISION = _layout("LlavaOnevisionForConditionalGeneration", LlavaOnevisionConfig)
