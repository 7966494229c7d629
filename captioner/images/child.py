"""One child process that decodes images for its parent, and is lost without harm.

Images go in and pixels come out through two files in memory that both have open; what is said is small. A kernel timer
ends the child in the middle of any C function, a limit on its memory makes a bomb an error, and should the machine run
short all the same, the kernel takes the child first. An image that ends its child is found, and costs no other image.
"""

import os
import resource
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from captioner.config import ImageConfig
from captioner.errors import JobError
from captioner.images.preprocessing import Preprocessing
from captioner.images.reader import Bytes, Decoded, Pixels
from captioner.rows import Reject, RejectReason

__all__ = ["ENVIRONMENT", "Child", "Decode", "serve"]

Decode = Callable[[bytes, Preprocessing, ImageConfig], Decoded | Reject]

_BOOT = """
import sys
connection, desk, tray, *sys.path = sys.argv[1:]
from captioner.images.child import serve
serve(int(connection), int(desk), int(tray))
"""
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",  # a child is one core's worth
    # glibc would hand memory back after every image: 1,700 page faults and 3.8 ms at 1024x768
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(128 << 20),
}
_MAX_STARTS = 3  # one may fall to a machine short of memory
_DESK_BYTES = 4 << 20  # what the files in memory may keep after a large image
_TRAY_HEAD = 4096  # holds the number of the image at hand; pixels lie behind it
_BYTES_A_PIXEL = 32  # five copies at 4 bytes of a picture with transparency, and the arrays of 16-bit samples
_BYTES_AT_LEAST = 1 << 30


class _Running(NamedTuple):
    """A child process, and what leads to it."""

    process: subprocess.Popen[bytes]
    connection: Connection  # turns: the lengths of the images on the desk; an answer for each
    desk: BinaryIO
    tray: BinaryIO


class _Death(NamedTuple):
    """The end of a child: which of the images it was at, and its exit status."""

    place: int
    status: int


class Child:
    """One child process, started when it is needed."""

    def __init__(self, decode_one: Decode, preprocessing: Preprocessing, config: ImageConfig) -> None:
        self.num_deaths = 0
        self._task = decode_one, preprocessing, config
        self._running: _Running | None = None

    def decode(self, images: Sequence[Bytes]) -> list[Decoded | Reject]:
        """Return pixels or a reject of each image. Raises JobError if the child cannot start at all."""
        outcomes: list[Decoded | Reject] = []
        while len(outcomes) < len(images):
            rest = images[len(outcomes) :]
            found = self._ask(rest)
            if isinstance(found, _Death):  # the answers to those before died with it
                found = [*self.decode(rest[: found.place]), self._alone(rest[found.place], found.status)]
            outcomes += found
        return outcomes

    def _alone(self, data: Bytes, status: int) -> Decoded | Reject:
        """Return what becomes of an image that ended the child."""
        if status == -signal.SIGALRM:
            limit = f"--decode-timeout-s is {self._task[2].decode_timeout_s:g}"
            return Reject(RejectReason.DECODE_TIMEOUT, f"not decoded in time; {limit}")
        again = self._ask([data])  # an end seen twice is the image's; once, it may be a machine short of memory
        if not isinstance(again, _Death):
            return again[0]
        if again.status == -signal.SIGALRM:
            return self._alone(data, again.status)
        if again.status == -signal.SIGKILL:
            detail = "its decoder was killed twice (SIGKILL), as happens on a machine that is short of memory"
            return Reject(RejectReason.OUT_OF_MEMORY, detail)
        return Reject(RejectReason.CORRUPT, f"crashed its decoder twice ({_cause(again.status)})")

    def end(self) -> None:
        """End the process; another image would start it again."""
        running, self._running = self._running, None
        if running:
            running.connection.close()
            running.desk.close()
            running.tray.close()
            running.process.kill()
            running.process.wait()

    def _ask(self, images: Sequence[Bytes]) -> list[Decoded | Reject] | _Death:
        """Return the answers, or how the child ended before it gave them."""
        running = self._running or self._start()
        try:
            num_bytes = _put(running.desk, images)
            running.connection.send([len(data) for data in images])
            answers: list[tuple[int, int] | Reject] = running.connection.recv()
        except (EOFError, ConnectionError):
            self.num_deaths += 1
            return self._death(running)
        except BaseException:  # interrupted in the middle: the answer to these images must not meet the next ones
            self.end()
            raise
        if num_bytes > _DESK_BYTES:
            os.ftruncate(running.desk.fileno(), _DESK_BYTES)
        pixels = self._take_pixels(running, len(images))
        return [
            answer if isinstance(answer, Reject) else Decoded(pixels[index], *answer)
            for index, answer in enumerate(answers)
        ]

    def _take_pixels(self, running: _Running, num_images: int) -> Pixels:
        size = self._task[1].size
        pixels = np.empty((num_images, 3, size, size), np.uint8)
        os.preadv(running.tray.fileno(), [pixels.data], _TRAY_HEAD)
        return pixels

    def _death(self, running: _Running) -> _Death:
        status = running.process.wait()
        place = int.from_bytes(os.pread(running.tray.fileno(), 8, 0), "little")
        self.end()
        return _Death(place, status)

    def _start(self) -> _Running:
        """Return a child that has answered. Raises JobError for one that dies before, however often it is started."""
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
        desk, tray = _memory_file(), _memory_file()
        files = theirs.fileno(), desk.fileno(), tray.fileno()
        command = [sys.executable, "-c", _BOOT, *map(str, files), *sys.path]
        process = subprocess.Popen(
            command,
            env={**os.environ, **ENVIRONMENT},
            pass_fds=files,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )
        theirs.close()
        return _Running(process, ours, desk, tray)


def serve(connection_fileno: int, desk: int, tray: int) -> None:
    """Answer images until the parent hangs up: what a child process runs."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, who then hangs up
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGALRM})
    _silence_libraries()
    with Connection(connection_fileno) as connection, suppress(EOFError, ConnectionError):
        decode_one, preprocessing, config = connection.recv()
        _limit_memory(_BYTES_AT_LEAST + _BYTES_A_PIXEL * config.max_image_pixels)
        connection.send(None)
        while True:
            lengths = connection.recv()
            ends = np.cumsum(lengths).tolist()
            answers: list[tuple[int, int] | Reject] = []
            for index, (length, end) in enumerate(zip(lengths, ends, strict=True)):
                os.pwrite(tray, index.to_bytes(8, "little"), 0)
                data = os.pread(desk, length, end - length)
                signal.setitimer(signal.ITIMER_REAL, config.decode_timeout_s)
                outcome = decode_one(data, preprocessing, config)
                signal.setitimer(signal.ITIMER_REAL, 0)
                if isinstance(outcome, Decoded):
                    os.pwrite(tray, outcome.pixels.data, _TRAY_HEAD + index * outcome.pixels.nbytes)
                    answers.append((outcome.width, outcome.height))
                else:
                    answers.append(outcome)
            connection.send(answers)


def _limit_memory(num_bytes: int) -> None:
    """Let what asks for more get a MemoryError, and let the kernel, if it must end some process, end this one first."""
    most = resource.getrlimit(resource.RLIMIT_DATA)[1]
    if most == resource.RLIM_INFINITY or num_bytes < most:
        resource.setrlimit(resource.RLIMIT_DATA, (num_bytes, num_bytes))
    with suppress(OSError):  # only Linux has it
        Path("/proc/self/oom_score_adj").write_text("1000")


def _silence_libraries() -> None:
    """Let libtiff and its like talk to nobody; Python's own stderr stays."""
    sys.stderr = os.fdopen(os.dup(2), "w", buffering=1)
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 2)
    os.close(silence)


def _put(desk: BinaryIO, images: Sequence[Bytes]) -> int:
    """Lay the images behind each other and return their bytes."""
    num_bytes = 0
    for data in images:
        num_bytes += os.pwrite(desk.fileno(), data, num_bytes)
    return num_bytes


def _memory_file() -> BinaryIO:
    if hasattr(os, "memfd_create"):
        return os.fdopen(os.memfd_create("images"), "r+b", buffering=0)
    return tempfile.TemporaryFile(buffering=0)


def _cause(status: int) -> str:
    return signal.Signals(-status).name if status < 0 else f"exit status {status}"
