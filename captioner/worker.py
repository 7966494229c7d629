"""The two workers of a caption job, and the captioner that a notebook uses; plain classes, tested without Ray.

    DecodeWorker    source rows -> decoded rows: fetches and decodes on CPUs
    CaptionWorker   decoded rows -> captioned rows: CLIP, projector and LLaMA on one device
    Captioner       images -> captions, in this process

Rows in = rows out, in order; a row that failed earlier passes through. All calls may come from several threads at once:
those of one CaptionWorker share one decoding engine, so that its slots stay full across batches.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from PIL import Image

from captioner.config import CaptionJobConfig, DecodingConfig, ImageConfig, ModelConfig
from captioner.decoding import Dispatcher, Generation, Request
from captioner.images import Decoded, Decoder, Preprocessing
from captioner.model.bundle import load
from captioner.model.caption_model import CaptionModel
from captioner.rows import Reject, RejectReason, captioned_schema, decoded_schema
from captioner.sources import Fetcher

__all__ = ["Caption", "CaptionWorker", "Captioner", "DecodeWorker", "image_seed"]

ImageLike = Image.Image | bytes | str | Path
_ENCODE_ROWS = {"cpu": 8, "cuda": 64}  # always as many, so that no image depends on how many came with it


@dataclass(frozen=True, kw_only=True)
class Caption:
    """One caption with its scores; `candidates` are all captions of the image, best first, if several were asked for."""

    caption: str
    num_tokens: int
    finish_reason: str
    mean_logprob: float
    min_logprob: float
    candidates: tuple["Caption", ...] = ()

    def __str__(self) -> str:
        return self.caption


class Captioner:
    """Captions images in this process.

    captioner = Captioner.from_bundle("demo")
    for caption in captioner.caption(["one.jpg", "two.png"]):
        print(caption)
    """

    def __init__(
        self,
        model: CaptionModel,
        decoding: DecodingConfig | None = None,
        image: ImageConfig | None = None,
        slots: str = "auto",
    ) -> None:
        self.model = model
        self.decoding = decoding or DecodingConfig()
        self._decoder = Decoder(Preprocessing.from_config(model.preprocessing), image or ImageConfig())
        self._encode_rows = _ENCODE_ROWS.get(model.device.type, 8)
        self._dispatcher = _dispatcher(model, self.decoding, slots)

    @classmethod
    def from_bundle(
        cls,
        model: str | ModelConfig = "demo",
        decoding: DecodingConfig | None = None,
        *,
        image: ImageConfig | None = None,
        slots: str = "auto",
        storage_options: Mapping[str, Any] | None = None,
    ) -> "Captioner":
        """Return a captioner of a bundle or LLaVA checkpoint. Raises BundleError for what cannot be loaded."""
        config = ModelConfig(model=model) if isinstance(model, str) else model
        loaded = load(
            config.model,
            dtype=config.dtype,
            device=config.device,
            storage_options=storage_options,
            prompt=config.prompt,
        )
        return cls(loaded, decoding, image, slots)

    def caption(self, images: Sequence[ImageLike], image_ids: Sequence[str] | None = None) -> list[Caption | Reject]:
        """Return a caption for each image - PIL, bytes or path - or why it has none.

        image_ids: what the draws of a sampled caption depend on besides the seed; by default the place in `images`.
        """
        ids = [str(index) for index in range(len(images))] if image_ids is None else image_ids
        outcomes: list[Any] = [self._pixels(image) for image in images]
        readable = [index for index, outcome in enumerate(outcomes) if isinstance(outcome, Decoded)]
        if readable:
            pixels = np.stack([outcomes[index].pixels for index in readable])
            captions = self.caption_pixels(torch.from_numpy(pixels), [ids[index] for index in readable])
            for index, caption in zip(readable, captions, strict=True):
                outcomes[index] = caption
        return outcomes

    def _pixels(self, image: ImageLike) -> Decoded | Reject:
        if isinstance(image, Image.Image):
            return self._decoder.decode_image(image)
        return self._decoder.decode(image if isinstance(image, bytes) else Path(image).read_bytes())

    def caption_pixels(self, pixels: torch.Tensor, image_ids: Sequence[str]) -> list[Caption]:
        """Return the captions of uint8[B, 3, S, S], in order. Raises EngineError when the engine has stopped."""
        tickets = []
        for start in range(0, len(pixels), self._encode_rows):
            ids = image_ids[start : start + self._encode_rows]
            embeds = self._encode(pixels[start : start + self._encode_rows])
            seeds = [image_seed(self.decoding.seed, image_id) for image_id in ids]
            requests = [Request(id=row, prefix=embeds[row], seed=seed) for row, seed in enumerate(seeds)]
            tickets.append(self._dispatcher.submit(requests))  # LLaMA writes these while CLIP looks at the next
        return [self._caption(found) for ticket in tickets for found in ticket.result()]

    def _encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return float[B, P, D]; CLIP always sees the same number of images, the missing ones black."""
        missing = self._encode_rows - len(pixels)
        padded = torch.cat([pixels, pixels.new_zeros(missing, *pixels.shape[1:])]) if missing else pixels
        return self.model.request_embeddings(self.model.encode(padded))[: len(pixels)]

    def _caption(self, found: Sequence[Generation]) -> Caption:
        candidates = tuple(self._one(generation) for generation in found)
        best = candidates[0]
        return Caption(**{**vars(best), "candidates": candidates if len(candidates) > 1 else ()})

    def _one(self, generation: Generation) -> Caption:
        text = self.model.text(list(generation.token_ids))
        return Caption(
            caption=_before_stop(text, self.decoding.stop),
            num_tokens=len(generation.token_ids),
            finish_reason=generation.finish_reason,
            mean_logprob=generation.mean_logprob,
            min_logprob=generation.min_logprob,
        )

    def close(self) -> None:
        """End the engine's thread; calls that wait fail with EngineError."""
        self._dispatcher.close()


def image_seed(seed: int, image_id: str) -> int:
    """Return the int64 seed of an image's draws: the same wherever and whenever it is captioned."""
    digest = hashlib.blake2b(f"{seed}:{image_id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


class DecodeWorker:
    """Fetches and decodes on CPUs. `preprocessing` is CLIP's own preprocessor config; `kept` the user's columns."""

    def __init__(
        self, config: CaptionJobConfig, preprocessing: Mapping[str, Any], kept: Sequence[pa.Field] = ()
    ) -> None:
        self._fetcher = Fetcher(config.input_path, config.input, config.image)
        self._decoder = Decoder(Preprocessing.from_config(preprocessing), config.image)
        self._schema = decoded_schema(self._decoder.preprocessing.size, kept)

    def __call__(self, rows: pa.Table) -> pa.Table:
        """Return rows of `rows.decoded_schema` for rows of `rows.source_schema`. Never raises for an image."""
        sources = self._sources(rows)
        outcomes = [source if isinstance(source, Reject) else self._decoder.decode(source) for source in sources]
        sizes = [None if isinstance(source, Reject) else len(source) for source in sources]
        made = {
            "reason": [_if_reject(outcome, "reason") for outcome in outcomes],
            "detail": [_if_reject(outcome, "detail") for outcome in outcomes],
            "pixels": _pixel_array(outcomes, self._schema.field("pixels").type),
            "width": [_if_decoded(outcome, "width") for outcome in outcomes],
            "height": [_if_decoded(outcome, "height") for outcome in outcomes],
            "size_bytes": sizes,
        }
        return _table(self._schema, rows, made)

    def _sources(self, rows: pa.Table) -> list[bytes | Reject]:
        """Return each row's bytes, fetched if it has only a URI, or why there are none."""
        uris = rows.column("uri").to_pylist()
        fetched = iter(self._fetcher.fetch([uri for uri in uris if uri is not None]))
        columns = (rows.column(name) for name in ("data", "reason", "detail"))
        found: list[bytes | Reject] = []
        for uri, data, reason, detail in zip(uris, *columns, strict=True):
            if reason.is_valid:
                found.append(Reject(RejectReason(reason.as_py()), detail.as_py()))
            else:
                found.append(data.as_py() if uri is None else next(fetched))
        return found


class CaptionWorker:
    """Captions on one device. `kept` are the user's columns, `num_threads` the CPU threads that torch may use."""

    def __init__(self, config: CaptionJobConfig, kept: Sequence[pa.Field] = (), num_threads: int | None = None) -> None:
        if num_threads:
            torch.set_num_threads(num_threads)
        self._captioner = Captioner.from_bundle(
            config.model,
            config.decoding,
            slots=config.resources.slots,
            storage_options=config.input.storage_options,
        )
        self._schema = captioned_schema(kept)

    def __call__(self, rows: pa.Table) -> pa.Table:
        """Return rows of `rows.captioned_schema` for rows of `rows.decoded_schema`; the pixels stay behind."""
        is_image = pc.is_null(rows.column("reason"))
        images = rows.filter(is_image)
        captions: Iterator[Caption] = iter(())
        if images.num_rows:
            pixels = _pixel_tensor(images.column("pixels"), self._captioner.model.image_size)
            captions = iter(self._captioner.caption_pixels(pixels, images.column("image_id").to_pylist()))
        found = [next(captions) if wanted else None for wanted in is_image.to_pylist()]
        names = ("caption", "num_tokens", "finish_reason", "mean_logprob", "min_logprob")
        made = {name: [caption and getattr(caption, name) for caption in found] for name in names}
        made["candidates"] = [caption and _candidates(caption, names) for caption in found]
        return _table(self._schema, rows, made)


def _candidates(caption: Caption, names: Sequence[str]) -> list[dict[str, Any]] | None:
    return [{name: getattr(one, name) for name in names} for one in caption.candidates] or None


def _table(schema: pa.Schema, rows: pa.Table, made: Mapping[str, Any]) -> pa.Table:
    """Return a table of `schema`: the columns that were made, the others as they came."""
    return pa.table([_column(made.get(field.name), rows, field) for field in schema], schema)


def _column(values: Any, rows: pa.Table, field: pa.Field) -> Any:
    if values is None:
        return rows.column(field.name)
    return values if isinstance(values, pa.Array) else pa.array(values, field.type)


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


def _pixel_tensor(column: pa.ChunkedArray, size: int) -> torch.Tensor:
    """Return uint8[B, 3, size, size] from fixed-size binary without nulls."""
    array = column.combine_chunks()
    width = array.type.byte_width
    pixels = np.frombuffer(array.buffers()[1], np.uint8, count=len(array) * width, offset=array.offset * width)
    return torch.from_numpy(pixels.reshape(-1, 3, size, size).copy())
