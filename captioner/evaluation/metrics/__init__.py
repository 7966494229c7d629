"""Caption metrics as coco-caption computes them, without Java: BLEU-1..4, ROUGE-L, CIDEr-D; CLIPScore from features.

    scores = score_captions(["a dog on a wall"], [["a dog sits on a wall", "the dog is outside"]])
    scores.figures()["cider_d"], scores.intervals()["cider_d"]

A metric is one file and one entry of METRICS. Knows captions and arrays; no file, no image id, no model.
"""

from captioner.evaluation.metrics.clip_score import clip_scores, ref_clip_scores
from captioner.evaluation.metrics.corpus import FloatArray, ImageChunk
from captioner.evaluation.metrics.scores import ImageScores, score_captions, score_encoded
from captioner.evaluation.metrics.table import METRICS, Metric
from captioner.evaluation.metrics.words import CaptionEncoder, EncodedCaptions, IntArray, tokenize

__all__ = [
    "METRICS",
    "CaptionEncoder",
    "EncodedCaptions",
    "FloatArray",
    "ImageChunk",
    "ImageScores",
    "IntArray",
    "Metric",
    "clip_scores",
    "ref_clip_scores",
    "score_captions",
    "score_encoded",
    "tokenize",
]
