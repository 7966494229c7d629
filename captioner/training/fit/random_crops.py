"""Random resized crops: which part of an image a step of a fit shows, and the pixels of this part.

A box follows from seed, epoch and example alone, so that neither the workers nor an interruption change it. There are
no flips: captions say left and right. Knows arrays and tensors; no model.
"""

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from captioner.training.fit.batches import IntArray

__all__ = ["cropped", "random_boxes"]

_MAX_RATIO = 4 / 3  # of width to height or the reverse, as in torchvision's RandomResizedCrop


def random_boxes(examples: IntArray, *, min_area: float, seed: int, epoch: int) -> npt.NDArray[np.float32]:
    """Return left, top, width and height of each example's box, float32[B, 4], as shares of the image's side.

    min_area: least share of the image; the ratio of the sides is at most 4 to 3."""
    draws = np.stack(
        [np.random.Generator(np.random.Philox(key=[seed, epoch], counter=row)).random(4) for row in examples]
    )
    area = min_area + (1 - min_area) * draws[:, 0]
    ratio = _MAX_RATIO ** (2 * draws[:, 1] - 1)
    width, height = np.minimum(1, np.sqrt(area * ratio)), np.minimum(1, np.sqrt(area / ratio))
    left, top = (1 - width) * draws[:, 2], (1 - height) * draws[:, 3]
    return np.stack([left, top, width, height], axis=1).astype(np.float32)


def cropped(pixels: Tensor, boxes: Tensor) -> Tensor:
    """Return what the boxes show, at the size of the images: uint8[B, 3, S, S] of uint8[B, 3, S, S] and float[B, 4].

    Bilinear; a crop is never reduced, so that nothing aliases."""
    middles = (torch.arange(pixels.shape[-1], device=pixels.device) + 0.5) / pixels.shape[-1]
    left, top, width, height = boxes[:, :, None].unbind(1)
    x, y = (2 * (start + size * middles) - 1 for start, size in ((left, width), (top, height)))
    grid = torch.stack([x[:, None, :].expand(-1, len(middles), -1), y[:, :, None].expand(-1, -1, len(middles))], dim=-1)
    found = F.grid_sample(pixels.float(), grid, mode="bilinear", padding_mode="border", align_corners=False)
    return found.round().to(torch.uint8)
