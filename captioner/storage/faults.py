"""Faults of stores: the reason a row gets, and whether another try may help.

Each store raises its own exceptions: aiohttp's, botocore's translated by s3fs, gcsfs's and Azure's with a status code,
plain OSErrors. `diagnose` knows them all. Imports none of the optional packages, and aiohttp and botocore, which take a
fifth of a second, only to tell a fault; opens nothing.
"""

import asyncio
import errno
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from captioner.errors import JobError, OutputError
from captioner.schema import TRANSIENT_REASONS, Reject, RejectReason
from captioner.storage import urls
from captioner.storage.hosts import UNSAFE
from captioner.storage.location import Place, as_location

__all__ = ["ARCHIVED", "ROOM_NEEDED", "Fault", "StoreError", "changed", "diagnose", "is_taken", "output_errors"]

ARCHIVED = "InvalidObjectState"
"""S3's refusal of a single object, which is in an archive: the credentials are right."""

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
_FULL_ERRNO = frozenset({errno.ENOSPC, errno.EDQUOT})
_MISSING_ERRNO = frozenset({errno.ENAMETOOLONG, errno.ELOOP, errno.ENXIO})


_AWS_CREDENTIALS = (
    "expected AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, or, of a public bucket,"
    """ --storage-options '{"anon": true}'"""
)
ROOM_NEEDED = "free some space there, and the same command continues"


@dataclass(frozen=True)
class Fault:
    """A failed access: the reason for a row, the detail, and whether another try may help."""

    reason: RejectReason
    detail: str
    is_transient: bool = False
    retry_after_s: float = 0.0
    is_bucket_missing: bool = False
    """Whether the whole bucket is missing."""

    is_disk_full: bool = False

    @property
    def reject(self) -> Reject:
        """The reject of an image that could not be read."""
        return Reject(self.reason, self.detail)

    @property
    def reject_of_unit(self) -> Reject:
        """The reject of a unit's rows. A missing unit may come back: it existed when the input was frozen."""
        is_kept = self.reason in TRANSIENT_REASONS or self.reason == RejectReason.CORRUPT
        return Reject(self.reason if is_kept else RejectReason.FETCH_FAILED, self.detail)


def changed(how: str) -> Fault:
    """Return the fault of a unit that changed since it was frozen."""
    detail = f"changed since the job began: {how}; restore it, or caption it into a new OUTPUT"
    return Fault(RejectReason.CHANGED, detail)


class StoreError(OSError):
    """A store failed, after all retries; `fault` says why."""

    def __init__(self, fault: Fault) -> None:
        super().__init__(f"{fault.reason}: {fault.detail}")
        self.fault = fault


@contextmanager
def output_errors(output: Place) -> Iterator[None]:
    """Raise a StoreError of the block as OutputError, or JobError where another try may help, naming the output."""
    try:
        yield
    except StoreError as error:
        where = as_location(output)
        if error.fault.is_transient:
            raise JobError(f"output {where} cannot be reached: {error.fault.detail}") from error
        if error.fault.is_disk_full:
            raise JobError(f"output {where} cannot be written: {error.fault.detail}; {ROOM_NEEDED}") from error
        raise OutputError(
            f"output {where} cannot be read or written: {error.fault.detail}; expected a folder, on a store that these"
            " credentials may write to"
        ) from error


def diagnose(error: BaseException) -> Fault:
    """Return the fault that an exception of any store means for the row or unit that was read."""
    if isinstance(error, StoreError):
        return error.fault
    if _is_missing_on_disk(error):
        return Fault(RejectReason.MISSING, _detail(error))
    import aiohttp

    if isinstance(error, FileNotFoundError) and isinstance(error.__cause__, aiohttp.ClientError | TimeoutError):
        error = error.__cause__  # fsspec raises "not found" for any fault of a web server that it asks for a size
    detail = _detail(error)
    if UNSAFE in detail:
        return Fault(RejectReason.UNSAFE_URI, detail)
    if (code := _code(error)) in _EXPIRED | _SLOW:
        return Fault(RejectReason.FETCH_FAILED, f"{code}: {detail}"[:_MAX_DETAIL], is_transient=True)
    if code == ARCHIVED:
        return Fault(RejectReason.FORBIDDEN, f"{code}: {detail}"[:_MAX_DETAIL])
    if _is_permanent(error):
        return Fault(RejectReason.UNREACHABLE, detail)
    if status := _status(error):
        fault = _by_status(status, detail, _retry_after_s(error))
        return replace(fault, is_bucket_missing=code == "NoSuchBucket")
    return _by_type(error, detail)


def _is_missing_on_disk(error: BaseException) -> bool:
    """Return whether the system itself says that there is no such file: often, and no reason to import a client."""
    is_missing = type(error) in (FileNotFoundError, NotADirectoryError)
    return is_missing and getattr(error, "errno", None) is not None and error.__cause__ is None


def is_taken(error: BaseException) -> bool:
    """Return whether a store refused an exclusive write because the file exists."""
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
    """Return botocore's parsed answer, which is on the cause of s3fs's exceptions."""
    responses = (getattr(cause, "response", None) for cause in _causes(error))
    return next((response for response in responses if isinstance(response, dict)), {})


def _code(error: BaseException) -> str:
    return str(_response(error).get("Error", {}).get("Code", ""))


def _status(error: BaseException) -> int | None:
    import aiohttp
    from aiohttp.http_exceptions import HttpProcessingError

    if any(isinstance(cause, HttpProcessingError) for cause in _causes(error)):
        return None  # the answer could not be read; its code, 400, is the parser's
    if isinstance(error, aiohttp.ClientError):  # also raised for a body that was cut short
        return getattr(error, "status", None)
    status = _response(error).get("ResponseMetadata", {}).get("HTTPStatusCode")
    found = [status, *(getattr(cause, name, None) for cause in _causes(error) for name in ("status_code", "code"))]
    return next((value for value in found if isinstance(value, int) and 300 <= value < 600), None)


def _is_permanent(error: BaseException) -> bool:
    """Return whether a web server does not exist, has a wrong certificate, or will never accept this request."""
    import aiohttp

    if isinstance(error, aiohttp.ClientConnectorCertificateError):
        return True
    if isinstance(error, aiohttp.ClientConnectorError):  # the name server says that there is no such host
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
    import aiohttp
    from botocore import exceptions as botocore  # type: ignore[import-untyped]

    number = getattr(error, "errno", None)
    if number in _FULL_ERRNO:
        return Fault(RejectReason.FETCH_FAILED, f"the disk is full, or a quota used up: {detail}", is_disk_full=True)
    if isinstance(error, FileNotFoundError | NotADirectoryError | IsADirectoryError) or number in _MISSING_ERRNO:
        return Fault(RejectReason.MISSING, detail)
    if isinstance(error, botocore.NoCredentialsError | botocore.PartialCredentialsError):
        return Fault(RejectReason.FORBIDDEN, f"{detail}; {_AWS_CREDENTIALS}"[:_MAX_DETAIL])
    if isinstance(error, PermissionError):
        return Fault(RejectReason.FORBIDDEN, detail)
    if isinstance(error, aiohttp.InvalidURL | UnicodeError) or type(error) is ValueError:
        return Fault(RejectReason.MISSING, detail)  # no object can have such a name
    return Fault(RejectReason.FETCH_FAILED, detail, _may_pass(error, number))


def _may_pass(error: BaseException, number: int | None) -> bool:
    import aiohttp
    from botocore import exceptions as botocore
    from botocore.parsers import ResponseParserError  # type: ignore[import-untyped]

    if any(isinstance(cause, socket.gaierror) and cause.errno == socket.EAI_NONAME for cause in _causes(error)):
        return False  # the name server says that there is no such host
    if isinstance(error, aiohttp.ClientSSLError):
        return False
    passing = (TimeoutError, asyncio.TimeoutError, ConnectionError, EOFError, aiohttp.ClientError)
    stores = (botocore.HTTPClientError, botocore.ConnectionError, ResponseParserError)
    return isinstance(error, (*passing, *stores)) or (number in _TRANSIENT_ERRNO)


def _retry_after_s(error: BaseException) -> float:
    headers = getattr(error, "headers", None) or _response(error).get("ResponseMetadata", {}).get("HTTPHeaders") or {}
    text = headers.get("retry-after", "") if hasattr(headers, "get") else ""
    return float(text) if str(text).isdecimal() else 0.0
