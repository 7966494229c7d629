"""CLIP's vision tower with what its pixels need: uint8 in, states out.

Knows tensors; not where weights come from, nor what reads the states.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPVisionModel

from captioner.errors import ShapeError

__all__ = ["VisionEncoder"]


@dataclass(frozen=True, kw_only=True, eq=False)
class VisionEncoder:
    """A vision tower, frozen, on one device in one dtype. B images, S image side, F its width."""

    tower: CLIPVisionModel
    image_size: int
    """Side S of the square images it reads, in pixels."""

    pixel_scale: Tensor = field(repr=False)
    """float32[3, 1, 1] on the device: pixels times this, plus `pixel_shift`, is what CLIP reads."""

    pixel_shift: Tensor = field(repr=False)

    @torch.no_grad()
    def states(self, pixels: Tensor) -> Any:
        """Return transformers' output of the tower for uint8[B, 3, S, S]. Raises ShapeError for others."""
        return self.tower(pixel_values=self.normalised(pixels))

    def normalised(self, pixels: Tensor) -> Tensor:
        """Return what CLIP reads, float[B, 3, S, S] on the device. Raises ShapeError for pixels of another shape."""
        self.check(pixels)
        on_device = pixels.to(self.tower.device, non_blocking=True)
        return on_device.float().mul_(self.pixel_scale).add_(self.pixel_shift).to(self.tower.dtype)

    def pooled(self, pixels: Tensor) -> Tensor:
        """Return the normalised CLS state of each image, float[B, F]."""
        pooled: Tensor = self.states(pixels).pooler_output
        return pooled

    def check(self, pixels: Tensor) -> None:
        """Raise ShapeError for pixels that are not uint8[B, 3, S, S]."""
        side = self.image_size
        if pixels.dtype != torch.uint8 or pixels.shape[1:] != (3, side, side):
            raise ShapeError(
                f"pixels are {pixels.dtype}{list(pixels.shape)}; expected torch.uint8[B, 3, {side}, {side}]"
            )
