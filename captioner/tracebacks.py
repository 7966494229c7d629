"""Our own errors, read back from what Ray hands on of a worker's: a traceback as text.

Knows how Python prints an exception and how Ray wraps it; imports neither Ray nor what raised.
"""

import re

from captioner import errors
from captioner.errors import CaptionerError, JobError

__all__ = ["error_in"]


def error_in(text: str) -> CaptionerError:
    """Return what a worker raised: Ray hands on its traceback, but of its type only the name."""
    found = re.search(r"^captioner\.errors\.(\w+): (.+?)(?=^\S+Error|^ray\.|\Z)", text, re.MULTILINE | re.DOTALL)
    if found:
        kind: type[CaptionerError] = getattr(errors, found.group(1))
        return kind(found.group(2).strip())
    # Ray wraps what a stage raised in an exception of its own, which says nothing and stands last.
    lines = [line for line in text.splitlines() if re.match(r"(?!ray\.)[\w.]+(Error|Exception|Interrupt)\b", line)]
    return JobError(f"the job stopped: {lines[-1] if lines else text.strip()}")
