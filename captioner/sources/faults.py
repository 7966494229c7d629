"""What went wrong in a store, told apart by whether another try may help and whose fault it is.

Every store has its own exceptions: aiohttp's, botocore's translated by s3fs, gcsfs's and Azure's with a status code,
plain OSErrors. Knows their shapes, imports none of the optional packages, and opens nothing.
"""

import asyncio
import errno
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import aiohttp
from aiohttp.http_exceptions import HttpProcessingError
from botocore import exceptions as botocore  # type: ignore[import-untyped]
from botocore.parsers import ResponseParserError  # type: ignore[import-untyped]

from captioner.errors import JobError, OutputError
from captioner.rows import TRANSIENT_REASONS, Reject, RejectReason
from captioner.sources import urls
from captioner.sources.hosts import UNSAFE

__all__ = ["Fault", "StoreError", "changed", "diagnose", "is_taken", "output_errors"]

_MAX_DETAIL = 300
_TRANSIENT_STATUS = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 509, 520, 521, 522, 523, 524, 529})
_FORBIDDEN_STATUS = frozenset({401, 402, 403, 407, 451})
_MISSING_STATUS = frozenset({404, 410})
_BAD_REQUEST_STATUS = frozenset(range(400, 500)) - _TRANSIENT_STATUS - _FORBIDDEN_STATUS - _MISSING_STATUS
_EXPIRED = frozenset({"ExpiredToken", "ExpiredTokenException", "RequestTimeTooSkewed", "TokenRefreshRequired"})
_SLOW = frozenset({"SlowDown", "Throttling", "ThrottlingException", "RequestLimitExceeded", "RequestTimeout"})
_TRANSIENT_ERRNO = frozenset(
    {
        *(errno.EAGAIN, errno.EBUSY, errno.EIO, errno.EINTR, errno.ETIMEDOUT, errno.ESTALE),
        *(errno.EREMOTEIO, errno.ENETDOWN, errno.ENETUNREACH, errno.EHOSTUNREACH, errno.EMFILE, errno.ENFILE),
    }
)
_MISSING_ERRNO = frozenset({errno.ENAMETOOLONG, errno.ELOOP, errno.ENXIO})


@dataclass(frozen=True)
class Fault:
    """One failed access: the reason a row would carry, what was seen, and whether to try again."""

    reason: RejectReason
    detail: str
    is_transient: bool = False
    retry_after_s: float = 0.0
    is_of_bucket: bool = False
    """Whether not the object but its whole bucket is missing."""

    @property
    def reject(self) -> Reject:
        """What stands in place of the image."""
        return Reject(self.reason, self.detail)

    @property
    def reject_of_unit(self) -> Reject:
        """What stands in place of the rows of a unit: it was there when it was frozen, so to be gone may pass."""
        is_told = self.reason in TRANSIENT_REASONS or self.reason == RejectReason.CORRUPT
        return Reject(self.reason if is_told else RejectReason.FETCH_FAILED, self.detail)


def changed(how: str) -> Fault:
    """Return the fault of a unit that is not the one that was frozen."""
    return Fault(RejectReason.CHANGED, f"changed since the job began: {how}; put it back, or caption it anew elsewhere")


class StoreError(OSError):
    """A store did not deliver, after every retry; `fault` says why."""

    def __init__(self, fault: Fault) -> None:
        super().__init__(f"{fault.reason}: {fault.detail}")
        self.fault = fault


@contextmanager
def output_errors(url: str) -> Iterator[None]:
    """Turn a StoreError into one that names the output: OutputError, or JobError where another try may help."""
    try:
        yield
    except StoreError as error:
        where = urls.redact(url)
        if error.fault.is_transient:
            raise JobError(f"output {where} cannot be reached: {error.fault.detail}") from error
        raise OutputError(
            f"output {where} cannot be read or written: {error.fault.detail}; expected a folder, on a store that these"
            " credentials may write to"
        ) from error


def diagnose(error: BaseException) -> Fault:
    """Return what an exception of any store means for the row or unit that was being read."""
    if isinstance(error, StoreError):
        return error.fault
    if isinstance(error, FileNotFoundError) and isinstance(error.__cause__, aiohttp.ClientError | TimeoutError):
        error = error.__cause__  # fsspec calls whatever a web server does when asked for a file's size "not found"
    detail = _detail(error)
    if UNSAFE in detail:
        return Fault(RejectReason.UNSAFE_URI, detail)
    if (code := _code(error)) in _EXPIRED | _SLOW:
        return Fault(RejectReason.FETCH_FAILED, f"{code}: {detail}"[:_MAX_DETAIL], is_transient=True)
    if _is_hopeless(error):
        return Fault(RejectReason.UNREACHABLE, detail)
    if status := _status(error):
        fault = _by_status(status, detail, _retry_after_s(error))
        return replace(fault, is_of_bucket=code == "NoSuchBucket")
    return _by_type(error, detail)


def is_taken(error: BaseException) -> bool:
    """Say whether a store refused an exclusive write because something stands there already."""
    return isinstance(error, FileExistsError) or _status(error) == 412 or _code(error) == "BlobAlreadyExists"


def _detail(error: BaseException) -> str:
    text = " ".join(str(error).split()) or "no message"
    return urls.printable(urls.redact(f"{type(error).__name__}: {text}"))[:_MAX_DETAIL]


def _causes(error: BaseException) -> Iterator[BaseException]:
    seen: BaseException | None = error
    for _ in range(4):
        if seen is None:
            return
        yield seen
        seen = seen.__cause__


def _response(error: BaseException) -> dict[str, dict[str, object]]:
    """Return botocore's parsed answer, which s3fs leaves on the cause of its own exceptions."""
    responses = (getattr(cause, "response", None) for cause in _causes(error))
    return next((response for response in responses if isinstance(response, dict)), {})


def _code(error: BaseException) -> str:
    return str(_response(error).get("Error", {}).get("Code", ""))


def _status(error: BaseException) -> int | None:
    if any(isinstance(cause, HttpProcessingError) for cause in _causes(error)):
        return None  # no answer that could be read; the code that it carries, 400, is its parser's
    if isinstance(error, aiohttp.ClientError):  # as does a body that was cut short
        return getattr(error, "status", None)
    status = _response(error).get("ResponseMetadata", {}).get("HTTPStatusCode")
    found = [status, *(getattr(cause, name, None) for cause in _causes(error) for name in ("status_code", "code"))]
    return next((value for value in found if isinstance(value, int) and 300 <= value < 600), None)


def _is_hopeless(error: BaseException) -> bool:
    """Say whether a web server is not there, is not who it says, or will not take this request: not now, not later."""
    if isinstance(error, aiohttp.ClientConnectorCertificateError | aiohttp.TooManyRedirects):
        return True
    if isinstance(error, aiohttp.ClientConnectorError):  # the name server knows for certain that there is no such host
        return any(isinstance(cause, socket.gaierror) and cause.errno == socket.EAI_NONAME for cause in _causes(error))
    status = _status(error) if isinstance(error, aiohttp.ClientResponseError) else None
    return status in _BAD_REQUEST_STATUS


def _by_status(status: int, detail: str, retry_after_s: float) -> Fault:
    detail = f"HTTP {status}, {detail}"[:_MAX_DETAIL]
    if status in _MISSING_STATUS:
        return Fault(RejectReason.MISSING, detail)
    if status in _FORBIDDEN_STATUS:
        return Fault(RejectReason.FORBIDDEN, detail)
    return Fault(RejectReason.FETCH_FAILED, detail, status in _TRANSIENT_STATUS, retry_after_s)


def _by_type(error: BaseException, detail: str) -> Fault:
    number = getattr(error, "errno", None)
    if isinstance(error, FileNotFoundError | NotADirectoryError | IsADirectoryError) or number in _MISSING_ERRNO:
        return Fault(RejectReason.MISSING, detail)
    if isinstance(error, PermissionError | botocore.NoCredentialsError | botocore.PartialCredentialsError):
        return Fault(RejectReason.FORBIDDEN, detail)
    if isinstance(error, aiohttp.InvalidURL | UnicodeError) or type(error) is ValueError:
        return Fault(RejectReason.MISSING, detail)  # no object can have such a name
    return Fault(RejectReason.FETCH_FAILED, detail, _may_pass(error, number))


def _may_pass(error: BaseException, number: int | None) -> bool:
    if any(isinstance(cause, socket.gaierror) and cause.errno == socket.EAI_NONAME for cause in _causes(error)):
        return False  # the name server knows for certain that there is no such host
    if isinstance(error, aiohttp.ClientSSLError):
        return False
    passing = (TimeoutError, asyncio.TimeoutError, ConnectionError, EOFError, aiohttp.ClientError)
    stores = (botocore.HTTPClientError, botocore.ConnectionError, ResponseParserError)
    return isinstance(error, (*passing, *stores)) or (number in _TRANSIENT_ERRNO)


def _retry_after_s(error: BaseException) -> float:
    headers = getattr(error, "headers", None) or _response(error).get("ResponseMetadata", {}).get("HTTPHeaders") or {}
    text = headers.get("retry-after", "") if hasattr(headers, "get") else ""
    return float(text) if str(text).isdecimal() else 0.0
