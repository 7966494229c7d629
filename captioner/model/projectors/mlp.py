"""Two linear maps of each patch, with an activation between."""

from torch import Tensor, nn
from transformers.activations import ACT2FN

from captioner.model.projector_config import ProjectorConfig

__all__ = ["MlpProjector"]


class MlpProjector(nn.Module):
    """Two linear maps with an activation between, applied to each patch, as in LLaVA-1.5 (arXiv:2310.03744)."""

    def __init__(self, config: ProjectorConfig):
        super().__init__()
        self.linear_1 = nn.Linear(config.num_features, config.width, bias=config.has_bias)
        self.act = ACT2FN[config.hidden_act]
        self.linear_2 = nn.Linear(config.width, config.width, bias=config.has_bias)

    def forward(self, image_features: Tensor) -> Tensor:
        """float[B, P, F] -> float[B, P, D], the embeddings that LLaMA reads in place of each image."""
        embeddings: Tensor = self.linear_2(self.act(self.linear_1(image_features)))
        return embeddings
