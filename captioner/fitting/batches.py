"""What is learned: every caption of a split as token ids beside its image's features, and the order of a fit's steps.

The order is a function of the lengths, the batch size, the seed and the epoch: never of the workers, nor of where a fit
was cut. Knows arrays and a tokenizer; nothing of models.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

__all__ = ["IGNORED", "Batch", "IntArray", "TokenizedSplit", "epoch_batches", "share", "steps_per_epoch"]

IntArray = npt.NDArray[np.int64]

IGNORED = -100
"""The label of a position that is not learned."""

_POOL_BATCHES = (
    32  # batches among which captions are sorted by length: enough to waste little, few enough to stay mixed
)
_TEXTS_A_CALL = 4096


@dataclass(frozen=True)
class Batch:
    """Some examples as tensors. Letters: B examples, L tokens of the longest caption with its end, T labels."""

    features: Tensor
    """float16[B, ...]: what the projector reads."""

    input_ids: Tensor
    """int64[B, L - 1]: the captions without their last token, filled up with it."""

    labels: Tensor
    """int64[B, L]: what follows prompt, image and each input token; IGNORED behind the end."""

    @cached_property
    def places(self) -> Tensor:
        """int64[T]: where in the flattened labels something is to be learned."""
        return (self.labels.flatten() != IGNORED).nonzero().flatten()

    @property
    def targets(self) -> Tensor:
        """int64[T]: what is to be learned there."""
        return self.labels.flatten()[self.places]

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class TokenizedSplit:
    """The captions of one split. Letters: N images, E examples, T tokens of all captions together."""

    features: npt.NDArray[np.float16]
    """float16[N, ...]: one row an image."""

    image: IntArray
    """int64[E]: the image of each example."""

    tokens: npt.NDArray[np.int32]
    """int32[T]: the captions, each with its end token, one behind another."""

    starts: IntArray
    """int64[E + 1]: where each caption begins, and the last one ends."""

    @classmethod
    def tokenize(
        cls,
        features: npt.NDArray[np.float16],
        captions: Sequence[Sequence[str]],
        tokenizer: PreTrainedTokenizerFast,
        *,
        end_token_id: int,
        max_tokens: int,
    ) -> "TokenizedSplit":
        """Return every caption of every image, cut to `max_tokens`; one that was cut has no end token to learn."""
        texts = [" ".join(caption.split()) for caption in chain.from_iterable(captions)]
        tokens, lengths = [np.empty(0, np.int32)], list[int]()
        for start in range(0, len(texts), _TEXTS_A_CALL):
            found = tokenizer(texts[start : start + _TEXTS_A_CALL], add_special_tokens=False).input_ids
            rows = [[*row, end_token_id][:max_tokens] for row in found]
            tokens.append(np.fromiter(chain.from_iterable(rows), np.int32))  # a tenth of what the lists take
            lengths += map(len, rows)
        counts = [len(of_image) for of_image in captions]
        return cls(
            features=features,
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

    def batch(self, rows: IntArray) -> Batch:
        """Return the examples of int64[B]."""
        lengths = self.starts[rows + 1] - self.starts[rows]  # not of all examples: there may be millions
        places = np.arange(int(lengths.max()))
        is_token = places < lengths[:, None]
        where = np.minimum(self.starts[rows][:, None] + places, self.starts[rows + 1][:, None] - 1)
        ids = self.tokens[where].astype(np.int64)
        return Batch(
            features=torch.from_numpy(np.ascontiguousarray(self.features[self.image[rows]])),
            input_ids=torch.from_numpy(ids[:, :-1]),
            labels=torch.from_numpy(np.where(is_token, ids, IGNORED)),
        )


def steps_per_epoch(num_examples: int, batch_size: int) -> int:
    """Return the whole batches of one epoch, or 1 where there is none."""
    return max(1, num_examples // batch_size)


def epoch_batches(lengths: IntArray, batch_size: int, *, seed: int, epoch: int) -> list[IntArray]:
    """Return the examples of each step of an epoch: captions of similar length together, mixed anew each time.

    lengths: int64[E]. Every batch is whole; the examples that are left over are others in each epoch.
    """
    lots = np.random.default_rng([seed, epoch])
    order = lots.permutation(len(lengths))
    order = order[: steps_per_epoch(len(lengths), batch_size) * batch_size]
    pool = _POOL_BATCHES * batch_size
    batches: list[IntArray] = []
    for start in range(0, len(order), pool):
        rows = order[start : start + pool]
        rows = rows[np.argsort(lengths[rows], kind="stable")]
        batches += [rows[place : place + batch_size] for place in range(0, len(rows), batch_size)]
    return [batches[place] for place in lots.permutation(len(batches))]


def share(rows: IntArray, *, rank: int, size: int, num_parts: int) -> list[IntArray]:
    """Return what one of `size` workers computes of a step, in parts; none of them is empty."""
    return [part for part in np.array_split(rows[rank::size], num_parts) if len(part)]
