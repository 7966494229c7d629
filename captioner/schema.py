"""The vocabulary: which columns an image has at every step, and why it may have no caption.

Knows Arrow schemas and nothing else. One image is one row all the way through:

    SOURCE     read from a unit          key, image_id, uri | data, attempt
    DECODED    after the CPU worker      pixels uint8[3, S, S] or a list of tiles, width, height, size_bytes
    CAPTIONED  after the model           caption and the other `CAPTION_COLUMNS`, candidates
    CAPTIONS / FAILURES                  the two tables on disk

A row that failed carries `reason` and `detail` from the step where it failed to the end: rows in = rows out. The
columns that a user keeps (`--keep-columns`) travel after the named ones, behind those of named prompts (`--prompts`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import pyarrow as pa

from captioner.caption_columns import CAPTION_COLUMNS

__all__ = [
    "ASKED",
    "CAPTIONS",
    "FAILURES",
    "MAX_UNIT_ROWS",
    "SCORES",
    "SOURCE",
    "TRANSIENT_REASONS",
    "FinishReason",
    "Reject",
    "RejectReason",
    "added_schema",
    "build_table",
    "captioned_schema",
    "captions_schema",
    "decoded_schema",
    "row_key",
    "source_schema",
    "split_key",
]

_POSITION_BITS = 32
MAX_UNIT_ROWS = 1 << _POSITION_BITS


class RejectReason(StrEnum):
    """Why an image has no caption. The value is what stands in `failures.reason`."""

    MISSING = "missing"  # the store says there is no such object
    FORBIDDEN = "forbidden"  # the store refuses these credentials
    FETCH_FAILED = "fetch_failed"  # the store did not deliver, after every retry
    UNREACHABLE = "unreachable"  # no such host, an invalid certificate, a request that its server refuses for good
    CHANGED = "changed"  # its tar or Parquet file is not the one that was frozen
    UNSAFE_URI = "unsafe_uri"  # a URI that a list may not point to: local files in a remote list, link-local hosts
    EMPTY = "empty"  # a null, or zero bytes
    NOT_AN_IMAGE = "not_an_image"  # bytes that no decoder recognises
    UNSUPPORTED = "unsupported"  # a known format in a variant that the decoder lacks
    CORRUPT = "corrupt"  # recognised, but cannot be read to its end
    TOO_LARGE = "too_large"  # more bytes than --max-image-bytes
    TOO_MANY_PIXELS = "too_many_pixels"  # more pixels than --max-image-pixels
    OUT_OF_MEMORY = "out_of_memory"  # needs more memory than its decoder may take, or than the machine had
    DECODE_TIMEOUT = "decode_timeout"  # took longer than --decode-timeout-s


@dataclass(frozen=True)
class Reject:
    """Takes the place of an image that failed: a reason from the list, and what exactly was seen.

    It has no text form, so that none ends among captions; its `repr` shows what it is."""

    reason: RejectReason
    detail: str

    def __str__(self) -> str:
        raise TypeError(
            f"this image has no caption ({self.reason}: {self.detail}); ask isinstance(found, captioner.Reject) first,"
            " or take found.reason"
        )


TRANSIENT_REASONS = frozenset(
    {
        RejectReason.FORBIDDEN,  # credentials are the run's, not the image's
        RejectReason.FETCH_FAILED,
        RejectReason.CHANGED,  # the file may be put back
        RejectReason.OUT_OF_MEMORY,
        RejectReason.DECODE_TIMEOUT,
    }
)
"""Reasons that another attempt may not meet; every other one is a property of the image."""


class FinishReason(StrEnum):
    """Why a caption ended, in the words of the field's inference servers."""

    STOP = "stop"  # the model wrote its end token, or a stop string
    LENGTH = "length"  # --max-new-tokens was reached


def row_key(unit: int, position: int) -> int:
    """Return the int64 that identifies a row in every run: `unit << 32 | position`."""
    assert 0 <= position < MAX_UNIT_ROWS, position
    return unit << _POSITION_BITS | position


def split_key(key: int) -> tuple[int, int]:
    """Return `(unit ordinal, position in the unit)` of a row key."""
    return key >> _POSITION_BITS, key & (MAX_UNIT_ROWS - 1)


_IDENTITY = [pa.field("key", pa.int64(), nullable=False), pa.field("image_id", pa.string(), nullable=False)]
_ATTEMPT = pa.field("attempt", pa.int32(), nullable=False)
_REJECT = [pa.field("reason", pa.string()), pa.field("detail", pa.string())]
_SIZE = [pa.field("width", pa.int32()), pa.field("height", pa.int32()), pa.field("size_bytes", pa.int64())]
_CLOCK = pa.field(  # reading of the model worker's clock when the row left it; see `captioner.tables.clock_readings`
    "model_clock",
    pa.struct(
        [("worker", pa.string()), ("waited_s", pa.float64()), ("ready_s", pa.float64()), ("first_at", pa.float64())]
    ),
)
_RUN = pa.field("run_id", pa.string(), nullable=False)
ASKED = pa.field("captioner.asked", pa.list_(pa.string()), nullable=False)
"""The names of the prompts that a row is asked. It travels with the kept columns, in jobs whose rows differ in it."""

_DECODE_MS = pa.field("decode_ms", pa.float32())


def _required(fields: Sequence[pa.Field]) -> list[pa.Field]:
    return [field.with_nullable(False) for field in fields]


def _caption(*, on_disk: bool) -> list[pa.Field]:
    """Return the columns of a caption; those of a reject, which stands in no part, are null."""
    return [pa.field(column.name, column.type, column.nullable or not on_disk) for column in CAPTION_COLUMNS]


def _candidates() -> pa.Field:
    item = pa.field("item", pa.struct(_caption(on_disk=True)), nullable=False)
    return pa.field("candidates", pa.list_(item))


def source_schema(kept: Sequence[pa.Field] = ()) -> pa.Schema:
    """Return the columns of a row as read: exactly one of `uri`, `data` and `reason` is set.

    `attempt` is 1 for an image that was never tried. `kept` are the user's own columns, already renamed.
    """
    source = [pa.field("uri", pa.string()), pa.field("data", pa.large_binary())]
    return pa.schema([*_IDENTITY, _ATTEMPT, *_REJECT, *source, *kept])


def decoded_schema(image_size: int, kept: Sequence[pa.Field] = (), *, in_tiles: bool = False) -> pa.Schema:
    """Return the columns after decoding: `pixels` holds uint8[3, image_size, image_size], null when rejected.

    in_tiles: a list of as many of them as the image has tiles. `decode_ms` goes no further than the metrics."""
    square = pa.binary(3 * image_size * image_size)
    kind = pa.list_(pa.field("tile", square, nullable=False)) if in_tiles else square
    return pa.schema([*_IDENTITY, _ATTEMPT, *_REJECT, pa.field("pixels", kind), *_SIZE, _DECODE_MS, *kept])


def captioned_schema(kept: Sequence[pa.Field] = (), answers: Sequence[pa.Field] = ()) -> pa.Schema:
    """Return the columns after the model: `caption` and its scores, null when rejected. answers: of named prompts.

    `candidates` lists every caption of the image with the same columns, best first, when more than one was asked for;
    null otherwise. `clip_score` is null unless it was asked for. `model_clock` goes no further than the summary.
    """
    written = [*_caption(on_disk=False), _candidates(), *(field.with_nullable(True) for field in answers)]
    return pa.schema([*_IDENTITY, _ATTEMPT, *_REJECT, *written, *_SIZE, _CLOCK, *kept])


def captions_schema(kept: Sequence[pa.Field] = (), answers: Sequence[pa.Field] = ()) -> pa.Schema:
    """Return the columns of `captions/part-*.parquet`: `answers` and `kept` between the fixed ones and `run_id`."""
    return pa.schema([*_IDENTITY, *_caption(on_disk=True), *_required(_SIZE), _candidates(), *answers, *kept, _RUN])


def added_schema(answers: Sequence[pa.Field]) -> pa.Schema:
    """Return the columns of the parts of a prompt that was added later: `answers`, by key."""
    return pa.schema([*_IDENTITY, *answers, _RUN])


def build_table(schema: pa.Schema, rows: pa.Table, made: Mapping[str, Any]) -> pa.Table:
    """Return a table of `schema`: the columns in `made`, as lists or Arrow arrays, and the others from `rows`."""
    return pa.table([_column(made.get(field.name), rows, field) for field in schema], schema)


def _column(values: Any, rows: pa.Table, field: pa.Field) -> Any:
    if values is None:
        return rows.column(field.name)
    return values if isinstance(values, pa.Array) else pa.array(values, field.type)


SOURCE = source_schema()
CAPTIONS = captions_schema()
FAILURES = pa.schema([*_IDENTITY, *_required(_REJECT), _ATTEMPT, _RUN])

SCORES = tuple(name for _, name in sorted((c.score_rank, c.name) for c in CAPTION_COLUMNS if c.score_rank is not None))
"""Columns of CAPTIONS that say how good a caption is, the most telling first."""
