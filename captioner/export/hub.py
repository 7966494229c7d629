"""Upload what OUT holds to a data set on the Hugging Face hub, except for what it has already.

Files of an export never change, so a name that is there need not come again: a killed upload continues, and a table
that grew adds its new files. Knows files and no format.
"""

from collections.abc import Iterator
from typing import Any

from captioner.errors import ConfigError, JobError
from captioner.export.record import RESERVED, ExportRecord
from captioner.storage import LocalStore

__all__ = ["push"]

_FILES_A_COMMIT = 100
_BYTES_A_COMMIT = 4 << 30


def push(record: ExportRecord, name: str) -> int:
    """Upload the files that the data set `name` lacks and return how many.

    Raises ConfigError for a name or a token that the hub refuses, JobError where it cannot be reached."""
    from huggingface_hub import HfApi, errors

    api = HfApi()
    try:
        api.create_repo(name, repo_type="dataset", private=True, exist_ok=True)
        there = set(api.list_repo_files(name, repo_type="dataset"))
        return sum(_commit(api, record, name, files) for files in _commits(record, there))
    except errors.HFValidationError as error:
        raise ConfigError(f"--push-to-hub is {name}; expected a data set's name, as org/name: {error}") from error
    except errors.HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        if status in (401, 403):
            raise ConfigError(
                f"the hub refuses to write {name} (HTTP {status}); set HF_TOKEN to a token that may"
            ) from error
        raise JobError(f"{name} could not be uploaded: {_text(error)}. The same command continues") from error
    except Exception as error:  # whatever the hub's client, and the client below it, raise for a network
        raise JobError(f"the hub cannot be reached for {name}: {_text(error)}. The same command continues") from error


def _text(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]


def _commits(record: ExportRecord, there: set[str]) -> Iterator[list[str]]:
    """Yield the names of the files of each commit."""
    root = record.location.url_with_secrets.rstrip("/") + "/"
    names: list[str] = []
    size_bytes = 0
    for page in record.store.pages(record.location / ""):
        for entry in page:
            below = record.store.path(entry.url).removeprefix(record.store.path(root).rstrip("/") + "/")
            if below in there or below.split("/")[0] in RESERVED or below.startswith("."):
                continue
            names.append(below)
            size_bytes += entry.size_bytes or 0
            if len(names) == _FILES_A_COMMIT or size_bytes >= _BYTES_A_COMMIT:
                yield names
                names, size_bytes = [], 0
    if names:
        yield names


def _commit(api: Any, record: ExportRecord, name: str, files: list[str]) -> int:
    from huggingface_hub import CommitOperationAdd

    added = [CommitOperationAdd(file, _content(record, file)) for file in files]
    message = f"Add {files[0]}" + (f" and {len(files) - 1:,} more" if len(files) > 1 else "")
    api.create_commit(name, added, commit_message=message, repo_type="dataset")
    return len(files)


def _content(record: ExportRecord, file: str) -> Any:
    """Return the path of a local file, or a reader of one on another store."""
    place = record.location / file
    return record.store.path(place) if isinstance(record.store, LocalStore) else record.store.open(place)
