"""Learned queries that attend to the patches, and one linear map of what they read."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from captioner.model.projector_config import ProjectorConfig

__all__ = ["QueryProjector", "num_heads"]

_HEAD_WIDTH = 64


class QueryProjector(nn.Module):
    """k learned queries attend once to the patches, and one linear map of what each reads: float[B, P, F] -> [B, k, D].

    As the resampler of Qwen-VL (arXiv:2308.12966), where keys and queries have places, too. Here a query prefers
    patches near a point of its own, which is learned: it begins in a cell of a grid, and may come to look anywhere."""

    def __init__(self, config: ProjectorConfig):
        super().__init__()
        k, width = config.num_image_tokens, config.num_features
        rows, columns = _grid(k)
        at = torch.arange(k)
        self.query = nn.Parameter(0.02 * torch.randn(k, width))
        self.y = nn.Parameter((at // columns + 0.5) / rows)
        self.x = nn.Parameter((at % columns + 0.5) / columns)
        self.log_sharpness = nn.Parameter(torch.full((k,), math.log(2.0 * k)))  # a deviation of half a cell's side
        self.norm = nn.LayerNorm(width)
        self.key = nn.Linear(width, width, bias=config.has_bias)
        self.value = nn.Linear(width, width, bias=config.has_bias)
        self.linear = nn.Linear(width, config.width, bias=config.has_bias)
        self.num_image_tokens = k
        self.num_heads = num_heads(width)

    def forward(self, image_features: Tensor) -> Tensor:
        """Return float[B, k, D], the embeddings that LLaMA reads in place of each image."""
        patches = self.norm(image_features)
        query, key, value = (
            _in_heads(part, self.num_heads) for part in (self.query, self.key(patches), self.value(patches))
        )
        read = F.scaled_dot_product_attention(
            query.expand(len(patches), -1, -1, -1), key, value, attn_mask=self._nearness(patches).to(value.dtype)
        )
        embeddings: Tensor = self.linear(read.transpose(1, 2).flatten(2))
        return embeddings

    def _nearness(self, patches: Tensor) -> Tensor:
        """Return what is added to the scores before the softmax, float[k, P]. The image's sides have length 1."""
        side = math.isqrt(patches.shape[1])
        assert side * side == patches.shape[1], f"{patches.shape[1]} states are no square of patches"
        middles = (torch.arange(side, device=patches.device) + 0.5) / side
        y, x = torch.meshgrid(middles, middles, indexing="ij")
        distance = (self.y[:, None] - y.flatten()) ** 2 + (self.x[:, None] - x.flatten()) ** 2
        return -self.log_sharpness.exp()[:, None] * distance


def num_heads(width: int) -> int:
    """Return the heads for this width: the most of at least 64 numbers each that divide it."""
    return max(heads for heads in range(1, max(1, width // _HEAD_WIDTH) + 1) if width % heads == 0)


def _grid(num_cells: int) -> tuple[int, int]:
    """Return rows and columns with this product, as near to a square as there are."""
    rows = max(number for number in range(1, math.isqrt(num_cells) + 1) if num_cells % number == 0)
    return rows, num_cells // rows


def _in_heads(rows: Tensor, heads: int) -> Tensor:
    """float[..., N, F] -> float[..., heads, N, F / heads]."""
    return rows.view(*rows.shape[:-1], heads, -1).transpose(-2, -3)
