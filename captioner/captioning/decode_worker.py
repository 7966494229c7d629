"""The CPU worker of a caption job: source rows in, decoded rows out. A plain class, tested without Ray.

Rows in = rows out, in order, until the job is asked to stop; a row that failed earlier passes through. Imports no
torch, so that its process starts at once.
"""

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from captioner.captioning.witnesses import Witnesses
from captioner.config import CaptionJobConfig
from captioner.images import Decoded, Decoder, Preprocessing
from captioner.images.pixel_blocks import PixelBlocks, Places
from captioner.inputs import Fetcher, OutageDetector
from captioner.schema import Reject, build_table, decoded_schema
from captioner.storage.stop_file import StopFile

__all__ = ["DecodeWorker"]

log = logging.getLogger("captioner")


class ImageSource(Protocol):
    """What gives the bytes of images, as a `Fetcher` does."""

    def fetch(self, uris: Sequence[str]) -> list[bytes | Reject]:
        """Return the bytes behind each URI, or why there are none."""

    def stream_rows(self, rows: pa.Table) -> Iterator[list[tuple[int, bytes | Reject]]]:
        """Yield the bytes of rows of `source_schema` with their indices, a few at a time as they arrive."""


class DecodeWorker:
    """Fetches and decodes on CPUs. `preprocessing` is CLIP's own preprocessor config; `kept` the user's columns.

    source: gives the bytes of rows, by default those at their URIs. keeps_pixels: else rows only say what was decoded.
    stop: once it is written, rows that were read are left to the next run. An image whose decoding takes more than
    `slow_s` is named in the worker's log, so that outliers can be asked for.
    """

    def __init__(
        self,
        config: CaptionJobConfig,
        preprocessing: Mapping[str, Any],
        kept: Sequence[pa.Field] = (),
        stop: StopFile | None = None,
        *,
        source: ImageSource | None = None,
        keeps_pixels: bool = True,
        slow_s: float = 1.0,
    ) -> None:
        self._stop = stop
        self._slow_s = slow_s
        self._keeps_pixels = keeps_pixels
        self._source = source or Fetcher(config.input_path, config.input, config.image)
        witnesses = Witnesses(config)
        self._outages = OutageDetector(
            config.input_path, lambda uri: self._source.fetch([uri])[0], witnesses.path_of, witnesses.earlier
        )
        self._blocks = PixelBlocks()
        self._decoder = Decoder(Preprocessing.from_config(preprocessing), config.image)
        read = self._decoder.preprocessing
        self._schema = decoded_schema(read.size, kept, in_tiles=bool(read.resolutions))

    def __call__(self, rows: pa.Table) -> pa.Table:
        """Return rows of `schema.decoded_schema` for rows of `schema.source_schema`. Never raises for an image.

        Raises JobError when a store is out of reach (see `inputs.outages`).
        """
        if self._stop and self._stop.exists():
            rows = rows.slice(0, 0)
        pixels = _PixelColumn(self._schema.field("pixels").type, rows.num_rows, self._blocks)
        outcomes, sizes = self._outcomes(rows, pixels)
        made = {
            "reason": [_if_reject(outcome, "reason") for outcome in outcomes],
            "detail": [_if_reject(outcome, "detail") for outcome in outcomes],
            "pixels": pixels.array(outcomes),
            "width": [_if_decoded(outcome, "width") for outcome in outcomes],
            "height": [_if_decoded(outcome, "height") for outcome in outcomes],
            "size_bytes": sizes,
            "decode_ms": [outcome.decode_s * 1000 if isinstance(outcome, Decoded) else None for outcome in outcomes],
        }
        table = build_table(self._schema, rows, made)
        return table if self._keeps_pixels else table.drop_columns("pixels")

    def _outcomes(self, rows: pa.Table, pixels: "_PixelColumn") -> tuple[list[Decoded | Reject], list[int | None]]:
        """Return each image decoded or rejected, and its size in bytes where it was fetched."""
        found: dict[int, Decoded | Reject] = {}
        sizes: dict[int, int] = {}
        for arrivals in self._source.stream_rows(rows):
            images = {index: source for index, source in arrivals if not isinstance(source, Reject)}
            found.update((index, source) for index, source in arrivals if isinstance(source, Reject))
            decoded = self._decoder.decode_batch(list(images.values()), pixels.places(images))
            found.update(zip(images, decoded, strict=True))
            sizes.update((index, len(data)) for index, data in images.items())
        self._report_slow(rows, found)
        indices = range(rows.num_rows)
        self._outages.record(rows, [found[index] if index not in sizes else None for index in indices])
        return [found[index] for index in indices], [sizes.get(index) for index in indices]

    def _report_slow(self, rows: pa.Table, found: Mapping[int, Decoded | Reject]) -> None:
        """Log the slowest image of these rows, if one took long, and how many did."""
        seconds = {index: outcome.decode_s for index, outcome in found.items() if isinstance(outcome, Decoded)}
        num_slow = sum(decode_s > self._slow_s for decode_s in seconds.values())
        if num_slow:
            slowest = max(seconds, key=lambda index: seconds[index])
            log.info(
                "slow_decode images=%d of=%d slowest=%s decode_ms=%d",
                num_slow,
                len(seconds),
                rows["image_id"][slowest].as_py(),
                seconds[slowest] * 1000,
            )


def _if_reject(outcome: Decoded | Reject, name: str) -> str | None:
    return str(getattr(outcome, name)) if isinstance(outcome, Reject) else None


def _if_decoded(outcome: Decoded | Reject, name: str) -> int | None:
    return getattr(outcome, name) if isinstance(outcome, Decoded) else None


class _PixelColumn:
    """The pixels of a block: fixed-size binary of uint8[3, S, S] each, or lists of it, null where there are none.

    Squares are decoded into it: each copy of them would cost more than fetching the image does."""

    def __init__(self, kind: pa.DataType, num_rows: int, blocks: PixelBlocks) -> None:
        self._kind = kind
        self._block = None if pa.types.is_list(kind) else blocks.lend(num_rows, kind.byte_width)

    def places(self, indices: Iterable[int]) -> Places | None:
        """Return where the pixels of these rows belong; None for tiles, which are as many as their image wants."""
        return Places(self._block, list(indices)) if self._block else None

    def array(self, outcomes: Sequence[Decoded | Reject]) -> pa.Array:
        """Return the column. outcomes: of all rows; squares were decoded into their places."""
        if pa.types.is_list(self._kind):
            return _tile_array(outcomes, self._kind)
        if not self._block:  # its lender had none left: whoever calls keeps many tables
            each = [outcome.pixels.tobytes() if isinstance(outcome, Decoded) else None for outcome in outcomes]
            return pa.array(each, self._kind)
        is_image = np.array([isinstance(outcome, Decoded) for outcome in outcomes], bool)
        self._block.rows[~is_image] = 0
        validity = pa.py_buffer(np.packbits(is_image, bitorder="little").tobytes())
        return pa.Array.from_buffers(self._kind, len(outcomes), [validity, pa.py_buffer(self._block.rows)])


def _tile_array(outcomes: Sequence[Decoded | Reject], kind: pa.ListType) -> pa.Array:
    """Return lists of fixed-size binary of uint8[3, S, S] each, null where there is none."""
    tiles = [outcome.pixels for outcome in outcomes if isinstance(outcome, Decoded)]
    counts = [len(outcome.pixels) if isinstance(outcome, Decoded) else 0 for outcome in outcomes]
    pixels = np.concatenate(tiles) if tiles else np.empty(0, np.uint8)  # one copy of every pixel
    values = pa.Array.from_buffers(kind.value_type, sum(counts), [None, pa.py_buffer(pixels)])
    ends = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    is_reject = pa.array([not isinstance(outcome, Decoded) for outcome in outcomes], pa.bool_())
    return pa.ListArray.from_arrays(pa.array(ends), values, type=kind, mask=is_reject)
