"""CLIPScore and RefCLIPScore of features that a CLIP computed (arXiv:2104.08718). Loads no torch itself."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from captioner.evaluation.metrics.corpus import FloatArray, ImageChunk

if TYPE_CHECKING:  # torch takes seconds to import, and a table of captions needs none of it
    from torch import Tensor

__all__ = ["clip_score", "clip_scores", "ref_clip_score", "ref_clip_scores"]

_WEIGHT = 2.5


def clip_score(chunk: ImageChunk) -> FloatArray:
    """Return float64[B], the CLIPScore of each image as it was passed to the evaluation, NaN for none."""
    return chunk.known("clip_score")


def ref_clip_score(chunk: ImageChunk) -> FloatArray:
    """Return float64[B], the RefCLIPScore of each image as it was passed to the evaluation, NaN for none."""
    return chunk.known("ref_clip_score")


def clip_scores(image_features: "Tensor", caption_features: "Tensor") -> FloatArray:
    """Return CLIPScore of each image and its caption: 2.5 times their cosine, at least 0 (arXiv:2104.08718).

    image_features, caption_features: float[B, D] of CLIP's two projections, normalised or not. The paper's captions
    begin with "A photo depicts ". Returns float64[B]."""
    return _WEIGHT * np.maximum(0, _cosines(image_features, caption_features))


def ref_clip_scores(
    scores: FloatArray, caption_features: "Tensor", reference_features: Sequence["Tensor"]
) -> FloatArray:
    """Return RefCLIPScore: the harmonic mean of CLIPScore and the caption's cosine with its nearest reference.

    scores: float64[B], CLIPScore of each caption. reference_features: for each image float[R, D] of its references.
    Returns float64[B]."""
    pairs = zip(caption_features, reference_features, strict=True)
    nearest = np.array([max(0.0, _cosines(caption[None], own).max()) for caption, own in pairs])
    total = scores + nearest
    means: FloatArray = np.divide(2 * scores * nearest, total, out=np.zeros_like(total), where=total > 0)
    return means


def _cosines(first: "Tensor", second: "Tensor") -> FloatArray:
    first, second = first.detach().double(), second.detach().double()
    lengths = first.norm(dim=-1) * second.norm(dim=-1)
    cosines = (first * second).sum(-1) / lengths.clamp(min=1e-12)
    return np.asarray(cosines.cpu(), np.float64)
