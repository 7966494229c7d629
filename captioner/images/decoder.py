"""Decoding in child processes: no image can hang, crash or bloat the process that asks.

A thread cannot end C code, and some of Pillow's decoders hold the interpreter's lock to their end (JPEG 2000: 1.6 s for
6 megapixels), so a watchdog thread would not even wake. A child process has a timer of its own that the kernel obeys:
SIGALRM, not handled, ends it in the middle of any C function, also when its parent is long gone. The next image gets a
fresh child. Works on any thread of any process, Ray's actors included; needs POSIX.

One child keeps one core busy; for more cores, ask from more threads (see `num_processes`).
"""

import os
import queue
import signal
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from multiprocessing.connection import Connection, Pipe
from types import TracebackType
from typing import BinaryIO, NamedTuple, Self

import numpy as np
from PIL import Image

from captioner.config import ImageConfig
from captioner.errors import JobError
from captioner.images.preprocessing import Preprocessing
from captioner.images.reader import Bytes, Decoded, Pixels, decode, decode_image, refuse_by_size
from captioner.rows import Reject, RejectReason

__all__ = ["Decoder", "serve"]

Decode = Callable[[bytes, Preprocessing, ImageConfig], Decoded | Reject]

_BOOT = """
import sys
connection, desk, *sys.path = sys.argv[1:]
from captioner.images.decoder import serve
serve(int(connection), int(desk))
"""
_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",  # a child is one core's worth
    # glibc would hand memory back after every image: 1,700 page faults and 3.8 ms at 1024x768
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(128 << 20),
}
_MAX_STARTS = 3  # one may fall to a machine short of memory
_DESK_BYTES = 4 << 20  # what the file in memory may keep after a large image


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
        """Prepare `num_processes` children. `decode_one` is what they run: a function that can be imported by name."""
        self.preprocessing = preprocessing
        self.config = config
        self._children = [_Child(decode_one, preprocessing, config) for _ in range(num_processes)]
        self._idle: queue.LifoQueue[_Child] = queue.LifoQueue()
        for child in self._children:
            self._idle.put(child)
        self._finalizer = weakref.finalize(self, _end_all, self._children)

    def decode(self, data: Bytes) -> Decoded | Reject:
        """Return pixels or a reject; never raises for the bytes, whatever they are or do.

        Raises JobError if the child process cannot start at all.
        """
        refusal = refuse_by_size(data, self.config)
        if refusal:
            return refusal
        child = self._idle.get()
        try:
            return child.decode(data)
        finally:
            self._idle.put(child)

    def decode_image(self, image: Image.Image) -> Decoded | Reject:
        """Return pixels or a reject of a picture that is already open here; without a deadline, in this process."""
        return decode_image(image, self.preprocessing, self.config)

    def decode_batch(self, images: Sequence[Bytes]) -> list[Decoded | Reject]:
        """Return `decode` of each image, in their order, on all the child processes."""
        if len(self._children) == 1:
            return [self.decode(image) for image in images]
        with ThreadPoolExecutor(len(self._children)) as threads:
            return list(threads.map(self.decode, images))

    @property
    def num_killed(self) -> int:
        """Child processes that were lost to an image: out of time, or crashed."""
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


class _Running(NamedTuple):
    """A child process, and what leads to it."""

    process: subprocess.Popen[bytes]
    connection: Connection  # turns: how many bytes lie on the desk; the answer to them
    desk: BinaryIO  # a file in memory that both have open: the image goes in, its pixels come out


class _Child:
    """One child process, started when it is needed."""

    def __init__(self, decode_one: Decode, preprocessing: Preprocessing, config: ImageConfig) -> None:
        self.num_deaths = 0
        self._task = decode_one, preprocessing, config
        self._running: _Running | None = None

    def decode(self, data: Bytes) -> Decoded | Reject:
        outcome = self._ask(data)
        if isinstance(outcome, int) and outcome != -signal.SIGALRM:
            outcome = self._ask(data)  # a crash seen twice is the image's; once, it may be a machine short of memory
        if not isinstance(outcome, int):
            return outcome
        if outcome == -signal.SIGALRM:
            limit = f"--decode-timeout-s is {self._task[2].decode_timeout_s:g}"
            return Reject(RejectReason.DECODE_TIMEOUT, f"not decoded in time; {limit}")
        return Reject(RejectReason.CORRUPT, f"crashed its decoder twice ({_cause(outcome)})")

    def end(self) -> None:
        running, self._running = self._running, None
        if running:
            running.connection.close()
            running.desk.close()
            running.process.kill()
            running.process.wait()

    def _ask(self, data: Bytes) -> Decoded | Reject | int:
        """Return the answer, or the exit status of a child that gave none."""
        running = self._running or self._start()
        try:
            os.pwrite(running.desk.fileno(), data, 0)
            running.connection.send(len(data))
            answer: tuple[int, int] | Reject = running.connection.recv()
        except (EOFError, ConnectionError):
            self.num_deaths += 1
            return self._status_of_death(running)
        except BaseException:  # interrupted in the middle: the answer to this image must not meet the next one
            self.end()
            raise
        if len(data) > _DESK_BYTES:
            os.ftruncate(running.desk.fileno(), _DESK_BYTES)
        return answer if isinstance(answer, Reject) else Decoded(self._take_pixels(running), *answer)

    def _take_pixels(self, running: _Running) -> Pixels:
        size = self._task[1].size
        pixels = np.empty((3, size, size), np.uint8)
        os.preadv(running.desk.fileno(), [pixels.data], 0)
        return pixels

    def _status_of_death(self, running: _Running) -> int:
        status = running.process.wait()
        self.end()
        return status

    def _start(self) -> _Running:
        """Return a child that has answered. Raises JobError for one that dies before, however often it is started."""
        for _ in range(_MAX_STARTS):
            running = self._running = self._spawn()
            try:
                running.connection.send(self._task)
                running.connection.recv()
                return running
            except (EOFError, ConnectionError):
                status = self._status_of_death(running)
        raise JobError(f"the process that decodes images did not start ({_cause(status)}); its stderr says why")

    def _spawn(self) -> _Running:
        ours, theirs = Pipe()
        desk = _memory_file()
        files = theirs.fileno(), desk.fileno()
        command = [sys.executable, "-c", _BOOT, *map(str, files), *sys.path]
        process = subprocess.Popen(
            command,
            env={**os.environ, **_ENVIRONMENT},
            pass_fds=files,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )
        theirs.close()
        return _Running(process, ours, desk)


def serve(connection_fileno: int, desk: int) -> None:
    """Answer images until the parent hangs up: what a child process runs."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, who then hangs up
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGALRM})
    _silence_libraries()
    with Connection(connection_fileno) as connection, suppress(EOFError, ConnectionError):
        decode_one, preprocessing, config = connection.recv()
        connection.send(None)
        while True:
            data = os.pread(desk, connection.recv(), 0)
            signal.setitimer(signal.ITIMER_REAL, config.decode_timeout_s)
            outcome = decode_one(data, preprocessing, config)
            signal.setitimer(signal.ITIMER_REAL, 0)
            if isinstance(outcome, Decoded):
                os.pwrite(desk, outcome.pixels.data, 0)
                connection.send((outcome.width, outcome.height))
            else:
                connection.send(outcome)


def _silence_libraries() -> None:
    """Let libtiff and its like talk to nobody; Python's own stderr stays."""
    sys.stderr = os.fdopen(os.dup(2), "w", buffering=1)
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 2)
    os.close(silence)


def _memory_file() -> BinaryIO:
    if hasattr(os, "memfd_create"):
        return os.fdopen(os.memfd_create("images"), "r+b", buffering=0)
    return tempfile.TemporaryFile(buffering=0)


def _end_all(children: Iterable[_Child]) -> None:
    for child in children:
        child.end()


def _cause(status: int) -> str:
    return signal.Signals(-status).name if status < 0 else f"exit status {status}"
