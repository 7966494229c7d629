"""The model worker of a caption job, and the captioner that a notebook uses; plain classes, tested without Ray.

    CaptionWorker   decoded rows -> captioned rows: CLIP, projector and LLaMA on one device
    Captioner       images -> captions, in this process

Rows in = rows out, in order; a row that failed earlier passes through. All calls may come from several threads at once:
those of one CaptionWorker share one decoding engine, so that its slots stay full across batches.
"""

import hashlib
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from PIL import Image

from captioner.config import CaptionJobConfig, DecodingConfig, ImageConfig, ModelConfig, ScoringConfig
from captioner.decoding import Engine, EngineThread, Generation, Hypothesis, Request
from captioner.errors import InputError
from captioner.images import Decoded, Decoder, Preprocessing
from captioner.metrics import clip_scores
from captioner.model.bundle import load
from captioner.model.caption_model import CaptionModel
from captioner.model.image_encoder import ImageEncoder
from captioner.model.recording import recorder_for
from captioner.repetition import is_repetitive
from captioner.rows import Reject, RejectReason, build_table, captioned_schema
from captioner.stopping import StopFile
from captioner.telemetry import Pulse, Recorder, Silent
from captioner.waiting import ModelClock

__all__ = ["ENCODE_ROWS", "Caption", "CaptionWorker", "Captioner", "image_seed", "pixel_tensor"]

ImageLike = Image.Image | bytes | str | Path
ENCODE_ROWS = {"cpu": 8, "cuda": 64}  # always as many, so that no image depends on how many came with it


@dataclass(frozen=True, kw_only=True)
class Caption:
    """One caption with its scores; `candidates` are all captions of the image, best first, if several were wanted.

    clip_score: 0 to 2.5, None unless asked for. is_repetitive: see `captioner.repetition`."""

    caption: str
    num_tokens: int
    finish_reason: str
    mean_logprob: float
    min_logprob: float
    clip_score: float | None = None
    is_repetitive: bool = False
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
        scoring: ScoringConfig | None = None,
        slots: str = "auto",
    ) -> None:
        self.model = model
        self.decoding = decoding or DecodingConfig()
        self.scoring = scoring or ScoringConfig()
        self._decoder = Decoder(Preprocessing.from_config(model.preprocessing), image or ImageConfig())
        self.encoder = ImageEncoder(  # before the engine, which takes what memory is left
            model,
            num_rows=ENCODE_ROWS.get(model.device.type, 8),
            is_scored=self.scoring.needs_text_tower,
            recorder=recorder_for(model.device),
        )
        engine = _engine(model, self.decoding, slots)
        self.num_slots = engine.num_slots
        self._engine = EngineThread(engine)
        self._turn = threading.Lock()

    @classmethod
    def from_bundle(
        cls,
        model: str | ModelConfig = "demo",
        decoding: DecodingConfig | None = None,
        *,
        image: ImageConfig | None = None,
        scoring: ScoringConfig | None = None,
        slots: str = "auto",
        storage_options: dict[str, object] | None = None,
    ) -> "Captioner":
        """Return a captioner of a bundle or LLaVA checkpoint.

        Raises BundleError for what cannot be loaded, a CLIP without the text tower that scoring needs among it."""
        config = ModelConfig(model=model) if isinstance(model, str) else model
        loaded = load(
            config.model,
            dtype=config.dtype,
            device=config.device,
            storage_options=storage_options,
            prompt=config.prompt,
            with_text_tower=scoring is not None and scoring.needs_text_tower,
        )
        return cls(loaded, decoding, image, scoring, slots)

    def caption(self, images: Sequence[ImageLike], image_ids: Sequence[str] | None = None) -> list[Caption | Reject]:
        """Return a caption for each image - PIL, bytes or path - or why it has none.

        image_ids: what the draws of a sampled caption depend on besides the seed; by default the place in `images`.
        """
        if isinstance(images, str | bytes | Path | Image.Image):
            raise InputError(f"images is one {type(images).__name__}; expected a list of images: [image]")
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
        if isinstance(image, bytes):
            return self._decoder.decode(image)
        if not isinstance(image, str | Path):
            raise InputError(f"an image is a {type(image).__name__}; expected a PIL image, bytes or a path")
        try:
            path = Path(image)
            if path.exists() and not path.is_file():  # to open a pipe would wait for ever
                return Reject(RejectReason.MISSING, f"{path} is not a file but a folder, a device or a pipe")
            return self._decoder.decode(path.read_bytes())
        except (OSError, ValueError) as error:  # the last for a name with a null byte
            return Reject(RejectReason.MISSING, f"{type(error).__name__}: {error}")

    def caption_pixels(self, pixels: torch.Tensor, image_ids: Sequence[str]) -> list[Caption]:
        """Return the captions of uint8[B, 3, S, S], in order. Raises EngineError when the engine has stopped."""
        futures: list[Future[Generation]] = []
        seen: list[torch.Tensor] = []
        for start in range(0, len(pixels), self.encoder.num_rows):
            ids = image_ids[start : start + self.encoder.num_rows]
            seeds = [image_seed(self.decoding.seed, image_id) for image_id in ids]
            with self._turn:  # while one call waits for room with its prefixes in hand, no other makes more of them
                embeds, joint = self.encoder(pixels[start : start + self.encoder.num_rows])
                prefixes = zip(ids, embeds, seeds, strict=True)
                requests = [Request(id=image_id, prefix=prefix, seed=seed) for image_id, prefix, seed in prefixes]
                futures += self._engine.submit(requests)  # LLaMA writes these while CLIP looks at the next
            seen.append(joint)
        candidates = [[self._one(hypothesis) for hypothesis in future.result().hypotheses] for future in futures]
        if candidates and self.scoring.needs_text_tower:
            candidates = self._scored(candidates, torch.cat(seen))
        return [_with_candidates(of_image) for of_image in candidates]

    def _scored(self, candidates: list[list[Caption]], images: torch.Tensor) -> list[list[Caption]]:
        """Return the candidates of each image with their CLIPScore, best first by what best is. images: float[B, J]."""
        assert self.model.joint_space is not None
        texts = self.model.joint_space.of_captions([one.caption for of_image in candidates for one in of_image])
        owners = [place for place, of_image in enumerate(candidates) for _ in of_image]
        scores = iter(clip_scores(images[owners].cpu(), texts.cpu()).tolist())
        scored = [[replace(one, clip_score=next(scores)) for one in of_image] for of_image in candidates]
        if self.scoring.rerank == "clip-score":
            for of_image in scored:
                of_image.sort(key=_clip_score, reverse=True)  # equal ones stay in the order of their probability
        return scored

    def _one(self, hypothesis: Hypothesis) -> Caption:
        caption = _before(self.decoding.stop, self.model.text(list(hypothesis.token_ids)))
        return Caption(
            caption=caption,
            is_repetitive=is_repetitive(caption),
            num_tokens=len(hypothesis.token_ids),
            finish_reason=hypothesis.finish_reason,
            mean_logprob=hypothesis.mean_logprob,
            min_logprob=hypothesis.min_logprob,
        )

    def pulse(self, recorder: Recorder) -> Pulse:
        """Return a thread that records, once a second, how busy the engine is."""
        return Pulse(recorder, num_busy=lambda: self._engine.num_busy, idle_s=lambda: self._engine.idle_s)

    def close(self) -> None:
        """End the engine's thread; calls that wait fail with EngineError."""
        self._engine.close()
        self._decoder.close()


def _engine(model: CaptionModel, decoding: DecodingConfig, slots: str) -> Engine:
    prompt = model.prompt_embeddings()

    def is_stopped(token_ids: Sequence[int]) -> bool:
        text = model.text(list(token_ids))
        return any(stop in text for stop in decoding.stop)

    return Engine(
        model.llama,
        decoding=decoding,
        eos_token_ids=model.eos_token_ids,
        shared_prefix=prompt,
        prefix_len=model.num_prompt_tokens - len(prompt),
        slots="auto" if slots == "auto" else int(slots),
        is_stopped=is_stopped if decoding.stop else None,
        recorder=recorder_for(model.device),
    )


def _clip_score(caption: Caption) -> float:
    assert caption.clip_score is not None, caption
    return caption.clip_score


def _with_candidates(candidates: Sequence[Caption]) -> Caption:
    """Return the first of an image's captions, all of them attached where there is more than one."""
    return replace(candidates[0], candidates=tuple(candidates) if len(candidates) > 1 else ())


def _before(stops: Sequence[str], text: str) -> str:
    """Return the text up to the first stop string in it."""
    ends = [found for stop in stops if (found := text.find(stop)) >= 0]
    return text[: min(ends)].rstrip() if ends else text


def image_seed(seed: int, image_id: str) -> int:
    """Return the int64 seed of an image's draws: the same wherever and whenever it is captioned."""
    digest = hashlib.blake2b(f"{seed}:{image_id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


class CaptionWorker:
    """Captions on one device. `kept` are the user's columns, `num_threads` the CPU threads that torch may use.

    stop: says when the job is to end: from then on rows that come while the model is busy are left to the next run.
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
        _keep_to_share(config.resources.gpus_per_worker)
        self._schema = captioned_schema(kept)
        self._captioner = Captioner.from_bundle(
            config.model,
            config.decoding,
            scoring=config.scoring,
            slots=config.resources.slots,
            storage_options=config.input.storage_options,
        )
        self._clock = ModelClock()  # runs from when the model is ready
        self._recorder = recorder or Silent()
        self._recorder.gauge("captioner_slots", self._captioner.num_slots)
        self._pulse = self._captioner.pulse(self._recorder)

    @property
    def captioner(self) -> Captioner:
        """What captions in it, for a rehearsal that times its steps."""
        return self._captioner

    def __call__(self, rows: pa.Table) -> pa.Table:
        """Return rows of `rows.captioned_schema` for rows of `rows.decoded_schema`; the pixels stay behind.

        Raises EngineError when the engine has stopped.
        """
        if self._stop and self._clock.is_busy and self._stop.is_there():
            rows = rows.slice(0, 0)
        is_image = pc.is_null(rows.column("reason"))
        images = rows if pc.all(is_image).as_py() else rows.filter(is_image)  # which copies every pixel
        captions: Iterator[Caption] = iter(())
        if images.num_rows:
            pixels = pixel_tensor(images.column("pixels"), self._captioner.model.image_size)
            with self._pulse, self._clock.busy():
                captions = iter(self._captioner.caption_pixels(pixels, images.column("image_id").to_pylist()))
        found = [next(captions) if wanted else None for wanted in is_image.to_pylist()]
        names = [field.name for field in fields(Caption) if field.name != "candidates"]
        made = {name: [caption and getattr(caption, name) for caption in found] for name in names}
        made["candidates"] = [caption and _candidates(caption, names) for caption in found]
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
        for reason, number in Counter(filter(None, rows.column("reason").to_pylist())).items():
            self._recorder.count("captioner_failures", number, reason=reason)


def _keep_to_share(gpus_per_worker: float | None) -> None:
    """Leave the others of a card that several workers share their memory."""
    if gpus_per_worker and gpus_per_worker < 1 and torch.cuda.is_available():
        torch.cuda.set_per_process_memory_fraction(gpus_per_worker)


def _candidates(caption: Caption, names: Sequence[str]) -> list[dict[str, Any]] | None:
    return [{name: getattr(one, name) for name in names} for one in caption.candidates] or None


def pixel_tensor(column: pa.ChunkedArray, size: int) -> torch.Tensor:
    """Return uint8[B, 3, size, size] from fixed-size binary without nulls."""
    array = column.combine_chunks()
    width = array.type.byte_width
    pixels = np.frombuffer(array.buffers()[1], np.uint8, count=len(array) * width, offset=array.offset * width)
    return torch.from_numpy(pixels.reshape(-1, 3, size, size).copy())
