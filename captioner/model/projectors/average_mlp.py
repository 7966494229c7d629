"""Two linear maps of patches that are averaged over a square grid, with an activation between."""

from torch import Tensor

from captioner.model.projector_config import ProjectorConfig
from captioner.model.projectors.average_linear import averaged
from captioner.model.projectors.mlp import MlpProjector

__all__ = ["AverageMlpProjector"]


class AverageMlpProjector(MlpProjector):
    """The mean of each cell of a square grid of patches, and LLaVA-1.5's two maps of it.

    float[B, P, F] -> [B, k, D]."""

    def __init__(self, config: ProjectorConfig):
        super().__init__(config)
        self.num_image_tokens = config.num_image_tokens

    def forward(self, image_features: Tensor) -> Tensor:
        """Return float[B, k, D], the embeddings that LLaMA reads in place of each image."""
        return super().forward(averaged(image_features, self.num_image_tokens))
