"""CLIPScore and RefCLIPScore: those a caption table has, and those that a model's CLIP computes.

Without a model only the column `clip_score` is used. With one, a table's images are read again where that column is
missing or comes from another CLIP; a few at a time, so that memory holds a number an image. Torch is loaded with a
model, not before.
"""

import logging
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from captioner.config import EvaluateConfig, ImageConfig
from captioner.errors import ConfigError, InputError
from captioner.evaluation.gates import Gate
from captioner.evaluation.metrics import FloatArray, IntArray, clip_scores, ref_clip_scores
from captioner.images import Decoded, Decoder, Preprocessing
from captioner.machine import num_cpus
from captioner.model.light_imports import import_transformers
from captioner.schema import Reject
from captioner.storage import Location
from captioner.storage.urls import redact
from captioner.tables import CaptionTable, open_table
from captioner.tables.table_images import TableImages

if TYPE_CHECKING:
    from captioner.model.bundle import BundleDescription, ClipDescription
    from captioner.model.joint_space import JointSpace
    from captioner.model.vision import VisionEncoder

__all__ = ["ClipScorer"]

log = logging.getLogger("captioner")

_IMAGES_PER_CHUNK = 256
_IMAGE = ImageConfig()


@dataclass(frozen=True)
class ClipScorer:
    """Scores captions by CLIP, as far as the config asks for it."""

    config: EvaluateConfig
    model: "BundleDescription | ClipDescription | None"
    gate: Gate | None = None
    """The gate of CLIPScore, where there is no model to compute it."""

    unread: Counter[str] = field(default_factory=Counter)
    """Images that could not be read again, by reason: they have no score."""

    @classmethod
    def of(cls, config: EvaluateConfig, gates: Sequence[Gate] = ()) -> "ClipScorer":
        """Return the scorer of an evaluation. Raises ConfigError where its model has no text tower."""
        by_figure = {gate.figure: gate for gate in gates}
        if not (config.model or config.clip_score_model):
            if gate := by_figure.get("ref_clip_score"):
                raise ConfigError(f"{gate.text} is set without --model; expected a bundle whose CLIP has a text tower")
            return cls(config, None, by_figure.get("clip_score"))
        from captioner.model.bundle import describe, describe_clip

        if config.clip_score_model:
            return cls(config, describe_clip(config.clip_score_model, _model_options(config)))
        model = describe(config.model, _model_options(config), allow_remote_parts=config.allow_remote_parts)
        model.check_text_tower(f"--model is {config.model}: CLIPScore")
        return cls(config, model)

    @property
    def columns_of_captions(self) -> Sequence[str]:
        """Columns of the captions that it reads."""
        return ("caption", "key", "clip_score") if self.model else ("clip_score",)

    @property
    def columns_of_references(self) -> Sequence[str]:
        """Columns of the references that it reads."""
        return ("caption",) if self.model else ()

    def scores(self, captions: pa.Table, references: pa.Table, owner: IntArray) -> dict[str, FloatArray]:
        """Return float64[N] of each score that there is, NaN for a caption without one.

        captions: one an image. owner: int64[R], the caption that each reference is for; negative for none. Raises
        ConfigError for a model whose score needs images whose place is not known."""
        known = captions["clip_score"].to_numpy()
        if self.model is None:
            if np.isnan(known).all() and self.gate is not None:
                raise ConfigError(
                    f"{self.gate.text} is set, but {redact(self.config.captions)} has no"
                    " clip_score; expected a table of a job with --clip-score, or --model to compute it"
                )
            return {"clip_score": known}
        wanted = self._without_score(known)
        images = self._images(captions, wanted) if len(wanted) else None
        reader = self._reader()
        if images:
            log.info("clip_score=%s images=%d", redact(self.model.clip), len(wanted))
            known = known.copy()
            known[wanted] = self._read(images, captions.take(pa.array(wanted)), reader)
        return {"clip_score": known, "ref_clip_score": reader.against_references(known, captions, references, owner)}

    def summary(self) -> dict[str, Any]:
        """Return what the summary says of it: which CLIP it is, and how many images could not be read."""
        return {"clip": redact(self.model.clip), "images_unread": dict(self.unread)} if self.model else {}

    def _reader(self) -> "_Reader":
        import_transformers()
        from captioner.model.bundle import load_clip_space, load_joint_space

        assert self.model is not None
        config, options = self.config, _model_options(self.config)
        if config.clip_score_model:
            vision, space = load_clip_space(config.clip_score_model, device=config.device, storage_options=options)
        else:
            vision, space = load_joint_space(
                config.model,
                device=config.device,
                storage_options=options,
                allow_remote_parts=config.allow_remote_parts,
            )
        return _Reader(vision, space, self.model.preprocessing)

    def _without_score(self, known: FloatArray) -> IntArray:
        """Return the rows whose score is missing, or is that of another CLIP."""
        assert self.model is not None
        identity = self._table.identity() if self._table else None
        of_table = (identity or {}).get("scoring", {}).get("text_tower")
        is_foreign = of_table is not None and of_table != self.model.text_fingerprint
        return np.flatnonzero(np.isnan(known) | is_foreign)

    def _images(self, captions: pa.Table, wanted: IntArray) -> TableImages:
        if self._table is None or captions["key"].take(pa.array(wanted)).null_count:
            raise ConfigError(
                f"{_flag(self.config)}, but {redact(self.config.captions)} has no clip_score for"
                f" {len(wanted):,} captions, and does not say where their images are; expected the OUTPUT of a caption"
                " job, or no model"
            )
        return TableImages.of(self._table, self.config.image_access)

    @cached_property
    def _table(self) -> CaptionTable | None:
        try:
            return open_table(Location(self.config.captions, self.config.storage_options))
        except InputError:
            return None

    def _read(self, images: TableImages, captions: pa.Table, reader: "_Reader") -> FloatArray:
        """Return the CLIPScore of each caption with its image, NaN for an image that cannot be read again."""
        keys: list[int] = captions["key"].to_pylist()
        texts = dict(zip(keys, captions["caption"].to_pylist(), strict=True))
        found: dict[int, float] = {}
        with reader.decoder:
            for seen in images.map_images(
                keys, lambda these, data: reader.score(data, [texts[key] for key in these]), _IMAGE
            ):
                self.unread.update(score.reason for score in seen.values() if isinstance(score, Reject))
                found.update((key, score) for key, score in seen.items() if not isinstance(score, Reject))
        return np.array([found.get(key, np.nan) for key in keys])


def _flag(config: EvaluateConfig) -> str:
    return (
        f"--clip-score-model is {config.clip_score_model}" if config.clip_score_model else f"--model is {config.model}"
    )


def _model_options(config: EvaluateConfig) -> dict[str, object]:
    """Return the options of the model's store: those given, else the captions', on their server alone."""
    if config.model_storage_options is not None:
        return config.model_storage_options
    captions = Location(config.captions, config.storage_options)
    return (
        config.storage_options
        if captions.is_local
        else captions.beside(config.model or config.clip_score_model).storage_options
    )


class _Reader:
    """A CLIP that reads images and captions; from several threads, one at a time."""

    def __init__(self, vision: "VisionEncoder", space: "JointSpace", preprocessing: Mapping[str, Any]) -> None:
        self.decoder = Decoder(Preprocessing.from_config(preprocessing), _IMAGE, num_processes=num_cpus())
        self._vision = vision
        self._space = space
        self._lock = threading.Lock()

    def score(self, images: Sequence[bytes | Reject], captions: Sequence[str]) -> list[float | Reject]:
        """Return CLIPScore of each image and its caption, or the reject of an image that cannot be read."""
        decoded = iter(self.decoder.decode_batch([image for image in images if not isinstance(image, Reject)]))
        outcomes = [image if isinstance(image, Reject) else next(decoded) for image in images]
        pairs = zip(outcomes, captions, strict=True)
        seen = [(found.pixels, caption) for found, caption in pairs if isinstance(found, Decoded)]
        scores = iter(self._scores([pixels for pixels, _ in seen], [caption for _, caption in seen]))
        return [found if isinstance(found, Reject) else next(scores) for found in outcomes]

    def _scores(self, pixels: Sequence[np.ndarray], captions: Sequence[str]) -> list[float]:
        import torch

        if not pixels:
            return []
        with self._lock:
            pooled = self._vision.pooled(torch.from_numpy(np.stack(pixels)))
            scores = clip_scores(self._space.of_pooled(pooled), self._space.of_captions(captions))
        return [float(score) for score in scores]

    def against_references(
        self, scores: FloatArray, captions: pa.Table, references: pa.Table, owner: IntArray
    ) -> FloatArray:
        """Return RefCLIPScore of captions, float64[N], NaN where there is no CLIPScore."""
        order = np.argsort(owner, kind="stable")
        order = order[np.searchsorted(owner[order], 0) :]
        bounds = np.searchsorted(owner[order], np.arange(len(scores) + 1))
        found = np.full(len(scores), np.nan)
        for rows in _chunks(np.flatnonzero(~np.isnan(scores))):
            texts = captions["caption"].take(pa.array(rows)).to_pylist()
            own = [references["caption"].take(pa.array(order[bounds[row] : bounds[row + 1]])) for row in rows]
            ends = np.cumsum([0, *(len(each) for each in own)]).tolist()
            features = self._space.of_captions(texts + [text for each in own for text in each.to_pylist()])
            mine, theirs = features[: len(rows)], features[len(rows) :]
            found[rows] = ref_clip_scores(scores[rows], mine, [theirs[first:last] for first, last in pairwise(ends)])
        return found


def _chunks(rows: IntArray) -> Iterator[IntArray]:
    return (rows[start : start + _IMAGES_PER_CHUNK] for start in range(0, len(rows), _IMAGES_PER_CHUNK))
