"""The projector: what turns image features of CLIP into embeddings that LLaMA reads in place of the image.

Knows tensors and its own config; nothing of CLIP, LLaMA or files. A new kind is a class and an entry in `PROJECTORS`.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from captioner.errors import BundleError, ShapeError

__all__ = [
    "PROJECTORS",
    "LinearProjector",
    "MlpProjector",
    "PooledMlpProjector",
    "ProjectorConfig",
    "build_projector",
]


@dataclass(frozen=True, kw_only=True)
class ProjectorConfig:
    """The shape of a projector and which features it reads."""

    kind: str
    """A key of `PROJECTORS`."""

    num_features: int
    """Width of the image features, CLIP's hidden size."""

    width: int
    """Width of the embeddings that come out, LLaMA's hidden size."""

    num_image_tokens: int = 1
    """Embeddings that stand for one image."""

    vision_feature_layer: int = -2
    """For patch features: the hidden state of CLIP that is read, as transformers numbers them: 0 is the first input."""

    vision_feature_select_strategy: Literal["default", "full"] = "default"
    """For patch features: `default` leaves the CLS state out, `full` keeps it."""

    hidden_act: str = "gelu"
    """Activation between the two layers of `mlp`, by transformers' name."""

    has_bias: bool = True
    """Whether its linear maps add a bias."""

    def __post_init__(self) -> None:
        if self.kind not in PROJECTORS:
            raise BundleError(f"unknown projector kind {self.kind!r}; expected one of {', '.join(sorted(PROJECTORS))}")
        for name in ("num_features", "width", "num_image_tokens"):
            if not getattr(self, name) >= 1:
                raise ShapeError(f"projector {name} is {getattr(self, name)}; expected at least 1")
        if self.hidden_act not in ACT2FN:
            raise BundleError(
                f"unknown projector activation {self.hidden_act!r}; expected a name of transformers' ACT2FN"
            )
        if self.vision_feature_select_strategy not in ("default", "full"):
            raise BundleError(
                f"vision_feature_select_strategy is {self.vision_feature_select_strategy!r}; expected default or full"
            )

    @property
    def reads_patches(self) -> bool:
        """Whether it reads the patch states of one layer rather than the pooled CLS state."""
        return PROJECTORS[self.kind].reads_patches


class LinearProjector(nn.Module):
    """One linear map from the pooled CLS state to k image tokens, as in LiMBeR (arXiv:2209.15162)."""

    reads_patches = False

    def __init__(self, config: ProjectorConfig):
        super().__init__()
        out = config.num_image_tokens * config.width
        self.weight = nn.Parameter(torch.empty(out, config.num_features))
        self.bias = nn.Parameter(torch.zeros(out)) if config.has_bias else None
        self.num_image_tokens = config.num_image_tokens
        nn.init.normal_(self.weight, std=config.num_features**-0.5)

    def forward(self, image_features: Tensor) -> Tensor:
        """Return what LLaMA reads in place of each image: float[B, k, D] from float[B, F]."""
        flat: Tensor = nn.functional.linear(image_features, self.weight, self.bias)
        return flat.view(*flat.shape[:-1], self.num_image_tokens, -1)


class PooledMlpProjector(nn.Module):
    """Two linear maps with an activation between, from the pooled CLS state to k image tokens.

    As in ClipCap (arXiv:2111.09734)."""

    reads_patches = False

    def __init__(self, config: ProjectorConfig):
        super().__init__()
        self.linear_1 = nn.Linear(config.num_features, config.width, bias=config.has_bias)
        self.act = ACT2FN[config.hidden_act]
        self.linear_2 = nn.Linear(config.width, config.num_image_tokens * config.width, bias=config.has_bias)
        self.num_image_tokens = config.num_image_tokens

    def forward(self, image_features: Tensor) -> Tensor:
        """Return what LLaMA reads in place of each image: float[B, k, D] from float[B, F]."""
        flat: Tensor = self.linear_2(self.act(self.linear_1(image_features)))
        return flat.view(*flat.shape[:-1], self.num_image_tokens, -1)


class MlpProjector(nn.Module):
    """Two linear maps with an activation between, applied to each patch, as in LLaVA-1.5 (arXiv:2310.03744)."""

    reads_patches = True

    def __init__(self, config: ProjectorConfig):
        super().__init__()
        self.linear_1 = nn.Linear(config.num_features, config.width, bias=config.has_bias)
        self.act = ACT2FN[config.hidden_act]
        self.linear_2 = nn.Linear(config.width, config.width, bias=config.has_bias)

    def forward(self, image_features: Tensor) -> Tensor:
        """Return what LLaMA reads in place of each image: float[B, P, D] from float[B, P, F]."""
        embeddings: Tensor = self.linear_2(self.act(self.linear_1(image_features)))
        return embeddings


Projector = LinearProjector | PooledMlpProjector | MlpProjector

PROJECTORS: dict[str, type[Projector]] = {
    "linear": LinearProjector,
    "pooled_mlp": PooledMlpProjector,
    "mlp": MlpProjector,
}


def build_projector(config: ProjectorConfig) -> Projector:
    """Return a new projector with random weights, on torch's default device."""
    return PROJECTORS[config.kind](config)
