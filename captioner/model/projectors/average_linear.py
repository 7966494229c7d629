"""One linear map of patches that are averaged over a square grid."""

import math

from torch import Tensor, nn

from captioner.model.projector_config import ProjectorConfig
from captioner.model.projectors.patch_linear import PatchLinearProjector

__all__ = ["AverageLinearProjector", "averaged"]


class AverageLinearProjector(PatchLinearProjector):
    """The mean of each cell of a square grid of patches, and one linear map of it: float[B, P, F] -> [B, k, D].

    As the average pooling of DePALM (arXiv:2403.13499)."""

    def __init__(self, config: ProjectorConfig):
        super().__init__(config)
        self.num_image_tokens = config.num_image_tokens

    def forward(self, image_features: Tensor) -> Tensor:
        """Return float[B, k, D], the embeddings that LLaMA reads in place of each image."""
        return super().forward(averaged(image_features, self.num_image_tokens))


def averaged(patches: Tensor, num_cells: int) -> Tensor:
    """Return the means over the cells of a square grid, float[B, k, F], from patches in rows of a square.

    Cells of a side that does not divide the patches' own share a row or column of patches."""
    side, cells = math.isqrt(patches.shape[1]), math.isqrt(num_cells)
    assert side * side == patches.shape[1], f"{patches.shape[1]} states are no square of patches"
    grid = patches.transpose(1, 2).reshape(len(patches), -1, side, side)
    return nn.functional.adaptive_avg_pool2d(grid, cells).flatten(2).transpose(1, 2)
