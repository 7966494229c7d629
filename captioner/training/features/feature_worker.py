"""The model worker of feature extraction: decoded rows in, CLIP's pooled state out. A plain class, tested without Ray.

Rows in = rows out, in order; a row that failed earlier passes through.
"""

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import torch

from captioner.config import ModelConfig
from captioner.model.bundle import load_vision
from captioner.model.image_encoder import ENCODE_ROWS, pixel_tensor
from captioner.training.features.feature_plan import VERSION_COLUMNS
from captioner.training.features.features import features_array

__all__ = ["FeatureWorker"]

Features = npt.NDArray[np.float16]


class FeatureWorker:
    """Runs a CLIP tower on one device. `clip` is where it lies, `num_threads` the CPU threads that torch may use."""

    def __init__(
        self,
        clip: str,
        model: ModelConfig,
        storage_options: dict[str, object] | None = None,
        num_threads: int | None = None,
    ) -> None:
        if num_threads:
            torch.set_num_threads(num_threads)
        self._vision = load_vision(clip, dtype=model.dtype, device=model.device, storage_options=storage_options)
        self._rows = ENCODE_ROWS.get(self._vision.device.type, 8)

    def __call__(self, rows: pa.Table) -> pa.Table:
        """Return image_id, VERSION_COLUMNS, reason, detail, and `features` float16[F], null when rejected."""
        is_image = pc.is_null(rows["reason"])
        values = self.encode(rows["pixels"].filter(is_image))
        places = pc.if_else(is_image, pc.subtract(pc.cumulative_sum(is_image.cast(pa.int64())), 1), None)
        named = {
            name: rows[name] for name in ("image_id", *(kind.name for kind in VERSION_COLUMNS), "reason", "detail")
        }
        return pa.table({**named, "features": features_array(values).take(places.combine_chunks())})

    def encode(self, pixels: pa.ChunkedArray) -> Features:
        """Return float16[B, F] from fixed-size binary of uint8[3, S, S] without nulls."""
        found: Features = np.empty((len(pixels), self._vision.width), np.float16)
        for start in range(0, len(pixels), self._rows):
            here = pixel_tensor(pixels.slice(start, self._rows), self._vision.image_size)
            found[start : start + len(here)] = self._pooled(here)
        return found

    def _pooled(self, pixels: torch.Tensor) -> Features:
        """Return float16[B, F]; CLIP always sees the same number of images, the missing ones black."""
        missing = self._rows - len(pixels)
        padded = torch.cat([pixels, pixels.new_zeros(missing, *pixels.shape[1:])]) if missing else pixels
        pooled = self._vision.pooled(padded)[: len(pixels)]
        values: Features = pooled.half().cpu().numpy()
        return values
