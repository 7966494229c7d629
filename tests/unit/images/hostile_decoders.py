"""Replacements for `decode` with the faults of C code on a pathological image; child processes import them by name."""

import ctypes
import os
import signal
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import patch

from captioner.config import ImageConfig
from captioner.images import Decoded, Preprocessing, decode
from captioner.schema import Reject


def hang_on_h(data: bytes, preprocessing: Preprocessing, config: ImageConfig) -> Decoded | Reject:
    """Hang in C, holding the interpreter's lock, for the bytes `h`."""
    if data == b"h":
        ctypes.PyDLL(None).sleep(600)
    return decode(data, preprocessing, config)


def hang_always(data: bytes, preprocessing: Preprocessing, config: ImageConfig) -> Decoded | Reject:
    """Hang in C whatever the bytes are."""
    return hang_on_h(b"h", preprocessing, config)


def crash_on_c(data: bytes, preprocessing: Preprocessing, config: ImageConfig) -> Decoded | Reject:
    if data == b"c":
        os.kill(os.getpid(), signal.SIGSEGV)
    return decode(data, preprocessing, config)


def killed_on_k(data: bytes, preprocessing: Preprocessing, config: ImageConfig) -> Decoded | Reject:
    """End as the kernel ends a process when the machine has no memory left."""
    if data == b"k":
        os.kill(os.getpid(), signal.SIGKILL)
    return decode(data, preprocessing, config)


def killed_once(data: bytes, preprocessing: Preprocessing, config: ImageConfig) -> Decoded | Reject:
    """End so at an image behind `once:PATH|`, unless that file is there, and make it."""
    if data.startswith(b"once:"):
        marker, _, data = data.removeprefix(b"once:").partition(b"|")
        if not (file := Path(os.fsdecode(marker))).exists():
            file.touch()
            os.kill(os.getpid(), signal.SIGKILL)
    return decode(data, preprocessing, config)


def greedy_on_g(data: bytes, preprocessing: Preprocessing, config: ImageConfig) -> Decoded | Reject:
    """Ask for far more memory than any image that is allowed needs, as a bomb does."""
    with patch("PIL.Image.open", lambda *_, **__: bytearray(8 << 30)) if data == b"g" else nullcontext():
        return decode(data, preprocessing, config)
