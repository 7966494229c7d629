"""From pixels in host memory to the embeddings that LLaMA reads, while the device also decodes captions.

On a CUDA device from pinned memory, in a separate stream and replayed from one recording, so that neither the copies
nor the dispatch of CLIP delay a step of the engine; on a CPU eagerly. Knows neither rows nor text.
"""

import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from captioner.model.caption_model import CaptionModel
from captioner.model.cuda_graphs import Recorder, on_device

__all__ = ["ENCODE_ROWS", "ImageEncoder", "pixel_tensor"]

ENCODE_ROWS = {"cpu": 8, "cuda": 64}  # a fixed number, so that no result depends on the others of a batch


class ImageEncoder:
    """Encodes images for callers in any thread, up to `num_rows` squares at a time.

    B images, S image side, P prefix tokens, D LLaMA width, J width of CLIP's joint space."""

    @torch.inference_mode()
    def __init__(
        self,
        model: CaptionModel,
        *,
        num_rows: int,
        is_scored: bool,
        recorder: Recorder | None,
        adds_prompt: bool = True,
    ) -> None:
        """is_scored: return images in CLIP's joint space too. recorder: its own, not the engine's. adds_prompt: whether
        the prompt after the image belongs to what is returned of one."""
        self.num_rows = num_rows
        self._model = model
        self._is_scored = is_scored
        self._adds_prompt = adds_prompt
        self._lock = threading.Lock()
        is_cuda = model.device.type == "cuda"
        shape = (num_rows, 3, model.image_size, model.image_size)
        self._host = torch.zeros(shape, dtype=torch.uint8, pin_memory=is_cuda)
        self._pixels = self._host.to(model.device)  # on a CPU itself
        self._stream: Any = torch.cuda.Stream(model.device) if is_cuda else None  # type: ignore[no-untyped-call]
        self._recording = recorder(self._encode) if recorder else None

    @torch.inference_mode()
    def __call__(self, pixels: Tensor, sizes: Sequence[tuple[int, int]] = ()) -> tuple[Tensor | list[Tensor], Tensor]:
        """Return the prefix of each image, float[P, D], and, in CLIP's joint space, float[B, J or 0].

        pixels: uint8[B, 3, S, S] of at most `num_rows` images; of a model that reads tiles, those of all images, whose
        width and height in pixels are `sizes`: then each image has its own P. The tower always reads the same number
        of squares, padded with black ones, so that no result depends on the others. Raises ShapeError for other pixels.
        """
        self._model.vision.check(pixels)
        with self._lock, on_device(self._model.device), self._beside():
            if self._model.packer is None:
                return self._encoded(pixels)
            patches = self._encoded_tiles(pixels)
            packed = self._model.pack(patches, sizes)
            prefixes = [self._prefixes(tokens[None])[0] for tokens in packed]
            self._wait()
        return prefixes, pixels.new_empty(len(sizes), 0)

    @torch.inference_mode()
    def encode_squares(self, pixels: Tensor) -> Tensor:
        """Return what the tower and the projector give for at most `num_rows` squares: the step that takes the time."""
        with self._lock, on_device(self._model.device), self._beside():
            return self._encoded(pixels)[0]

    @torch.inference_mode()
    def join(self, sequences: Sequence[Sequence[Sequence[int] | Tensor]]) -> list[Tensor]:
        """Return the embeddings of each sequence of tokens and images, float[n, D]. A tensor is an image's,
        float[k, D]; others are token ids."""
        ids = [part for parts in sequences for part in parts if not isinstance(part, Tensor)]
        with self._lock, on_device(self._model.device), self._beside():
            texts = iter(torch.split(self._model.embed([i for part in ids for i in part]), [len(part) for part in ids]))
            joined = [
                torch.cat([part if isinstance(part, Tensor) else next(texts) for part in parts]) for parts in sequences
            ]
            self._wait()
        return joined

    def _prefixes(self, embeds: Tensor) -> Tensor:
        return self._model.request_embeddings(embeds) if self._adds_prompt else embeds

    def _encoded_tiles(self, pixels: Tensor) -> Tensor:
        starts = range(0, len(pixels), self.num_rows)
        return torch.cat([self._encoded(pixels[start : start + self.num_rows])[0] for start in starts])

    def _encoded(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Return what `_encode` does of at most `num_rows` squares."""
        number = len(pixels)
        self._host[:number] = pixels
        self._host[number:] = 0
        self._pixels.copy_(self._host, non_blocking=True)
        # Cloned in this stream and read in the engine's, without record_stream: the wait below comes before the
        # engine sees them, and their job holds them until the host has read a later step.
        prefixes, joint = (encoded[:number].clone() for encoded in self._run())
        self._wait()
        return prefixes, joint

    def _wait(self) -> None:
        if self._stream is not None:
            self._stream.synchronize()

    def _run(self) -> tuple[Tensor, Tensor]:
        if self._recording is None:
            return self._encode()
        self._recording.replay()
        return self._recording.result

    def _encode(self) -> tuple[Tensor, Tensor]:
        """Return the prefixes of `_pixels`, of tiles the patches alone, and the images in CLIP's joint space."""
        features = self._model.features(self._pixels)
        embeds = self._model.project(features)
        prefixes = embeds if self._model.packer else self._prefixes(embeds)
        if self._is_scored:
            return prefixes, self._model.joint_features(self._pixels, features)
        return prefixes, prefixes.new_empty(self.num_rows, 0)

    def _beside(self) -> AbstractContextManager[Any]:
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)


def pixel_tensor(column: pa.ChunkedArray, size: int) -> torch.Tensor:
    """Return uint8[B, 3, size, size] from fixed-size binary without nulls, or from lists of it, one after another.

    Of a column in one piece it shows the column's own memory, which nobody may write to."""
    array = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()  # which copies a single one, too
    if pa.types.is_list(array.type):
        array = array.flatten()
    width = array.type.byte_width
    shown = pa.Array.from_buffers(
        pa.uint8(), len(array) * width, [None, array.buffers()[1]], offset=array.offset * width
    )
    pixels = from_dlpack(shown)
    return pixels.view(-1, 3, size, size)
