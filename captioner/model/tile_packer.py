"""The patch features of an image's tiles, packed into its image tokens: `pack_image_features` of transformers' LLaVAs.

Letters in shapes: T tiles, P patches a side of one, D language model width, n image tokens.
"""

import torch
from torch import Tensor, nn

from captioner.model.anyres import AnyRes

__all__ = ["TilePacker", "packed"]


class TilePacker(nn.Module):
    """Holds the embedding that ends each row of patches."""

    def __init__(self, anyres: AnyRes, width: int) -> None:
        super().__init__()
        self.anyres = anyres
        self.image_newline = nn.Parameter(torch.empty(width))

    def forward(self, features: Tensor, width: int, height: int) -> Tensor:
        """Return the image tokens, float[n, D], of an upright image of so many pixels, from float[T, P * P, D]."""
        return packed(features, self.image_newline, self.anyres, width, height)


def packed(features: Tensor, newline: Tensor, anyres: AnyRes, width: int, height: int) -> Tensor:
    """Return the tokens of the whole image, then those of its grid: row by row, the padding left out, a newline behind
    each row. features: float[T, P * P, D], the whole image first; newline: float[D]; n is `anyres.num_tokens`."""
    rows, columns = anyres.grid(width, height)
    side = anyres.patches
    grid = (
        features[1:].view(rows, columns, side, side, -1).permute(4, 0, 2, 1, 3).reshape(-1, rows * side, columns * side)
    )
    above, left = anyres.padding(width, height)
    grid = grid[:, above : rows * side - above, left : columns * side - left]
    size = anyres.packed_size(*grid.shape[1:])
    if size != tuple(grid.shape[1:]):
        grid = nn.functional.interpolate(grid[None], list(size), mode="bilinear")[0]
    ends = newline.to(grid)[:, None, None].expand(-1, grid.shape[1], 1)
    return torch.cat([features[0], torch.cat([grid, ends], dim=2).flatten(1).T])
