"""Pixels in the host's memory to what LLaMA reads, while the device also writes captions.

On a CUDA device from pinned memory, in a stream of its own and replayed from one recording, so that neither the copies
nor the dispatch of CLIP hold up a step of the engine; on a CPU the same work, plainly. Knows neither rows nor text.
"""

import threading
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from captioner.model.caption_model import CaptionModel
from captioner.model.recording import Recorder, on_device

__all__ = ["ImageEncoder"]


class ImageEncoder:
    """Encodes up to `num_rows` images at a time for callers in any thread.

    B images, S image side, P prefix tokens, D LLaMA width, J width of CLIP's joint space."""

    @torch.inference_mode()
    def __init__(self, model: CaptionModel, *, num_rows: int, is_scored: bool, recorder: Recorder | None) -> None:
        """is_scored: whether images are wanted in CLIP's joint space too. recorder: its own, not the engine's."""
        self.num_rows = num_rows
        self._model = model
        self._is_scored = is_scored
        self._lock = threading.Lock()
        is_cuda = model.device.type == "cuda"
        shape = (num_rows, 3, model.image_size, model.image_size)
        self._host = torch.zeros(shape, dtype=torch.uint8, pin_memory=is_cuda)
        self._pixels = self._host.to(model.device)  # on a CPU itself
        self._stream: Any = torch.cuda.Stream(model.device) if is_cuda else None  # type: ignore[no-untyped-call]
        self._recording = recorder(self._encode) if recorder else None

    @torch.inference_mode()
    def __call__(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Return prefixes, float[B, P, D], and, in CLIP's joint space, float[B, J or 0], from uint8[B, 3, S, S].

        CLIP always sees the same number of images, the missing ones black, so that none depends on how many came with
        it. Raises ShapeError for other pixels."""
        self._model.vision.check(pixels)
        number = len(pixels)
        with self._lock, on_device(self._model.device), self._beside():
            self._host[:number] = pixels
            self._host[number:] = 0
            self._pixels.copy_(self._host, non_blocking=True)
            # Cloned in this stream and read in the engine's, without record_stream: the wait below comes before the
            # engine sees them, and their job holds them until the host has read a later step.
            prefixes, joint = (encoded[:number].clone() for encoded in self._run())
            if self._stream is not None:
                self._stream.synchronize()
        return prefixes, joint

    def _run(self) -> tuple[Tensor, Tensor]:
        if self._recording is None:
            return self._encode()
        self._recording.replay()
        return self._recording.result

    def _encode(self) -> tuple[Tensor, Tensor]:
        features = self._model.features(self._pixels)
        prefixes = self._model.request_embeddings(self._model.project(features))
        if self._is_scored:
            return prefixes, self._model.joint_features(self._pixels, features)
        return prefixes, prefixes.new_empty(self.num_rows, 0)

    def _beside(self) -> AbstractContextManager[Any]:
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)
