"""CLIP's vision tower: `CLIPVisionModel`, alone or in a `CLIPModel`, and its entry in the table."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar, Self

from captioner.images.preprocessing import Preprocessing
from captioner.model.shapes import Shapes
from captioner.model.towers.tower import SHAPING, TowerConfig, TowerFamily, TowerSource, layer_shapes

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["CLIP", "ClipConfig", "clip_shapes"]


@dataclass(frozen=True, kw_only=True)
class ClipConfig(TowerConfig):
    """transformers' CLIPVisionConfig."""

    model_type: ClassVar[str] = "clip_vision_model"
    class_name: ClassVar[str] = "CLIPVisionConfig"
    patch_size: int = 32
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5

    @classmethod
    def read_whole(cls, raw: Mapping[str, Any], *, where: str) -> Self:
        """Return the config of the vision tower of a whole CLIP. Raises as `read` does."""
        vision = dict(raw.get("vision_config") or {})
        if (older := raw.get("vision_config_dict")) is not None:  # of 2021's checkpoints; it wins, defaults and all
            vision |= {f.name: older.get(f.name, f.default) for f in fields(cls) if f.name != "raw"}
        return cls.read(vision, where=where)


def clip_shapes(config: TowerConfig) -> Shapes:
    """Return the tensors of CLIPVisionModel, without the prefix of older transformers."""
    width, side = config.hidden_size, config.patch_size
    return {
        "embeddings.class_embedding": (width,),
        "embeddings.patch_embedding.weight": (width, config.num_channels, side, side),
        "embeddings.position_embedding.weight": (config.num_patches + 1, width),
        **layer_shapes(config, ("pre_layrnorm", "post_layernorm")),  # spelt as in transformers
    }


def _tensor_name(name: str) -> str | None:
    own = re.match(r"(?:vision_model\.)?((?:embeddings|encoder|pre_layrnorm|post_layernorm)\..*)", name)
    return own[1] if own else None


def _preprocessing(config: TowerConfig) -> dict[str, Any]:
    size = config.image_size
    return {
        "crop_size": {"height": size, "width": size},
        "do_center_crop": True,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": list(Preprocessing.mean),
        "image_std": list(Preprocessing.std),
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": {"shortest_edge": size},
    }


def _build(source: TowerSource, num_layers: int | None) -> "nn.Module":
    from transformers import CLIPVisionConfig, CLIPVisionModel  # here and below: a description needs neither

    from captioner.model.module import parse_config

    config = parse_config(CLIPVisionConfig, source.config.for_transformers(), where=source.folder.name)
    config.num_hidden_layers = config.num_hidden_layers if num_layers is None else num_layers
    return CLIPVisionModel(config)


def _optimised(tower: Any) -> "nn.Module":
    from captioner.model.quick_gelu import fuse_quick_gelu

    return fuse_quick_gelu(tower)


def _states(tower: Any, pixel_values: "Tensor") -> "Tensor":
    states: Tensor = tower(pixel_values=pixel_values).last_hidden_state  # without post_layernorm
    return states


CLIP = TowerFamily(
    name="CLIP",
    config=ClipConfig,
    whole_type="clip",
    shaping=SHAPING,
    has_cls=True,
    shapes=clip_shapes,
    tensor_name=_tensor_name,
    preprocessing=_preprocessing,
    build=_build,
    optimised=_optimised,
    states=_states,
)
