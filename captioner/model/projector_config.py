"""The shape of a projector, as a bundle records it, and the tensors that it has.

Knows no torch. The modules are in `projectors`; a new kind is a file there and an entry in `KINDS` here.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from captioner.errors import BundleError, ShapeError
from captioner.model.configs import ACTIVATIONS
from captioner.model.shapes import Shapes, linear_shapes

__all__ = ["KINDS", "Kind", "ProjectorConfig"]


@dataclass(frozen=True, kw_only=True)
class ProjectorConfig:
    """The shape of a projector and which features it reads."""

    kind: str
    """A key of `KINDS`."""

    num_features: int
    """Width of the image features, CLIP's hidden size."""

    width: int
    """Width of the output embeddings, LLaMA's hidden size."""

    num_image_tokens: int = 1
    """Embeddings that stand for one image."""

    vision_feature_layer: int = -2
    """For patch features: the hidden state of CLIP to read, numbered as in transformers: 0 is the first input."""

    vision_feature_select_strategy: Literal["default", "full"] = "default"
    """For patch features: `default` drops the CLS state, `full` keeps it."""

    hidden_act: str = "gelu"
    """Activation between the two layers of `mlp`, by transformers' name."""

    has_bias: bool = True
    """Whether its linear maps add a bias."""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise BundleError(f"unknown projector kind {self.kind!r}; expected one of {', '.join(sorted(KINDS))}")
        for name in ("num_features", "width", "num_image_tokens"):
            if not getattr(self, name) >= 1:
                raise ShapeError(f"projector {name} is {getattr(self, name)}; expected at least 1")
        if self.hidden_act not in ACTIVATIONS:
            raise BundleError(
                f"unknown projector activation {self.hidden_act!r}; expected a name of transformers' ACT2FN"
            )
        if KINDS[self.kind].pooling == "average" and math.isqrt(self.num_image_tokens) ** 2 != self.num_image_tokens:
            raise ShapeError(
                f"a projector of kind {self.kind} has {self.num_image_tokens} image tokens; expected a square: it"
                " averages patches over a square grid"
            )
        if self.vision_feature_select_strategy not in ("default", "full"):
            raise BundleError(
                f"vision_feature_select_strategy is {self.vision_feature_select_strategy!r}; expected default or full"
            )

    @property
    def reads_patches(self) -> bool:
        """Whether it reads the patch states of one layer rather than the pooled CLS state."""
        return KINDS[self.kind].reads_patches

    @property
    def shapes(self) -> Shapes:
        """Its tensors."""
        return KINDS[self.kind].shapes(self)


@dataclass(frozen=True)
class Kind:
    """What is known of a kind of projector without its module."""

    file: str
    """Name of its file in `projectors`."""

    module: str
    """Name of its class."""

    reads_patches: bool
    """Whether it reads the patch states of one layer rather than the pooled CLS state."""

    shapes: Callable[[ProjectorConfig], Shapes]
    """Its tensors."""

    pooling: Literal["", "average", "query"] = ""
    """How it pools patches, so that an image may have fewer tokens than patches: averages over a square grid, or
    learned queries that attend to them."""


def _linear(config: ProjectorConfig) -> Shapes:
    return linear_shapes("", config.num_features, config.num_image_tokens * config.width, has_bias=config.has_bias)


def _patch_linear(config: ProjectorConfig) -> Shapes:
    return linear_shapes("", config.num_features, config.width, has_bias=config.has_bias)


def _pooled_mlp(config: ProjectorConfig) -> Shapes:
    return _two_layers(config, config.num_image_tokens * config.width)


def _mlp(config: ProjectorConfig) -> Shapes:
    return _two_layers(config, config.width)


def _two_layers(config: ProjectorConfig, gives: int) -> Shapes:
    first = linear_shapes("linear_1", config.num_features, config.width, has_bias=config.has_bias)
    return first | linear_shapes("linear_2", config.width, gives, has_bias=config.has_bias)


def _query(config: ProjectorConfig) -> Shapes:
    k, width = config.num_image_tokens, config.num_features
    maps = {name: linear_shapes(name, width, width, has_bias=config.has_bias) for name in ("key", "value")}
    last = linear_shapes("linear", width, config.width, has_bias=config.has_bias)
    places: Shapes = {"y": (k,), "x": (k,), "log_sharpness": (k,)}
    norm: Shapes = {"norm.weight": (width,), "norm.bias": (width,)}
    return {"query": (k, width)} | places | norm | maps["key"] | maps["value"] | last


KINDS = {
    "linear": Kind(file="linear", module="LinearProjector", reads_patches=False, shapes=_linear),
    "pooled_mlp": Kind(file="pooled_mlp", module="PooledMlpProjector", reads_patches=False, shapes=_pooled_mlp),
    "patch_linear": Kind(file="patch_linear", module="PatchLinearProjector", reads_patches=True, shapes=_patch_linear),
    "mlp": Kind(file="mlp", module="MlpProjector", reads_patches=True, shapes=_mlp),
    "average_linear": Kind(
        file="average_linear",
        module="AverageLinearProjector",
        reads_patches=True,
        shapes=_patch_linear,
        pooling="average",
    ),
    "average_mlp": Kind(
        file="average_mlp", module="AverageMlpProjector", reads_patches=True, shapes=_mlp, pooling="average"
    ),
    "query": Kind(file="query", module="QueryProjector", reads_patches=True, shapes=_query, pooling="query"),
}
