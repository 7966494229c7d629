"""The CPU worker of a caption job: source rows in, decoded rows out. A plain class, tested without Ray.

Rows in = rows out, in order, until the job is to stop; a row that failed earlier passes through. Torch-free, so that
its process starts at once.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from captioner.config import CaptionJobConfig
from captioner.images import Decoded, Decoder, Preprocessing
from captioner.rows import Reject, build_table, decoded_schema
from captioner.sources import Fetcher, Refusals
from captioner.stopping import StopFile

__all__ = ["DecodeWorker"]


class DecodeWorker:
    """Fetches and decodes on CPUs. `preprocessing` is CLIP's own preprocessor config; `kept` the user's columns.

    stop: says when the job is to end: from then on rows that were read are left to the next run.
    """

    def __init__(
        self,
        config: CaptionJobConfig,
        preprocessing: Mapping[str, Any],
        kept: Sequence[pa.Field] = (),
        stop: StopFile | None = None,
    ) -> None:
        self._stop = stop
        self._fetcher = Fetcher(config.input_path, config.input, config.image)
        self._refusals = Refusals(config.input_path)
        self._decoder = Decoder(Preprocessing.from_config(preprocessing), config.image)
        self._schema = decoded_schema(self._decoder.preprocessing.size, kept)

    def __call__(self, rows: pa.Table) -> pa.Table:
        """Return rows of `rows.decoded_schema` for rows of `rows.source_schema`. Never raises for an image.

        Raises JobError when a store gives nothing any more (see `sources.refusals`).
        """
        if self._stop and self._stop.is_there():
            rows = rows.slice(0, 0)
        outcomes, sizes = self._outcomes(rows)
        made = {
            "reason": [_if_reject(outcome, "reason") for outcome in outcomes],
            "detail": [_if_reject(outcome, "detail") for outcome in outcomes],
            "pixels": _pixel_array(outcomes, self._schema.field("pixels").type),
            "width": [_if_decoded(outcome, "width") for outcome in outcomes],
            "height": [_if_decoded(outcome, "height") for outcome in outcomes],
            "size_bytes": sizes,
        }
        return build_table(self._schema, rows, made)

    def _outcomes(self, rows: pa.Table) -> tuple[list[Decoded | Reject], list[int | None]]:
        """Return what became of each image, and its size in bytes where it arrived."""
        found: dict[int, Decoded | Reject] = {}
        sizes: dict[int, int] = {}
        for arrivals in self._fetcher.stream_rows(rows):
            images = {place: source for place, source in arrivals if not isinstance(source, Reject)}
            found.update((place, source) for place, source in arrivals if isinstance(source, Reject))
            found.update(zip(images, self._decoder.decode_batch(list(images.values())), strict=True))
            sizes.update((place, len(data)) for place, data in images.items())
        places = range(rows.num_rows)
        self._refusals.see(rows, [found[place] if place not in sizes else None for place in places])
        return [found[place] for place in places], [sizes.get(place) for place in places]


def _if_reject(outcome: Decoded | Reject, name: str) -> str | None:
    return str(getattr(outcome, name)) if isinstance(outcome, Reject) else None


def _if_decoded(outcome: Decoded | Reject, name: str) -> int | None:
    return getattr(outcome, name) if isinstance(outcome, Decoded) else None


def _pixel_array(outcomes: Sequence[Decoded | Reject], kind: pa.DataType) -> pa.Array:
    """Return fixed-size binary of uint8[3, S, S] each, null where there is none."""
    pixels = np.zeros((len(outcomes), kind.byte_width), np.uint8)
    for row, outcome in enumerate(outcomes):
        if isinstance(outcome, Decoded):
            pixels[row] = outcome.pixels.reshape(-1)
    is_image = np.array([isinstance(outcome, Decoded) for outcome in outcomes], bool)
    validity = pa.py_buffer(np.packbits(is_image, bitorder="little").tobytes())
    return pa.Array.from_buffers(kind, len(outcomes), [validity, pa.py_buffer(pixels)])
