"""Decoding in child processes: no image can hang, crash or bloat the calling process.

A thread cannot end C code, and some of Pillow's decoders hold the interpreter's lock until they end (JPEG 2000: 1.6 s
for 6 megapixels), so a watchdog thread would not even wake. A child process has a kernel timer: SIGALRM, not handled,
ends it in the middle of any C function, also after its parent is gone. The next image gets a new child. Works on any
thread of any process, Ray's actors included; needs POSIX.

One child keeps one core busy; `num_processes` children use more cores.
"""

import queue
import weakref
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Self

from PIL import Image

from captioner.config import ImageConfig
from captioner.images.child import Child, Decode
from captioner.images.pixel_blocks import Places
from captioner.images.preprocessing import Preprocessing
from captioner.images.reader import Bytes, Decoded, decode, decode_image, refuse_by_size
from captioner.schema import Reject

__all__ = ["Decoder"]

_GROUP_IMAGES, _GROUP_BYTES = 64, 4 << 20  # of one message to a child: one for each image costs more
_GROUP_PIXEL_BYTES = 64 << 20  # that the answer to a message may take

_Group = tuple[list[Bytes], Places | None]
"""Images of one message, and the places of their pixels."""


class Decoder:
    """Turns image files into pixels or rejects, each within `config.decode_timeout_s`.

    Safe to call from many threads. The child processes start with the first image and end with `close`, at the end of a
    `with`, or when the decoder is collected.
    """

    def __init__(
        self,
        preprocessing: Preprocessing,
        config: ImageConfig,
        *,
        num_processes: int = 1,
        decode_one: Decode = decode,
    ) -> None:
        """Prepare `num_processes` children. decode_one: the function that they run, which can be imported by name."""
        self.preprocessing = preprocessing
        self.config = config
        self._children = [Child(decode_one, preprocessing, config) for _ in range(num_processes)]
        self._idle: queue.LifoQueue[Child] = queue.LifoQueue()
        for child in self._children:
            self._idle.put(child)
        self._finalizer = weakref.finalize(self, _end_all, self._children)

    def decode(self, data: Bytes) -> Decoded | Reject:
        """Return pixels or a reject; never raises for the bytes, whatever they are or do.

        Raises JobError if the child process cannot start at all.
        """
        return self.decode_batch([data])[0]

    def decode_image(self, image: Image.Image) -> Decoded | Reject:
        """Return pixels or a reject of an image that is already open. An image that is not loaded yet is decoded from
        its file like any other; pixels in memory are only resized, in this process."""
        data = _unloaded_file(image)
        return decode_image(image, self.preprocessing, self.config) if data is None else self.decode(data)

    def decode_batch(self, images: Sequence[Bytes], places: Places | None = None) -> list[Decoded | Reject]:
        """Return `decode` of each image, in their order, on all the child processes.

        places: rows of 3 * S * S bytes that the pixels of each image become, if it is decoded. Without them the pixels
        of many images may share one new array."""
        refused = {
            index: refusal for index, data in enumerate(images) if (refusal := refuse_by_size(data, self.config))
        }
        wanted = [index for index in range(len(images)) if index not in refused]
        most = min(_GROUP_IMAGES, max(1, _GROUP_PIXEL_BYTES // self.preprocessing.max_bytes))
        groups = list(_groups(images, wanted, min(most, -(-len(wanted) // len(self._children)))))
        outcomes: dict[int, Decoded | Reject] = dict(refused)
        tasks = [([images[i] for i in group], places and places.of(group)) for group in groups]
        for group, found in zip(groups, self._decode_groups(tasks), strict=True):
            outcomes.update(zip(group, found, strict=True))
        return [outcomes[index] for index in range(len(images))]

    def _decode_groups(self, groups: list[_Group]) -> list[list[Decoded | Reject]]:
        if len(self._children) == 1 or len(groups) <= 1:
            return [self._decode_group(group) for group in groups]
        with ThreadPoolExecutor(len(self._children)) as threads:
            return list(threads.map(self._decode_group, groups))

    def _decode_group(self, group: _Group) -> list[Decoded | Reject]:
        child = self._idle.get()
        try:
            return child.decode(*group)
        finally:
            self._idle.put(child)

    @property
    def num_killed(self) -> int:
        """Child processes that an image has ended: out of time, or crashed."""
        return sum(child.num_deaths for child in self._children)

    def close(self) -> None:
        """End the child processes; another `decode` would start them again."""
        _end_all(self._children)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _groups(images: Sequence[Bytes], indices: Iterable[int], most: int) -> Iterator[list[int]]:
    """Yield the indices in groups, each one message to a child: at most `most` images and a few MiB."""
    held: list[int] = []
    num_bytes = 0
    for index in indices:
        if held and (len(held) == most or num_bytes + len(images[index]) > _GROUP_BYTES):
            yield held
            held, num_bytes = [], 0
        held.append(index)
        num_bytes += len(images[index])
    if held:
        yield held


def _unloaded_file(image: Image.Image) -> bytes | None:
    """Return the file of an image that was opened and not loaded; None if its pixels are in memory already."""
    file = getattr(image, "fp", None)
    if file is None or not getattr(image, "tile", None) or image.tell():  # a later frame was chosen by the caller
        return None
    position = file.tell()
    file.seek(0)
    data: bytes = file.read()
    file.seek(position)
    return data


def _end_all(children: Iterable[Child]) -> None:
    for child in children:
        child.end()
