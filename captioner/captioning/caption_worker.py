"""The model worker of a caption job: decoded rows in, captioned rows out. A plain class, tested without Ray.

Rows in = rows out, in order; a row that failed earlier passes through. Several threads may call one worker at once.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import torch

from captioner.caption_columns import CAPTION_COLUMNS, Caption
from captioner.captioning.captioner import Captioner
from captioner.captioning.model_clock import ModelClock
from captioner.captioning.telemetry import NullRecorder, Recorder, decode_label
from captioner.config import CaptionJobConfig
from captioner.model.image_encoder import pixel_tensor
from captioner.schema import build_table, captioned_schema
from captioner.storage.stop_file import StopFile

__all__ = ["CaptionWorker", "limit_gpu_memory"]


class CaptionWorker:
    """Captions on one device. `kept` are the user's columns, `num_threads` the CPU threads that torch may use.

    stop: once it is written, rows that come while the model is busy are left to the next run.
    """

    def __init__(
        self,
        config: CaptionJobConfig,
        kept: Sequence[pa.Field] = (),
        num_threads: int | None = None,
        recorder: Recorder | None = None,
        stop: StopFile | None = None,
    ) -> None:
        self._stop = stop
        if num_threads:
            torch.set_num_threads(num_threads)
        limit_gpu_memory(config.resources.gpus_per_worker)
        self._schema = captioned_schema(kept)
        self._captioner = Captioner.from_bundle(
            config.model,
            config.decoding,
            scoring=config.scoring,
            slots=config.resources.slots,
            storage_options=config.model.model_storage_options,
        )
        self._clock = ModelClock()  # starts once the model is ready
        self._recorder = recorder or NullRecorder()
        self._recorder.gauge("captioner_slots", self._captioner.num_slots)
        self._num_failed = 0
        self._monitor = self._captioner.monitor(self._recorder, lambda: self._num_failed)

    @property
    def captioner(self) -> Captioner:
        """Its captioner, so that an estimate can time each step."""
        return self._captioner

    def __call__(self, rows: pa.Table) -> pa.Table:
        """Return rows of `schema.captioned_schema` for rows of `schema.decoded_schema`, without the pixels.

        Raises EngineError when the engine has stopped.
        """
        if self._stop and self._clock.is_busy and self._stop.exists():
            rows = rows.slice(0, 0)
        is_image = pc.is_null(rows.column("reason"))
        images = rows if pc.all(is_image).as_py() else rows.filter(is_image)  # copies every pixel
        captions: Iterator[Caption] = iter(())
        if images.num_rows:
            pixels = pixel_tensor(images.column("pixels"), self._captioner.model.image_size)
            with self._monitor, self._clock.busy():
                captions = iter(
                    self._captioner.caption_pixels(pixels, images.column("image_id").to_pylist(), _sizes(images))
                )
        found = [next(captions) if wanted else None for wanted in is_image.to_pylist()]
        made: dict[str, Any] = {
            column.name: [caption and column.value(caption) for caption in found] for column in CAPTION_COLUMNS
        }
        made["candidates"] = [caption and _candidates(caption) for caption in found]
        made["model_clock"] = pa.repeat(
            pa.scalar(asdict(self._clock.read()), self._schema.field("model_clock").type), rows.num_rows
        )
        self._count(rows, found)
        return build_table(self._schema, rows, made)

    def _count(self, rows: pa.Table, found: Sequence[Caption | None]) -> None:
        captions = [caption for caption in found if caption]
        if captions:
            self._recorder.count("captioner_images", len(captions))
            self._recorder.count("captioner_tokens", sum(caption.num_tokens for caption in captions))
        self._num_failed += len(found) - len(captions)
        for reason, number in Counter(filter(None, rows.column("reason").to_pylist())).items():
            self._recorder.count("captioner_failures", number, reason=reason)
        times = rows.column("decode_ms").drop_null().to_pylist()
        for label, number in Counter(map(decode_label, times)).items():
            self._recorder.count("captioner_decoded", number, up_to_ms=label)


def _sizes(images: pa.Table) -> list[tuple[int, int]]:
    return list(zip(images.column("width").to_pylist(), images.column("height").to_pylist(), strict=True))


def limit_gpu_memory(gpus_per_worker: float | None) -> None:
    """Keep this process to its share of the GPU's memory where several workers share one."""
    if gpus_per_worker and gpus_per_worker < 1 and torch.cuda.is_available():
        torch.cuda.set_per_process_memory_fraction(gpus_per_worker)


def _candidates(caption: Caption) -> list[dict[str, Any]] | None:
    return [{column.name: column.value(one) for column in CAPTION_COLUMNS} for one in caption.candidates] or None
