"""Errors of workers as data: Ray hands a worker's exception to the driver as the text of a traceback.

So code in a worker reports its error before it raises, and the driver raises it as the type that it was. Knows
no Ray.
"""

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from captioner import errors
from captioner.errors import CaptionerError, JobError

__all__ = ["WorkerError", "reporting_errors"]


@dataclass(frozen=True)
class WorkerError:
    """An exception as it crosses processes: which of our types it is, JobError for any other, and its message."""

    kind: str
    message: str

    @classmethod
    def of(cls, error: BaseException) -> "WorkerError":
        """Return an exception as data: of one that is not ours the message says its type."""
        if isinstance(error, CaptionerError):
            names = [kind.__name__ for kind in type(error).__mro__]
            return cls(next(name for name in names if name in errors.__all__), str(error))
        text = "".join(traceback.format_exception_only(error)).strip()
        return cls(JobError.__name__, f"the job stopped: {text}")

    def as_exception(self) -> CaptionerError:
        """Return the exception for the driver to raise."""
        kind: type[CaptionerError] = getattr(errors, self.kind)
        return kind(self.message)


@contextmanager
def reporting_errors(report: Callable[[WorkerError], object] | None) -> Iterator[None]:
    """Report what the block raises, then let it go on its way."""
    try:
        yield
    except Exception as error:
        if report is not None:
            report(WorkerError.of(error))
        raise
