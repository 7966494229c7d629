"""What checkpoints that cut images into tiles say of them, in any layout: the sizes of grids, and how many tiles count.

Knows names of configs and tensors.
"""

import re
from dataclasses import dataclass
from typing import Any, Self

from captioner.errors import BundleError
from captioner.images.grids import Resolution
from captioner.model.anyres import AnyRes
from captioner.model.towers.tower import TowerConfig

__all__ = ["Tiles", "newline_name"]

_ASPECT = re.compile(r"anyres(?:_max_([1-9]\d*))?")


@dataclass(frozen=True, kw_only=True)
class Tiles:
    """`image_grid_pinpoints` and the N of `anyres_max_N`."""

    processor: str
    """transformers' image processor that cuts images so."""

    resolutions: tuple[Resolution, ...]
    most_tiles: int | None

    @classmethod
    def read(cls, processor: str, pinpoints: object, aspect: object, *, where: str) -> Self:
        """Return what a config says. Raises BundleError for a value that cannot be."""
        found = _ASPECT.fullmatch(aspect) if isinstance(aspect, str) else None
        if found is None:
            raise BundleError(f"the aspect ratio in {where} is {aspect!r}; expected anyres or anyres_max_N")
        most_tiles = int(found[1]) if found[1] else None
        return cls(processor=processor, resolutions=_resolutions(pinpoints, where), most_tiles=most_tiles)

    def anyres(self, tower: TowerConfig) -> AnyRes:
        """Return the tiles of a tower and how their patches are packed."""
        return AnyRes(
            resolutions=self.resolutions,
            tile_size=tower.image_size,
            patches=tower.image_size // tower.patch_size,
            most_tiles=self.most_tiles,
        )

    def preprocessing(self, found: dict[str, Any]) -> dict[str, Any]:
        """Return an image processor's config; that of one tile takes the grids of the model."""
        pinpoints = [list(size) for size in self.resolutions]
        grids = {"image_processor_type": self.processor, "image_grid_pinpoints": pinpoints}
        is_own = str(found.get("image_processor_type", "")).startswith(self.processor)
        return found if is_own or "image_grid_pinpoints" in found else found | grids


def newline_name(name: str) -> str | None:
    """Return the name of the embedding that ends a row of patches, None for another tensor."""
    return "image_newline" if name in ("image_newline", "model.image_newline") else None


def _resolutions(pinpoints: object, where: str) -> tuple[Resolution, ...]:
    pairs = pinpoints if isinstance(pinpoints, list) else []
    sides = [pair if isinstance(pair, list) and len(pair) == 2 else [None] for pair in pairs]
    if not pairs or not all(type(side) is int for pair in sides for side in pair):
        raise BundleError(
            f"image_grid_pinpoints in {where} is {pinpoints!r}; expected a list of [height, width] in pixels"
        )
    return tuple((height, width) for height, width in pairs)
