"""SigLIP's vision tower, and SigLIP 2's in its form of a fixed resolution: `SiglipVisionModel`, and its entry.

It has no CLS: the pooled state is that of an attention head over all patches, which a published captioner may lack.
"""

import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Self

from captioner.model.shapes import Shapes, linear_shapes
from captioner.model.towers.tower import SHAPING, TowerConfig, TowerFamily, TowerSource, layer_shapes

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["SIGLIP", "SiglipConfig", "siglip_shapes"]


@dataclass(frozen=True, kw_only=True)
class SiglipConfig(TowerConfig):
    """transformers' SiglipVisionConfig."""

    model_type: ClassVar[str] = "siglip_vision_model"
    class_name: ClassVar[str] = "SiglipVisionConfig"
    hidden_act: str = "gelu_pytorch_tanh"
    vision_use_head: bool = True
    """Whether it has the head that gives the pooled state."""

    def for_patches(self) -> Self:
        """Return the config of a tower without its head, which the original LLaVA does not keep."""
        return replace(self, vision_use_head=False)


def siglip_shapes(config: SiglipConfig) -> Shapes:
    """Return the tensors of SiglipVisionModel with its head."""
    width, side = config.hidden_size, config.patch_size
    return {
        "embeddings.patch_embedding.weight": (width, config.num_channels, side, side),
        "embeddings.patch_embedding.bias": (width,),
        "embeddings.position_embedding.weight": (config.num_patches, width),
        **layer_shapes(config, ("post_layernorm",)),
        **_head_shapes(config),
    }


def _head_shapes(config: SiglipConfig) -> Shapes:
    width, inner = config.hidden_size, config.intermediate_size
    return {
        "head.probe": (1, 1, width),
        "head.attention.in_proj_weight": (3 * width, width),
        "head.attention.in_proj_bias": (3 * width,),
        **linear_shapes("head.attention.out_proj", width, width),
        "head.layernorm.weight": (width,),
        "head.layernorm.bias": (width,),
        **linear_shapes("head.mlp.fc1", width, inner),
        **linear_shapes("head.mlp.fc2", inner, width),
    }


def _unused(config: SiglipConfig) -> frozenset[str]:
    return frozenset() if config.vision_use_head else frozenset(_head_shapes(config))


def _tensor_name(name: str) -> str | None:
    own = re.match(r"(?:vision_model\.)?((?:embeddings|encoder|post_layernorm|head)\..*)", name)
    return own[1] if own else None


def _preprocessing(config: TowerConfig) -> dict[str, Any]:
    return {
        "do_center_crop": False,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": {"height": config.image_size, "width": config.image_size},
    }


def _build(source: TowerSource, num_layers: int | None) -> "nn.Module":
    from transformers import SiglipVisionConfig, SiglipVisionModel  # here: a description needs neither

    from captioner.model.module import parse_config

    config = parse_config(SiglipVisionConfig, source.config.for_transformers(), where=source.folder.name)
    if num_layers is not None:
        config.num_hidden_layers, config.vision_use_head = num_layers, False
    return SiglipVisionModel(config)


def _states(tower: Any, pixel_values: "Tensor") -> "Tensor":
    """The output of the last layer: `last_hidden_state` is that after post_layernorm, which no captioner reads."""
    states: Tensor = tower.encoder(inputs_embeds=tower.embeddings(pixel_values)).last_hidden_state
    return states


SIGLIP = TowerFamily(
    name="SigLIP",
    config=SiglipConfig,
    whole_type="siglip",
    shaping=("model_type", *SHAPING),
    has_cls=False,
    shapes=siglip_shapes,
    unused=_unused,
    has_pooled=lambda config: config.vision_use_head,
    tensor_name=_tensor_name,
    preprocessing=_preprocessing,
    build=_build,
    states=_states,
)
