"""How the patch features of an image's tiles become its image tokens: LLaVA's AnyRes, numbers without tensors.

A grid of tiles holds the image in its middle, with padding around it; patches of padding alone are left out, each row
of patches ends with a newline, and the tokens of the whole image, seen as one tile, come first. What follows from the
size of an image is here, the tensors are in `tile_packer`. Knows no torch.
"""

import math
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from captioner.images.grids import Resolution, best_resolution

__all__ = ["AnyRes"]

_LEAST_RATIO = 1.1  # a grid that is larger by no more is left as it is


@dataclass(frozen=True, kw_only=True)
class AnyRes:
    """The tiles of a model and how their patches are packed. The height of a size comes first, as in configs."""

    resolutions: tuple[Resolution, ...]
    """Sizes of the grids to choose from, (height, width) in pixels."""

    tile_size: int
    """Side of a tile in pixels."""

    patches: int
    """Patches along one side of a tile."""

    most_tiles: int | None = None
    """The patches of more tiles than so many are averaged down to about as many: N of `anyres_max_N`."""

    def grid(self, width: int, height: int) -> tuple[int, int]:
        """Return rows and columns of the tiles of an upright image."""
        resolution = best_resolution(width, height, self.resolutions)
        return resolution[0] // self.tile_size, resolution[1] // self.tile_size

    def num_tiles(self, width: int, height: int) -> int:
        """Return the tiles of an upright image, the whole image as the first of them among it."""
        rows, columns = self.grid(width, height)
        return 1 + rows * columns

    def padding(self, width: int, height: int) -> tuple[int, int]:
        """Return the rows of patches above the image and below it, and the columns left and right, that are padding."""
        rows, columns = (tiles * self.patches for tiles in self.grid(width, height))
        if width / height > columns / rows:
            return (rows - int(round(height * (columns / width), 7))) // 2, 0
        return 0, (columns - int(round(width * (rows / height), 7))) // 2

    def packed_size(self, rows: int, columns: int) -> tuple[int, int]:
        """Return rows and columns of patches after they are averaged down."""
        if self.most_tiles is None:
            return rows, columns
        ratio = math.sqrt(rows * columns / (self.most_tiles * self.patches**2))
        return (int(rows // ratio), int(columns // ratio)) if ratio > _LEAST_RATIO else (rows, columns)

    def num_tokens(self, width: int, height: int) -> int:
        """Return the image tokens of an upright image of so many pixels, without a look at them."""
        rows, columns = (tiles * self.patches for tiles in self.grid(width, height))
        above, left = self.padding(width, height)
        return self._num_tokens(rows - 2 * above, columns - 2 * left)

    @cached_property
    def most_tokens(self) -> int:
        """Most image tokens that an image of any size has."""
        most = 0
        for resolution in self.resolutions:
            rows, columns = (side // self.tile_size * self.patches for side in resolution)
            cut = [(rows - 2 * above, columns) for above in range(rows // 2 + 1)]
            cut += [(rows, columns - 2 * left) for left in range(columns // 2 + 1)]
            most = max(most, *(self._num_tokens(*size) for size in cut))
        return most

    @cached_property
    def most_image_tiles(self) -> int:
        """Most tiles that an image of any size has, the whole image among them."""
        return 1 + max((rows // self.tile_size) * (columns // self.tile_size) for rows, columns in self.resolutions)

    def identity(self) -> dict[str, Any]:
        """Return what decides the tokens, for records."""
        return asdict(self)

    def _num_tokens(self, rows: int, columns: int) -> int:
        rows, columns = self.packed_size(rows, columns)
        return self.patches**2 + rows * (columns + 1)
