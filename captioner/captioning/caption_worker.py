"""The model worker of a caption job: decoded rows in, captioned rows out. A plain class, tested without Ray.

Rows in = rows out, in order; a row that failed earlier passes through. Several threads may call one worker at once.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from types import MappingProxyType
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import torch

from captioner.caption_columns import CAPTION_COLUMNS, Caption
from captioner.captioning.answer_values import answer_values, caption_details
from captioner.captioning.captioner import Captioner
from captioner.captioning.job_prompts import answers_of
from captioner.captioning.model_clock import ModelClock
from captioner.captioning.questions import Answer
from captioner.captioning.telemetry import NullRecorder, Recorder, decode_label
from captioner.config import CaptionJobConfig
from captioner.model.image_encoder import pixel_tensor
from captioner.prompts import CAPTION, Prompt
from captioner.schema import ASKED, build_table, captioned_schema
from captioner.storage.stop_file import StopFile

__all__ = ["CaptionWorker", "limit_gpu_memory"]


class CaptionWorker:
    """Captions on one device. `kept` are the user's columns, `num_threads` the CPU threads that torch may use.

    prompts: what is asked of each image by name, or by what the column ASKED says of its row; without any, the model's
    own prompt.
    stop: once it is written, rows that come while the model is busy are left to the next run.
    """

    def __init__(
        self,
        config: CaptionJobConfig,
        kept: Sequence[pa.Field] = (),
        num_threads: int | None = None,
        recorder: Recorder | None = None,
        stop: StopFile | None = None,
        prompts: Sequence[Prompt] = (),
    ) -> None:
        self._stop, self._prompts, self._decoding = stop, prompts, config.decoding
        self._kept_as = {old: new for new, old in config.input.kept_columns.items()}
        if num_threads:
            torch.set_num_threads(num_threads)
        limit_gpu_memory(config.resources.gpus_per_worker)
        self._schema = captioned_schema(kept, answers_of(config.decoding, prompts))
        self._captioner = Captioner.from_bundle(
            config.model,
            config.decoding,
            scoring=config.scoring,
            slots=config.resources.slots,
            prompts=prompts,
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
        outcomes: Iterator[_Outcome] = iter(())
        if images.num_rows:
            with self._monitor, self._clock.busy():
                outcomes = iter(self._outcomes(images))
        of_rows = [next(outcomes) if wanted else None for wanted in is_image.to_pylist()]
        found = [outcome and outcome.caption for outcome in of_rows]
        made: dict[str, Any] = {
            column.name: [caption and column.value(caption) for caption in found] for column in CAPTION_COLUMNS
        }
        made["candidates"] = [caption and _candidates(caption) for caption in found]
        if self._prompts:
            made |= answer_values(self._prompts, [outcome.answers if outcome else {} for outcome in of_rows])
        else:
            made |= caption_details(self._decoding, found)
        made["model_clock"] = pa.repeat(
            pa.scalar(asdict(self._clock.read()), self._schema.field("model_clock").type), rows.num_rows
        )
        self._count(rows, of_rows)
        return build_table(self._schema, rows, made)

    def _outcomes(self, images: pa.Table) -> "list[_Outcome]":
        """Return what each image gets: a caption, and with prompts an answer to each."""
        pixels = pixel_tensor(images.column("pixels"), self._captioner.model.image_size)
        ids = images.column("image_id").to_pylist()
        if not self._prompts:
            return [_Outcome(one) for one in self._captioner.caption_pixels(pixels, ids, _sizes(images))]
        names = [prompt.name for prompt in self._prompts]
        asked = images.column(ASKED.name).to_pylist() if ASKED.name in images.column_names else [names] * len(ids)
        answers = self._captioner.answer_pixels(pixels, ids, _sizes(images), self._values(images), asked)
        named = [
            dict(zip([name for name in names if name in of_names], of_image, strict=True))
            for of_names, of_image in zip(asked, answers, strict=True)
        ]
        return [_Outcome(one[CAPTION].caption if CAPTION in one else None, one) for one in named]

    def _values(self, images: pa.Table) -> list[dict[str, object]]:
        """Return the values of the columns that prompts name, by their names in the input."""
        names = sorted(frozenset().union(*(prompt.columns for prompt in self._prompts)))
        columns = [images.column(self._kept_as[name]).to_pylist() for name in names]
        return [dict(zip(names, values, strict=True)) for values in zip(*columns, strict=True)] or [{}] * len(images)

    def _count(self, rows: pa.Table, outcomes: "Sequence[_Outcome | None]") -> None:
        captioned = [outcome for outcome in outcomes if outcome]
        if captioned:
            self._recorder.count("captioner_images", len(captioned))
            self._recorder.count("captioner_tokens", sum(outcome.num_tokens for outcome in captioned))
        self._num_failed += len(outcomes) - len(captioned)
        for reason, number in Counter(filter(None, rows.column("reason").to_pylist())).items():
            self._recorder.count("captioner_failures", number, reason=reason)
        times = rows.column("decode_ms").drop_null().to_pylist()
        for label, number in Counter(map(decode_label, times)).items():
            self._recorder.count("captioner_decoded", number, up_to_ms=label)


class _Outcome(NamedTuple):
    """What an image gets."""

    caption: Caption | None
    """None where it was asked other prompts alone."""

    answers: Mapping[str, Answer] = MappingProxyType({})
    """To each prompt that it was asked, that of the caption among them; none without prompts."""

    @property
    def num_tokens(self) -> int:
        if self.caption and not self.answers:
            return self.caption.num_tokens
        return sum(answer.caption.num_tokens for answer in self.answers.values())


def _sizes(images: pa.Table) -> list[tuple[int, int]]:
    return list(zip(images.column("width").to_pylist(), images.column("height").to_pylist(), strict=True))


def limit_gpu_memory(gpus_per_worker: float | None) -> None:
    """Keep this process to its share of the GPU's memory where several workers share one."""
    if gpus_per_worker and gpus_per_worker < 1 and torch.cuda.is_available():
        torch.cuda.set_per_process_memory_fraction(gpus_per_worker)


def _candidates(caption: Caption) -> list[dict[str, Any]] | None:
    return [{column.name: column.value(one) for column in CAPTION_COLUMNS} for one in caption.candidates] or None
