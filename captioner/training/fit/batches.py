"""Training examples: every caption of a split as token ids with its image's features, and their order.

The order is a function of the lengths, the batch size, the seed and the epoch, not of the workers or of interruptions.
Knows arrays and a tokenizer; no model.
"""

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from captioner.model.tokenizer import Tokenizer
from captioner.training.fit.schedule import steps_per_epoch

__all__ = ["IGNORED", "Batch", "Images", "IntArray", "PixelStream", "TokenizedSplit", "epoch_batches", "share"]

IntArray = npt.NDArray[np.int64]

PixelStream = Callable[[Iterator[IntArray]], Generator[npt.NDArray[np.uint8]]]
"""Given the images of each batch to come, int64[B] of a split, gives their pixels in this order, uint8[B, 3, S, S]."""

Images = npt.NDArray[np.float16] | npt.NDArray[np.uint8]

IGNORED = -100
"""The label of a position without a loss."""

_POOL_BATCHES = (
    32  # batches among which captions are sorted by length: enough to waste little, few enough to stay mixed
)
_TEXTS_PER_CALL = 4096


@dataclass(frozen=True)
class Batch:
    """Some examples as tensors. Letters: B examples, L tokens of the longest caption with its end, T labels."""

    images: Tensor
    """float16[B, F], the pooled state of each image, or uint8[B, 3, S, S], its pixels."""

    input_ids: Tensor
    """int64[B, L - 1]: the captions without their last token, padded with it."""

    labels: Tensor
    """int64[B, L]: the token after prompt and image, and after each input token; IGNORED after the end."""

    boxes: Tensor | None = None
    """float32[B, 4]: the part of each image that is shown, as `random_crops` has it; None for whole images."""

    @cached_property
    def loss_positions(self) -> Tensor:
        """int64[T]: positions in the flattened labels that have a loss."""
        return (self.labels.flatten() != IGNORED).nonzero().flatten()

    @property
    def targets(self) -> Tensor:
        """int64[T]: the labels at these positions."""
        return self.labels.flatten()[self.loss_positions]

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class TokenizedSplit:
    """The captions of one split. Letters: N images, E examples, T tokens of all captions together."""

    images: Images
    """One row an image: float16[N, F], its pooled state, or uint8[N, 3, S, S]; not read where pixels are streamed."""

    image: IntArray
    """int64[E]: the image of each example."""

    tokens: npt.NDArray[np.int32]
    """int32[T]: the captions, each with its end token, laid end to end."""

    starts: IntArray
    """int64[E + 1]: where each caption begins, and the last one ends."""

    @classmethod
    def tokenize(
        cls,
        images: Images,
        captions: Sequence[Sequence[str]],
        tokenizer: Tokenizer | PreTrainedTokenizerFast,
        *,
        end_token_id: int,
        max_tokens: int,
    ) -> "TokenizedSplit":
        """Return every caption of every image, cut to `max_tokens`; a cut one has no end token."""
        texts = [" ".join(caption.split()) for caption in chain.from_iterable(captions)]
        tokens, lengths = [np.empty(0, np.int32)], list[int]()
        for start in range(0, len(texts), _TEXTS_PER_CALL):
            found = tokenizer(texts[start : start + _TEXTS_PER_CALL], add_special_tokens=False).input_ids
            rows = [[*row, end_token_id][:max_tokens] for row in found]
            tokens.append(np.fromiter(chain.from_iterable(rows), np.int32))  # a tenth of the lists' memory
            lengths += map(len, rows)
        counts = [len(of_image) for of_image in captions]
        return cls(
            images=images,
            image=np.repeat(np.arange(len(captions)), counts),
            tokens=np.concatenate(tokens),
            starts=np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]),
        )

    def __len__(self) -> int:
        return len(self.image)

    @property
    def lengths(self) -> IntArray:
        """int64[E]: tokens of each caption, its end token included."""
        return np.diff(self.starts)

    def batch(
        self, rows: IntArray, images: Images | None = None, *, boxes: npt.NDArray[np.float32] | None = None
    ) -> Batch:
        """Return the examples of int64[B]. images: those of these examples, one each; by default from `self.images`.
        boxes: the part of each that is shown."""
        lengths = self.starts[rows + 1] - self.starts[rows]  # not of all examples: there may be millions
        offsets = np.arange(int(lengths.max()))
        is_token = offsets < lengths[:, None]
        where = np.minimum(self.starts[rows][:, None] + offsets, self.starts[rows + 1][:, None] - 1)
        ids = self.tokens[where].astype(np.int64)
        return Batch(
            images=torch.from_numpy(np.ascontiguousarray(self.images[self.image[rows]] if images is None else images)),
            input_ids=torch.from_numpy(ids[:, :-1]),
            labels=torch.from_numpy(np.where(is_token, ids, IGNORED)),
            boxes=None if boxes is None else torch.from_numpy(boxes),
        )


def epoch_batches(
    lengths: IntArray, batch_size: int, *, seed: int, epoch: int, image: IntArray | None = None
) -> list[IntArray]:
    """Return the examples of each step of an epoch: captions of similar length together, shuffled by epoch.

    lengths: int64[E]. image: int64[E], to show one caption of each image, drawn by seed and epoch; None shows all.
    Every batch is full; the examples left over differ by epoch.
    """
    rng = np.random.default_rng([seed, epoch])
    shown = np.arange(len(lengths)) if image is None else _one_of_each(image, rng)
    order = shown[rng.permutation(len(shown))]
    order = order[: steps_per_epoch(len(shown), batch_size) * batch_size]
    pool = _POOL_BATCHES * batch_size
    batches: list[IntArray] = []
    for start in range(0, len(order), pool):
        rows = order[start : start + pool]
        rows = rows[np.argsort(lengths[rows], kind="stable")]
        batches += [rows[first : first + batch_size] for first in range(0, len(rows), batch_size)]
    return [batches[index] for index in rng.permutation(len(batches))]


def _one_of_each(image: IntArray, rng: np.random.Generator) -> IntArray:
    """Return one example of each image at random; those of an image stand together."""
    _, first, count = np.unique(image, return_index=True, return_counts=True)
    chosen: IntArray = first + (rng.random(len(first)) * count).astype(np.int64)
    return chosen


def share(rows: IntArray, *, rank: int, size: int, num_parts: int) -> list[IntArray]:
    """Return one worker's share of a step, in parts; no part is empty."""
    return [part for part in np.array_split(rows[rank::size], num_parts) if len(part)]
