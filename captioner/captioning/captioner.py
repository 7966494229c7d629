"""Captions of images in this process: what a notebook uses, and what a model worker has inside.

    with Captioner.from_bundle("demo") as captioner:
        for found in captioner.caption(["one.jpg", "two.png"]):
            print(found.caption if isinstance(found, Caption) else found.reason)

Knows no rows and no Ray. Several threads may call one Captioner at once: they share its decoding engine, so that its
slots stay full across batches.
"""

import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Any, NamedTuple, Self, cast, overload

import numpy as np
import torch

from captioner.caption_columns import Caption
from captioner.captioning.caption_text import CaptionText, decodings_of
from captioner.captioning.image_values import ImageLike, decoded, is_one_image
from captioner.captioning.prompt_engines import PendingAnswer, PromptEngines
from captioner.captioning.questions import Answer
from captioner.captioning.seeds import image_seed
from captioner.captioning.telemetry import EngineMonitor, Recorder
from captioner.config import DecodingConfig, ImageConfig, ModelConfig, ScoringConfig, with_options
from captioner.decoding import Engine, EngineThread, Fork, Generation, Request
from captioner.errors import ConfigError
from captioner.evaluation.metrics import clip_scores
from captioner.images import Decoded, Decoder, Preprocessing
from captioner.model import cuda_graphs
from captioner.model.bundle import load
from captioner.model.caption_model import CaptionModel
from captioner.model.image_encoder import ENCODE_ROWS, ImageEncoder
from captioner.prompts import CAPTION, Prompt
from captioner.schema import Reject

__all__ = ["Captioner", "image_seed"]

GraphRecorders = Callable[[torch.device], cuda_graphs.Recorder | None]


class _Begun(NamedTuple):
    """Images that are encoded, whose captions the engine writes."""

    futures: list[Future[Generation]]
    features: list[torch.Tensor]
    """float[b, J] each: images in CLIP's joint space."""


class Captioner:
    """A model and its decoding engine: images or pixels in, captions out."""

    def __init__(
        self,
        model: CaptionModel,
        decoding: DecodingConfig | None = None,
        image: ImageConfig | None = None,
        scoring: ScoringConfig | None = None,
        slots: str = "auto",
        *,
        prompts: Sequence[Prompt] = (),
        recorder_for: GraphRecorders = cuda_graphs.recorder_for,
    ) -> None:
        """Take the memory that the engine's slots need.

        prompts: what `answer_pixels` asks of each image, and then nothing else can be asked; without any, images are
        captioned by the model's own prompt.
        recorder_for: what records the device's work, one an engine."""
        self.model = model
        self.decoding = decoding or DecodingConfig()
        self.scoring = scoring or ScoringConfig()
        self._text = CaptionText(model.text, self.decoding)
        self._fork = Fork(is_stopped=self._text.stop_check, redraw=self._text.redraw(decoding=1))
        self._decoder = Decoder(Preprocessing.from_config(model.preprocessing), image or ImageConfig())
        self.encoder = ImageEncoder(  # before the engine, which takes what memory is left
            model,
            num_rows=ENCODE_ROWS.get(model.device.type, 8),
            is_scored=self.scoring.needs_text_tower,
            recorder=recorder_for(model.device),
            adds_prompt=not prompts,
        )
        self.engine: EngineThread | PromptEngines
        if prompts:
            self.engine = PromptEngines(model, prompts, slots, lambda: recorder_for(model.device))
        else:
            self.engine = EngineThread(_engine(model, self.decoding, slots, recorder_for(model.device)))
        self.num_slots = self.engine.num_slots
        self._encode_lock = threading.Lock()

    @classmethod
    def from_bundle(
        cls,
        model: str | ModelConfig,
        decoding: DecodingConfig | None = None,
        *,
        image: ImageConfig | None = None,
        scoring: ScoringConfig | None = None,
        slots: str = "auto",
        prompts: Sequence[Prompt] = (),
        storage_options: dict[str, object] | None = None,
        **options: Any,
    ) -> "Captioner":
        """Return a captioner of a bundle or LLaVA checkpoint: `from_bundle("demo", num_beams=3, device="cpu")`.

        options: any flag of a caption job for decoding, scoring, images or the model, by its name in Python. Raises
        ConfigError for one that is none, BundleError for what cannot be loaded, a CLIP without the text tower that
        scoring needs among it."""
        config = ModelConfig(model=model) if isinstance(model, str) else model
        decoding, scoring, image, config = with_options(
            options, decoding or DecodingConfig(), scoring or ScoringConfig(), image or ImageConfig(), config
        )
        loaded = load(
            config.model,
            dtype=config.dtype,
            device=config.device,
            storage_options=storage_options,
            with_text_tower=scoring.needs_text_tower,
            allow_remote_parts=config.allow_remote_parts,
            **config.checkpoint_options,
        )
        return cls(loaded, decoding, image, scoring, slots, prompts=prompts)

    @overload
    def caption(self, images: ImageLike, image_ids: str | None = None) -> Caption | Reject: ...  # type: ignore[overload-overlap]  # a str is one image

    @overload
    def caption(
        self, images: Sequence[ImageLike], image_ids: Sequence[str] | None = None
    ) -> list[Caption | Reject]: ...

    def caption(
        self, images: ImageLike | Sequence[ImageLike], image_ids: str | Sequence[str] | None = None
    ) -> Caption | Reject | list[Caption | Reject]:
        """Return a caption of each image, or why it has none: of one image that, of several a list.

        An image is a PIL image, a numpy array of uint8[H, W, 3] or [H, W], bytes, a path, or a binary file. image_ids:
        what the draws of a sampled caption depend on besides the seed; by default the index in `images`.
        """
        if is_one_image(images):
            return self._caption_all([images], ["0" if image_ids is None else str(image_ids)])[0]
        several = list(cast(Sequence[ImageLike], images))
        ids = [str(index) for index in range(len(several))] if image_ids is None else list(image_ids)
        return self._caption_all(several, ids)

    def _caption_all(self, images: Sequence[ImageLike], ids: Sequence[str]) -> list[Caption | Reject]:
        at_once = self._decoder.preprocessing.rows_per_block or len(images) or 1  # pixels of tiles are many
        rejects: list[Reject | None] = []
        begun = _Begun([], [])
        for start in range(0, len(images), at_once):
            step = slice(start, start + at_once)
            rejects += self._begin_images(images[step], ids[step], begun)
        captions = iter(self._ended(begun))
        return [next(captions) if reject is None else reject for reject in rejects]

    def _begin_images(self, images: Sequence[ImageLike], ids: Sequence[str], begun: _Begun) -> list[Reject | None]:
        """Return why each image has no caption, None for one whose caption has begun."""
        outcomes = [decoded(image, self._decoder) for image in images]
        readable = [(one, image_id) for one, image_id in zip(outcomes, ids, strict=True) if isinstance(one, Decoded)]
        if readable:
            join = np.stack if self.model.packer is None else np.concatenate
            pixels = torch.from_numpy(join([one.pixels for one, _ in readable]))
            sizes = [(one.width, one.height) for one, _ in readable]
            self._begin(pixels, [image_id for _, image_id in readable], sizes, begun)
        return [None if isinstance(outcome, Decoded) else outcome for outcome in outcomes]

    def caption_pixels(
        self, pixels: torch.Tensor, image_ids: Sequence[str], sizes: Sequence[tuple[int, int]] = ()
    ) -> list[Caption]:
        """Return the captions of uint8[B, 3, S, S], in order. Raises EngineError when the engine has stopped.

        sizes: width and height of each image in pixels, where the model reads tiles and pixels are those of all."""
        begun = _Begun([], [])
        self._begin(pixels, image_ids, sizes, begun)
        return self._ended(begun)

    def answer_pixels(
        self,
        pixels: torch.Tensor,
        image_ids: Sequence[str],
        sizes: Sequence[tuple[int, int]],
        values: Sequence[Mapping[str, object]],
        asked: Sequence[Collection[str]] | None = None,
    ) -> list[tuple[Answer, ...]]:
        """Return an answer to each prompt, in their order, for each image of uint8[B, 3, S, S].

        values: of the columns that the prompts name. asked: names of the prompts that each image is asked, by default
        all. CLIPScore, where it is asked for, is that of the prompt `caption` alone. Others, and raises, as
        `caption_pixels`."""
        if not isinstance(self.engine, PromptEngines):
            raise ConfigError("this Captioner was made without prompts; expected caption or caption_pixels")
        questions = self.engine.questions(image_ids, values, asked)
        pending: list[list[PendingAnswer]] = []
        features: list[torch.Tensor] = []
        for images, squares in self._groups(len(image_ids), sizes):
            with self._encode_lock:
                embeds, joint = self.encoder(pixels[squares], sizes[images])
                pending += self.engine.submit(image_ids[images], list(embeds), questions[images], self.encoder)
            features.append(joint)
        return self._answers(pending, features)

    def _answers(
        self, pending: Sequence[Sequence[PendingAnswer]], features: Sequence[torch.Tensor]
    ) -> list[tuple[Answer, ...]]:
        flat = [one for of_image in pending for one in of_image]
        candidates = [one.text.captions(one.hypotheses()) for one in flat]
        scored = [place for place, one in enumerate(flat) if one.question.prompt.name == CAPTION]
        if scored and self.scoring.needs_text_tower:
            text = flat[scored[0]].text
            is_scored = [any(one.question.prompt.name == CAPTION for one in of_image) for of_image in pending]
            joint = torch.cat(list(features))[torch.tensor(is_scored)]
            of_captions = self._scored([candidates[place] for place in scored], joint, text)
            for place, captions in zip(scored, of_captions, strict=True):
                candidates[place] = captions
        answers = iter(
            Answer(_with_candidates(captions), one.question.text_number, one.question.tokens.num_cut_values)
            for one, captions in zip(flat, candidates, strict=True)
        )
        return [tuple(next(answers) for _ in of_image) for of_image in pending]

    def _begin(
        self, pixels: torch.Tensor, image_ids: Sequence[str], sizes: Sequence[tuple[int, int]], begun: _Begun
    ) -> None:
        if not isinstance(self.engine, EngineThread):
            raise ConfigError("this Captioner was made with prompts; expected answer_pixels, which answers each")
        for images, squares in self._groups(len(image_ids), sizes):
            # One call at a time encodes and waits for room in the engine, so that no other piles up prefixes meanwhile.
            with self._encode_lock:
                embeds, joint = self.encoder(pixels[squares], sizes[images])
                begun.futures.extend(self.engine.submit(self._requests(image_ids[images], embeds)))
            begun.features.append(joint)  # the engine decodes these while CLIP encodes the next

    def _ended(self, begun: _Begun) -> list[Caption]:
        candidates = [self._text.captions(future.result().hypotheses) for future in begun.futures]
        if candidates and self.scoring.needs_text_tower:
            candidates = self._scored(candidates, torch.cat(begun.features), self._text)
        return [_with_candidates(of_image) for of_image in candidates]

    def _groups(self, num_images: int, sizes: Sequence[tuple[int, int]]) -> Iterator[tuple[slice, slice]]:
        """Yield the images that are encoded at once, and their squares: as many as fill the encoder's rows, or one."""
        packer = self.model.packer
        counts = [packer.anyres.num_tiles(*size) for size in sizes] if packer else [1] * num_images
        start = first = 0
        while start < num_images:
            stop, last = start + 1, first + counts[start]
            while stop < num_images and last + counts[stop] - first <= self.encoder.num_rows:
                stop, last = stop + 1, last + counts[stop]
            yield slice(start, stop), slice(first, last)
            start, first = stop, last

    def _requests(self, image_ids: Sequence[str], embeds: torch.Tensor | Sequence[torch.Tensor]) -> list[Request]:
        """Return what the engine is asked for. embeds: float[k, D] each, what LLaMA reads in place of the image."""
        return [
            Request(image_id, prefix, seed=image_seed(self.decoding.seed, image_id), forks=(self._fork,))
            for image_id, prefix in zip(image_ids, embeds, strict=True)
        ]

    def _scored(self, candidates: list[list[Caption]], images: torch.Tensor, text: CaptionText) -> list[list[Caption]]:
        """Return the candidates of each image with their CLIPScore, best first. images: float[B, J], joint features.
        text: of their prompt."""
        assert self.model.joint_space is not None
        texts = self.model.joint_space.of_captions([one.caption for of_image in candidates for one in of_image])
        owners = [index for index, of_image in enumerate(candidates) for _ in of_image]
        scores = iter(clip_scores(images[owners].cpu(), texts.cpu()).tolist())
        scored = [[replace(one, clip_score=next(scores)) for one in of_image] for of_image in candidates]
        if self.scoring.rerank == "clip-score":
            for of_image in scored:  # stable: equal scores stay in the order of their probability
                of_image.sort(key=lambda one: (text.fault(one), -_clip_score(one)))
        return scored

    def monitor(self, recorder: Recorder, num_failed: Callable[[], int] = int) -> EngineMonitor:
        """Return a thread that records, once a second, how busy the engine is and how many images are finished.

        num_failed: images that passed by without reaching the engine."""
        return EngineMonitor(
            recorder,
            num_busy=lambda: self.engine.num_busy,
            idle_s=lambda: self.engine.idle_s,
            num_finished=lambda: self.engine.num_finished + num_failed(),
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the engine's thread; calls that wait fail with EngineError."""
        self.engine.close()
        self._decoder.close()


def _engine(model: CaptionModel, decoding: DecodingConfig, slots: str, recorder: cuda_graphs.Recorder | None) -> Engine:
    prompt = model.prompt_embeddings()
    return Engine(
        model.llama,
        decodings=decodings_of([decoding]),
        eos_token_ids=model.eos_token_ids,
        shared_prefix=prompt,
        max_prefix_len=model.num_prompt_tokens - len(prompt),
        context_length=model.context_length,
        slots="auto" if slots == "auto" else int(slots),
        recorder=recorder,
    )


def _clip_score(caption: Caption) -> float:
    assert caption.clip_score is not None, caption
    return caption.clip_score


def _with_candidates(candidates: Sequence[Caption]) -> Caption:
    """Return the first of an image's captions, all of them attached where there is more than one."""
    return replace(candidates[0], candidates=tuple(candidates) if len(candidates) > 1 else ())
