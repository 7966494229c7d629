"""One child process that decodes images for its parent, and may die without harm.

Images and pixels pass through two in-memory files that both processes have open, the input and the output buffer, or
pixels through the block that they belong in; messages are small. A kernel timer ends the child in the middle of any C
function, a limit on its memory turns a bomb into an error, and if the machine still runs short, the kernel ends the
child first. An image that ends its child is identified, and no other image is lost.
"""

import math
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, Pipe
from multiprocessing.reduction import recv_handle, send_handle
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from captioner.config import ImageConfig
from captioner.errors import JobError
from captioner.images.formats import readable_formats
from captioner.images.pixel_blocks import Places, memory_file
from captioner.images.preprocessing import Preprocessing
from captioner.images.reader import Bytes, Decoded, Pixels
from captioner.schema import Reject, RejectReason

__all__ = ["ENVIRONMENT", "Child", "Decode", "serve"]

Decode = Callable[[bytes, Preprocessing, ImageConfig], Decoded | Reject]

_BOOT = """
import sys
connection, input_buffer, output_buffer, *sys.path = sys.argv[1:]
from captioner.images.child import serve
serve(int(connection), int(input_buffer), int(output_buffer))
"""
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",  # a child is one core's worth
    # glibc would hand memory back after every image: 1,700 page faults and 3.8 ms at 1024x768. An image of 12
    # megapixels is one allocation of 49 MB: 61 ms with 128 MiB, 67 with 32; 1 GiB would keep the most that was needed
    "MALLOC_MMAP_THRESHOLD_": str(128 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(128 << 20),
}
_MAX_STARTS = 3  # one may be killed on a machine short of memory
_MAX_KEPT_BYTES = 4 << 20  # of the input buffer, after a large image
_HEADER_BYTES = 4096  # of the output buffer: the index of the current image; pixels follow
_BYTES_A_PIXEL = 32  # five copies at 4 bytes of an image with transparency, and the arrays of 16-bit samples
_MIN_BYTES = 1 << 30


class _Running(NamedTuple):
    """A child process and its channels."""

    process: subprocess.Popen[bytes]
    connection: Connection  # in turns: what images the input buffer holds; an answer for each
    input_buffer: BinaryIO
    output_buffer: BinaryIO


class _Message(NamedTuple):
    """The lengths of the images in the input buffer, one after another, and where in a block their pixels go: its file
    follows. Without a block they go into the output buffer, each behind those of the image before it."""

    lengths: list[int]
    offsets: list[int] | None


class _Answer(NamedTuple):
    """A decoded image, whose pixels are where the message wanted them."""

    shape: tuple[int, ...]
    width: int
    height: int
    decode_s: float


class _Death(NamedTuple):
    """The end of a child: the index of the image that it was decoding, and its exit status."""

    image_index: int
    status: int


class Child:
    """One child process, started with the first image."""

    def __init__(self, decode_one: Decode, preprocessing: Preprocessing, config: ImageConfig) -> None:
        self.num_deaths = 0
        self._task = decode_one, preprocessing, config
        self._running: _Running | None = None

    def decode(self, images: Sequence[Bytes], places: Places | None = None) -> list[Decoded | Reject]:
        """Return pixels or a reject of each image. places: as in `Decoder.decode_batch`.

        Raises JobError if the child cannot start at all."""
        outcomes: list[Decoded | Reject] = []
        while len(outcomes) < len(images):
            done = len(outcomes)
            rest, into = images[done:], places and places.of(range(done, len(images)))
            found = self._ask(rest, into)
            if isinstance(found, _Death):  # the answers to earlier images died with it
                at = found.image_index
                retried = self._retried(rest[at], into and into.of([at]), found.status)
                found = [*self.decode(rest[:at], into and into.of(range(at))), retried]
            outcomes += found
        return outcomes

    def _retried(self, data: Bytes, place: Places | None, status: int) -> Decoded | Reject:
        """Return the outcome of an image that ended the child."""
        if status == -signal.SIGALRM:
            limit = f"--decode-timeout-s is {self._task[2].decode_timeout_s:g}"
            return Reject(RejectReason.DECODE_TIMEOUT, f"not decoded in time; {limit}")
        again = self._ask([data], place)  # the image ends it twice; a machine short of memory may end it once
        if not isinstance(again, _Death):
            return again[0]
        if again.status == -signal.SIGALRM:
            return self._retried(data, place, again.status)
        if again.status == -signal.SIGKILL:
            detail = "its decoder was killed twice (SIGKILL), as happens on a machine that is short of memory"
            return Reject(RejectReason.OUT_OF_MEMORY, detail)
        return Reject(RejectReason.CORRUPT, f"crashed its decoder twice ({_cause(again.status)})")

    def end(self) -> None:
        """End the process; the next image starts another."""
        running, self._running = self._running, None
        if running:
            running.connection.close()
            running.input_buffer.close()
            running.output_buffer.close()
            running.process.kill()
            running.process.wait()

    def _ask(self, images: Sequence[Bytes], places: Places | None) -> list[Decoded | Reject] | _Death:
        """Return the outcomes, or the end of the child before it answered."""
        running = self._running or self._start()
        try:
            num_bytes = _write(running.input_buffer, images)
            running.connection.send(_Message([len(data) for data in images], places and places.offsets))
            if places:
                send_handle(running.connection, places.block.fileno, running.process.pid)
            answers: list[_Answer | Reject] = running.connection.recv()
        except (EOFError, ConnectionError):
            self.num_deaths += 1
            return self._death(running)
        except BaseException:  # interrupted: the next images must not get the answer to these
            self.end()
            raise
        if num_bytes > _MAX_KEPT_BYTES:
            os.ftruncate(running.input_buffer.fileno(), _MAX_KEPT_BYTES)
        shapes = [None if isinstance(answer, Reject) else answer.shape for answer in answers]
        arrays = places.pixels if places else _read_pixels(running.output_buffer, shapes)
        return [
            answer
            if isinstance(answer, Reject)
            else Decoded(pixels.reshape(answer.shape), answer.width, answer.height, answer.decode_s)
            for answer, pixels in zip(answers, arrays, strict=True)
        ]

    def _death(self, running: _Running) -> _Death:
        status = running.process.wait()
        index = int.from_bytes(os.pread(running.output_buffer.fileno(), 8, 0), "little")
        self.end()
        return _Death(index, status)

    def _start(self) -> _Running:
        """Return a child that is ready. Raises JobError if it dies before, each time that it is started."""
        for _ in range(_MAX_STARTS):
            running = self._running = self._spawn()
            try:
                running.connection.send(self._task)
                running.connection.recv()
                return running
            except (EOFError, ConnectionError):
                status = self._death(running).status
        raise JobError(f"the process that decodes images did not start ({_cause(status)}); its stderr says why")

    def _spawn(self) -> _Running:
        ours, theirs = Pipe()
        input_buffer, output_buffer = memory_file(), memory_file()
        files = theirs.fileno(), input_buffer.fileno(), output_buffer.fileno()
        command = [sys.executable, "-c", _BOOT, *map(str, files), *sys.path]
        process = subprocess.Popen(
            command,
            env={**os.environ, **ENVIRONMENT},
            pass_fds=files,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )
        theirs.close()
        return _Running(process, ours, input_buffer, output_buffer)


def serve(connection_fileno: int, input_buffer: int, output_buffer: int) -> None:
    """Decode images until the parent closes the connection: the main function of a child process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which then closes the connection
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGALRM})
    _silence_libraries()
    with Connection(connection_fileno) as connection, suppress(EOFError, ConnectionError):
        decode_one, preprocessing, config = connection.recv()
        readable_formats()  # loads Pillow's decoders: not in the time of the first image
        _limit_memory(_MIN_BYTES + _BYTES_A_PIXEL * config.max_image_pixels)
        connection.send(None)
        while True:
            message: _Message = connection.recv()
            target = output_buffer if message.offsets is None else recv_handle(connection)
            ends = np.cumsum(message.lengths).tolist()
            answers: list[_Answer | Reject] = []
            written = _HEADER_BYTES
            for index, (length, end) in enumerate(zip(message.lengths, ends, strict=True)):
                os.pwrite(output_buffer, index.to_bytes(8, "little"), 0)
                data = os.pread(input_buffer, length, end - length)
                signal.setitimer(signal.ITIMER_REAL, config.decode_timeout_s)
                start = time.perf_counter()
                outcome = decode_one(data, preprocessing, config)
                decode_s = time.perf_counter() - start
                signal.setitimer(signal.ITIMER_REAL, 0)
                if isinstance(outcome, Decoded):
                    place = written if message.offsets is None else message.offsets[index]
                    written += os.pwrite(target, outcome.pixels.data, place)
                    answers.append(_Answer(outcome.pixels.shape, outcome.width, outcome.height, decode_s))
                else:
                    answers.append(outcome)
            if target != output_buffer:
                os.close(target)
            connection.send(answers)


def _limit_memory(num_bytes: int) -> None:
    """Make an allocation beyond `num_bytes` a MemoryError, and this process the first that the kernel would end."""
    most = resource.getrlimit(resource.RLIMIT_DATA)[1]
    if most == resource.RLIM_INFINITY or num_bytes < most:
        resource.setrlimit(resource.RLIMIT_DATA, (num_bytes, num_bytes))
    with suppress(OSError):  # only Linux has it
        Path("/proc/self/oom_score_adj").write_text("1000")


def _silence_libraries() -> None:
    """Discard what C libraries as libtiff print to stderr; Python's own stderr stays."""
    sys.stderr = os.fdopen(os.dup(2), "w", buffering=1)
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 2)
    os.close(silence)


def _write(input_buffer: BinaryIO, images: Sequence[Bytes]) -> int:
    """Write the images one after another; return their bytes in all."""
    num_bytes = 0
    for data in images:
        num_bytes += os.pwrite(input_buffer.fileno(), data, num_bytes)
    return num_bytes


def _read_pixels(output_buffer: BinaryIO, shapes: Sequence[tuple[int, ...] | None]) -> list[Pixels]:
    """Return the pixels of each image, of one new array; none of one that has no shape."""
    ends = np.cumsum([math.prod(shape) if shape else 0 for shape in shapes]).tolist()
    whole = np.empty(ends[-1], np.uint8)
    os.preadv(output_buffer.fileno(), [whole.data], _HEADER_BYTES)
    return np.split(whole, ends[:-1])


def _cause(status: int) -> str:
    return signal.Signals(-status).name if status < 0 else f"exit status {status}"
