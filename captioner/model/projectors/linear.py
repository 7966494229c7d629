"""One linear map of the pooled state."""

import torch
from torch import Tensor, nn

from captioner.model.projector_config import ProjectorConfig

__all__ = ["LinearProjector"]


class LinearProjector(nn.Module):
    """One linear map from the pooled CLS state to k image tokens, as in LiMBeR (arXiv:2209.15162)."""

    def __init__(self, config: ProjectorConfig):
        super().__init__()
        out = config.num_image_tokens * config.width
        self.weight = nn.Parameter(torch.empty(out, config.num_features))
        self.bias = nn.Parameter(torch.zeros(out)) if config.has_bias else None
        self.num_image_tokens = config.num_image_tokens
        nn.init.normal_(self.weight, std=config.num_features**-0.5)

    def forward(self, image_features: Tensor) -> Tensor:
        """float[B, F] -> float[B, k, D], the embeddings that LLaMA reads in place of each image."""
        flat: Tensor = nn.functional.linear(image_features, self.weight, self.bias)
        return flat.view(*flat.shape[:-1], self.num_image_tokens, -1)
