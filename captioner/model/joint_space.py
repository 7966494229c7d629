"""CLIP's joint space of images and captions, where CLIPScore is a cosine: the text tower and both projections.

Knows CLIP and its tokenizer; nothing of projectors, LLaMA or what a score is for (see `captioner.evaluation.metrics`).
"""

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import CLIPModel, PreTrainedTokenizerFast

__all__ = ["JointSpace"]

_PREFIX = "A photo depicts "  # the prefix of each caption in CLIPScore (arXiv:2104.08718)
_LENGTH_STEP = 16  # tokens: captions of about the same length are read together
_ROWS = {"cpu": 8, "cuda": 64}  # a fixed number of one length, so that no result depends on the others of a batch


class JointSpace:
    """Images and captions as float[N, J], to be compared by their cosine. J: width of the projections."""

    def __init__(self, clip: CLIPModel, tokenizer: PreTrainedTokenizerFast, *, keeps_vision_tower: bool) -> None:
        """clip: frozen. keeps_vision_tower: whether `of_pixels` will be called; a second tower takes memory."""
        if not keeps_vision_tower:
            del clip.vision_model
        self._clip = clip
        self._tokenizer = tokenizer
        self._max_tokens = int(clip.text_model.config.max_position_embeddings)
        self._num_rows = _ROWS.get(clip.device.type, 8)

    @torch.no_grad()
    def of_pooled(self, pooled: Tensor) -> Tensor:
        """Return images from their pooled CLS states, float[B, F]."""
        features: Tensor = self._clip.visual_projection(pooled)
        return features

    @torch.no_grad()
    def of_pixels(self, pixel_values: Tensor) -> Tensor:
        """Return images from their pixel_values, float[B, 3, S, S]."""
        return self.of_pooled(self._clip.vision_model(pixel_values=pixel_values).pooler_output)

    @torch.no_grad()
    def of_captions(self, captions: Sequence[str]) -> Tensor:
        """Return captions with CLIPScore's prefix, truncated to the text tower's length; equal ones to the last bit."""
        distinct = list(dict.fromkeys(captions))
        rows = self._tokens(distinct)
        width = self._clip.text_projection.out_features
        found = torch.empty(len(rows), width, device=self._clip.device, dtype=self._clip.dtype)
        for length, indices in self._by_length(rows).items():
            for start in range(0, len(indices), self._num_rows):
                chosen = indices[start : start + self._num_rows]
                found[chosen] = self._read([rows[index] for index in chosen], length)
        place_of = {caption: index for index, caption in enumerate(distinct)}
        return found[[place_of[caption] for caption in captions]]

    def _tokens(self, captions: Sequence[str]) -> list[list[int]]:
        texts = [_PREFIX + caption for caption in captions]
        ids: list[list[int]] = self._tokenizer(texts, truncation=True, max_length=self._max_tokens).input_ids
        return ids

    def _by_length(self, rows: Sequence[Sequence[int]]) -> dict[int, list[int]]:
        """Return the indices of rows by the length that they are padded to."""
        indices = defaultdict(list)
        for index, row in enumerate(rows):
            rounded = -(-len(row) // _LENGTH_STEP) * _LENGTH_STEP
            indices[min(rounded, self._max_tokens)].append(index)
        return indices

    def _read(self, rows: Sequence[Sequence[int]], length: int) -> Tensor:
        """Return float[B, J] of token ids with the tokenizer's start and end.

        Padded with the end token: attention is causal, and CLIP reads the state at the first end token."""
        end = int(self._tokenizer.eos_token_id)
        ids = torch.full((self._num_rows, length), end)
        for index, row in enumerate(rows):
            ids[index, : len(row)] = torch.tensor(row)
        pooled = self._clip.text_model(input_ids=ids.to(self._clip.device)).pooler_output
        features: Tensor = self._clip.text_projection(pooled)
        return features[: len(rows)]
