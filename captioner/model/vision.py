"""A vision tower with the normalisation of its pixels: uint8 in, states out.

Knows tensors; not where weights come from, nor what reads the states.
"""

from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor, nn

from captioner.errors import ShapeError
from captioner.model.towers.tower import TowerFamily

__all__ = ["VisionEncoder"]


@dataclass(frozen=True, kw_only=True, eq=False)
class VisionEncoder:
    """A vision tower, frozen, on one device in one dtype. B images, S image side, N states, F its width."""

    tower: nn.Module
    family: TowerFamily
    width: int
    """Width F of its states."""

    image_size: int
    """Side S of the square images it reads, in pixels."""

    pixel_scale: Tensor = field(repr=False)
    """float32[3, 1, 1] on the device: the tower reads pixels times this, plus `pixel_shift`."""

    pixel_shift: Tensor = field(repr=False)

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        return self._weight.device

    @torch.no_grad()
    def states(self, pixels: Tensor) -> Tensor:
        """Return the states after the last layer that was loaded, float[B, N, F], for uint8[B, 3, S, S].

        Raises ShapeError for other pixels."""
        return self.family.states(self.tower, self.normalised(pixels))

    @torch.no_grad()
    def pooled(self, pixels: Tensor) -> Tensor:
        """Return one state of each image, float[B, F], as the family pools it. Raises as `states` does."""
        return self.family.pooled(self.tower, self.normalised(pixels))

    def normalised(self, pixels: Tensor) -> Tensor:
        """Return `pixel_values`, float[B, 3, S, S] on the device. Raises ShapeError for pixels of another shape."""
        self.check(pixels)
        on_device = pixels.to(self._weight.device, non_blocking=True)
        return on_device.float().mul_(self.pixel_scale).add_(self.pixel_shift).to(self._weight.dtype)

    @cached_property
    def _weight(self) -> Tensor:
        """Any weight, for its device and dtype."""
        return next(self.tower.parameters())

    def check(self, pixels: Tensor) -> None:
        """Raise ShapeError for pixels that are not uint8[B, 3, S, S]."""
        side = self.image_size
        if pixels.dtype != torch.uint8 or pixels.shape[1:] != (3, side, side):
            raise ShapeError(
                f"pixels are {pixels.dtype}{list(pixels.shape)}; expected torch.uint8[B, 3, {side}, {side}]"
            )
