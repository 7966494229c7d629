"""CLIP's vision tower: found in a folder, checked without loading, loaded alone; and both towers for CLIPScore.

Knows CLIP checkpoints of transformers (`CLIPModel` or `CLIPVisionModel`); nothing of projectors and LLaMA.
"""

import copy
import hashlib
import json
import logging
import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPConfig, CLIPModel, CLIPVisionConfig, CLIPVisionModel, PreTrainedTokenizerFast
from transformers.utils.constants import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from captioner.errors import BundleError, ShapeError
from captioner.model.folder import Folder
from captioner.model.module import allocate, freeze, parse_config
from captioner.model.quick_gelu import fuse_quick_gelu
from captioner.model.tokenizer import read_tokenizer
from captioner.model.weights import Weights, read_weights

__all__ = ["ClipSource", "load_clip", "load_tower", "pixel_affine", "read_clip", "read_preprocessing", "tower_name"]

_LOG = logging.getLogger(__name__)
_SHAPING = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "image_size",
    "patch_size",
    "hidden_act",
    "layer_norm_eps",
)
_PIXELS = (
    "crop_size",
    "do_center_crop",
    "do_convert_rgb",
    "do_normalize",
    "do_rescale",
    "do_resize",
    "image_mean",
    "image_std",
    "resample",
    "rescale_factor",
    "size",
)


@dataclass(frozen=True)
class ClipSource:
    """A vision tower that was found and checked but not loaded."""

    folder: Folder
    config: CLIPVisionConfig
    weights: Weights
    preprocessing: dict[str, Any]
    text_weights: Weights | None
    """Of the text tower and both projections; None where the folder has no text tower or no tokenizer for it."""

    @property
    def image_size(self) -> int:
        """Side of the square image that the tower reads, in pixels."""
        return _pixels(self.config.image_size)

    @property
    def num_patches(self) -> int:
        """Patch states that the tower gives for one image, without CLS."""
        return (self.image_size // _pixels(self.config.patch_size)) ** 2

    def num_layers(self, hidden_state: int) -> int:
        """Return how many layers must run for a hidden state, numbered as in transformers: -1 is the last."""
        last = int(self.config.num_hidden_layers)
        layers = hidden_state if hidden_state >= 0 else last + 1 + hidden_state
        if not 0 <= layers <= last:
            raise BundleError(
                f"vision_feature_layer is {hidden_state}, but the CLIP in {self.folder.name} has {last} layers; "
                f"expected {-last - 1} to {last}"
            )
        return layers

    def shape(self) -> dict[str, Any]:
        """Return the config values that decide what the tower computes."""
        return {name: getattr(self.config, name) for name in _SHAPING}

    def fingerprint(self) -> str:
        """Return a hex digest of the tower's weights and config, the same with and without a text tower beside it."""
        identity = [self.weights.fingerprint(), self.shape()]
        return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()

    def pixel_identity(self) -> dict[str, Any]:
        """Return the preprocessing values that decide which pixels the tower sees."""
        return {name: self.preprocessing[name] for name in _PIXELS if name in self.preprocessing}


def read_clip(folder: Folder) -> ClipSource:
    """Return the vision tower of a CLIP folder from its config and headers.

    Raises BundleError if it is no CLIP, its weights do not fit its config, or its preprocessing is for another size.
    """
    raw = folder.read_json("config.json")
    config = _vision_config(raw, folder)
    weights = read_weights(folder)
    preprocessing = read_preprocessing(folder, config)
    has_text_tower = "text_projection.weight" in weights.tensors and folder.has("tokenizer.json")
    text_weights = weights.select(_text_name) if has_text_tower else None
    return check_tower(ClipSource(folder, config, weights.select(tower_name), preprocessing, text_weights))


def check_tower(source: ClipSource) -> ClipSource:
    """Return the source unchanged if its weights and preprocessing fit its config; raise BundleError otherwise."""
    with torch.device("meta"):
        source.weights.check_fits(_plain(CLIPVisionModel(source.config)))
    size = _preprocessed_size(source.preprocessing)
    if size != (source.image_size, source.image_size):
        raise ShapeError(
            f"the preprocessing in {source.folder.name} makes images of {size[0]}x{size[1]} pixels, its CLIP reads "
            f"{source.image_size}x{source.image_size}; expected the same size in both"
        )
    return source


def load_tower(
    source: ClipSource, *, num_layers: int | None, dtype: torch.dtype, device: torch.device
) -> CLIPVisionModel:
    """Return the tower, frozen; with `num_layers` only so many, so that its last hidden state is the one to read."""
    config = copy.deepcopy(source.config)
    config.num_hidden_layers = config.num_hidden_layers if num_layers is None else num_layers
    tower = allocate(CLIPVisionModel, config, dtype=dtype, device=device)
    source.weights.load_into(_plain(tower))
    return fuse_quick_gelu(freeze(tower))


def load_clip(folder: Folder, *, dtype: torch.dtype, device: torch.device) -> tuple[CLIPModel, PreTrainedTokenizerFast]:
    """Return both towers, frozen, and the text tower's tokenizer. Raises BundleError if one is not in the folder."""
    raw = folder.read_json("config.json")
    if raw.get("model_type") != "clip":
        raise BundleError(
            f"{folder.name} has no text tower: its model_type is {raw.get('model_type')!r}; expected clip"
        )
    tokenizer = read_tokenizer(folder)
    clip = allocate(CLIPModel, parse_config(CLIPConfig, raw, where=folder.name), dtype=dtype, device=device)
    weights = read_weights(folder.on_disk())
    weights.check_fits(clip)
    weights.load_into(clip)
    return freeze(clip), tokenizer


def read_preprocessing(folder: Folder, config: CLIPVisionConfig) -> dict[str, Any]:
    """Return the image processor's config as its file has it, or CLIP's own where the folder has none."""
    found = folder.read_json_if_any("preprocessor_config.json")
    found = found or folder.read_json_if_any("processor_config.json").get("image_processor", {})
    if found:
        return found
    size = _pixels(config.image_size)
    _LOG.warning("event=preprocessing_assumed folder=%s reason=no_preprocessor_config.json size=%d", folder.name, size)
    return {
        "crop_size": {"height": size, "width": size},
        "do_center_crop": True,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": list(OPENAI_CLIP_MEAN),
        "image_std": list(OPENAI_CLIP_STD),
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": {"shortest_edge": size},
    }


def pixel_affine(preprocessing: dict[str, Any], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return scale and shift, float32[3, 1, 1] each: a pixel of 0 to 255 times scale plus shift is what CLIP reads."""
    rescale = preprocessing.get("rescale_factor", 1 / 255) if preprocessing.get("do_rescale", True) else 1.0
    normalises = preprocessing.get("do_normalize", True)
    mean = preprocessing.get("image_mean", OPENAI_CLIP_MEAN) if normalises else [0.0] * 3
    std = preprocessing.get("image_std", OPENAI_CLIP_STD) if normalises else [1.0] * 3
    scale = [rescale / s for s in std]
    shift = [-m / s for m, s in zip(mean, std, strict=True)]
    return torch.tensor(scale, device=device).view(3, 1, 1), torch.tensor(shift, device=device).view(3, 1, 1)


def _vision_config(raw: dict[str, Any], folder: Folder) -> CLIPVisionConfig:
    kind = raw.get("model_type")
    if kind == "clip":
        config = parse_config(CLIPConfig, raw, where=folder.name).vision_config
    elif kind == "clip_vision_model":
        config = parse_config(CLIPVisionConfig, raw, where=folder.name)
    else:
        config = None
    if not isinstance(config, CLIPVisionConfig):
        raise BundleError(
            f"the vision model in {folder.name} has model_type {kind!r}; supported are clip and clip_vision_model"
        )
    return config


def tower_name(name: str) -> str | None:
    """Return a tensor's name in `CLIPVisionModel` from its name in a CLIP checkpoint, None for the text tower's."""
    own = re.match(r"(?:vision_model\.)?((?:embeddings|encoder|pre_layrnorm|post_layernorm)\..*)", name)
    return own[1] if own else None


def _text_name(name: str) -> str | None:
    """Return the name of a tensor that CLIPScore needs beside the vision tower, None for any other."""
    return name if name.startswith(("text_model.", "text_projection.", "visual_projection.")) else None


def _plain(tower: CLIPVisionModel) -> torch.nn.Module:
    """Return the module that has `embeddings` and `encoder`; older transformers wrap it once more."""
    inner: torch.nn.Module = getattr(tower, "vision_model", tower)
    return inner


def _preprocessed_size(preprocessing: dict[str, Any]) -> tuple[int, int]:
    crops = preprocessing.get("do_center_crop", True)
    size = preprocessing.get("crop_size" if crops else "size", 224)
    if isinstance(size, dict):
        edge: int = size.get("shortest_edge", 0)
        width: int = size.get("width", edge)
        height: int = size.get("height", edge)
        return width, height
    return size, size


def _pixels(side: object) -> int:
    """Return the side of a square from a config value. Raises BundleError for a rectangle."""
    if not isinstance(side, int):
        raise BundleError(f"a CLIP config has image or patch size {side}; expected one number, the side of a square")
    return side
