"""Stand-ins for `decode` that do what a pathological image makes C code do; child processes import them by name."""

import os
import re
import signal

from captioner.config import ImageConfig
from captioner.images import Decoded, Preprocessing, decode
from captioner.rows import Reject


def hang_on_h(data: bytes, preprocessing: Preprocessing, config: ImageConfig) -> Decoded | Reject:
    """Hang in C, the interpreter's lock held, where the bytes say so."""
    if data == b"h":
        re.match(r"(a+)+$", "a" * 60 + "b")
    return decode(data, preprocessing, config)


def crash_on_c(data: bytes, preprocessing: Preprocessing, config: ImageConfig) -> Decoded | Reject:
    if data == b"c":
        os.kill(os.getpid(), signal.SIGSEGV)
    return decode(data, preprocessing, config)
