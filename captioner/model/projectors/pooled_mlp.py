"""Two linear maps of the pooled state, with an activation between."""

from torch import Tensor, nn
from transformers.activations import ACT2FN

from captioner.model.projector_config import ProjectorConfig

__all__ = ["PooledMlpProjector"]


class PooledMlpProjector(nn.Module):
    """Two linear maps with an activation between, from the pooled CLS state to k image tokens.

    As in ClipCap (arXiv:2111.09734)."""

    def __init__(self, config: ProjectorConfig):
        super().__init__()
        self.linear_1 = nn.Linear(config.num_features, config.width, bias=config.has_bias)
        self.act = ACT2FN[config.hidden_act]
        self.linear_2 = nn.Linear(config.width, config.num_image_tokens * config.width, bias=config.has_bias)
        self.num_image_tokens = config.num_image_tokens

    def forward(self, image_features: Tensor) -> Tensor:
        """float[B, F] -> float[B, k, D], the embeddings that LLaMA reads in place of each image."""
        flat: Tensor = self.linear_2(self.act(self.linear_1(image_features)))
        return flat.view(*flat.shape[:-1], self.num_image_tokens, -1)
