"""Images of a table whose folder was moved or copied: where each is now, below a folder that the user names.

Knows where the job read from, by the table's identity; reads no image.
"""

import re
from dataclasses import dataclass, replace

import pyarrow as pa

from captioner.inputs import Unit
from captioner.schema import RejectReason
from captioner.storage import Location, urls
from captioner.storage.faults import Fault, StoreError
from captioner.storage.urls import redact

__all__ = ["MovedImages"]

_WILD = re.compile(r"[{*?\[]")


@dataclass(frozen=True)
class MovedImages:
    """Another folder in place of the one that a job read."""

    before: tuple[str, ...]
    """Folders whose images are looked for below the other one, each with a slash; the first that fits counts."""

    now: Location

    @classmethod
    def of(cls, input_path: str, now: Location) -> "MovedImages":
        """Return the move of a job's input: a folder, or the folder of a file, list or pattern."""
        plain = _WILD.split(input_path)[0]
        folders = [urls.parent(plain + ".")] if plain != input_path else [plain.rstrip("/"), urls.parent(plain)]
        return cls(tuple(folder + "/" for folder in folders if folder), now.folder)

    def moved(self, url: str, *, may_be_new: bool = False) -> str | None:
        """Return where an image or file is now; None if it did not lie in the job's folder. Stays below the new one.

        may_be_new: whether the URL may be one of the new folder: a relative one, read from a file that was moved."""
        root = self.now.url_with_secrets.rstrip("/") + "/"
        for folder in (root, *self.before) if may_be_new else (*self.before, root):
            if url.startswith(folder):
                below = url.removeprefix(folder)
                return root + below if urls.is_inside(below) else None
        return None

    def unit(self, unit: Unit) -> Unit:
        """Return a tar or Parquet file at its new place. Raises StoreError if it did not lie in the job's folder."""
        if unit.kind == "listing" or unit.reject is not None:
            return unit
        if (path := self.moved(unit.path)) is None:
            raise StoreError(Fault(RejectReason.MISSING, _why_not(unit.path)))
        return replace(unit, path=path)

    def rows(self, rows: pa.Table, *, may_be_new: bool) -> pa.Table:
        """Return rows of `source_schema` with the URIs of now; one that did not lie in the job's folder is a reject."""
        uris = rows.column("uri").to_pylist()
        moved = [None if uri is None else self.moved(uri, may_be_new=may_be_new) for uri in uris]
        lost = [uri is not None and new is None for uri, new in zip(uris, moved, strict=True)]
        reasons = [
            str(RejectReason.MISSING) if is_lost else reason
            for is_lost, reason in zip(lost, rows.column("reason").to_pylist(), strict=True)
        ]
        details = [
            _why_not(str(uri)) if is_lost else detail
            for is_lost, uri, detail in zip(lost, uris, rows.column("detail").to_pylist(), strict=True)
        ]
        for name, values in (("uri", moved), ("reason", reasons), ("detail", details)):
            place = rows.schema.get_field_index(name)
            rows = rows.set_column(place, rows.schema.field(place), pa.array(values, pa.string()))
        return rows


def _why_not(url: str) -> str:
    return f"{redact(url)} does not lie where the job read its images, in whose place --image-root stands"
