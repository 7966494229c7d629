"""What OUT says of itself, so that a rerun continues and nothing is written twice.

    _export.json                     the settings, and each batch: when, from which runs, how many rows, which files
    _export/batch-00001.parquet      the keys of one batch, in order, and the shard that each goes to
    _export/shards/00000012.json     what became of the rows of one shard, once its files are there

A batch is written down before its files are; a shard is recorded after. Knows keys, and no format.
"""

import io
import json
import time
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from captioner.errors import OutputError
from captioner.export.request import Outcome
from captioner.storage import LocalStore, Location, open_store, urls
from captioner.storage.json_text import parse_object
from captioner.storage.parquet import open_parquet_file
from captioner.storage.temporary_files import is_temporary
from captioner.tables.identity import refusal, to_json
from captioner.tables.keys import KeySet
from captioner.tables.lease import Lease, take_lease

__all__ = ["RESERVED", "Batch", "ExportRecord"]

FORMAT = 1
RESERVED = ("_export.json", "_export")
"""Names below OUT that no export writes captions to."""

_BATCH = pa.schema([pa.field("key", pa.int64(), nullable=False), pa.field("shard", pa.int32(), nullable=False)])
_READERS = 16


@dataclass(frozen=True)
class Batch:
    """The rows of one export, in order."""

    number: int
    keys: np.ndarray
    """int64[N], sorted."""

    shards: np.ndarray
    """int32[N], growing: the shard of each key."""

    facts: Mapping[str, Any]
    """What `_export.json` says of it from the start."""

    def keys_of(self, shard: int) -> np.ndarray:
        """Return the keys of one shard."""
        start, stop = np.searchsorted(self.shards, [shard, shard + 1])
        return self.keys[start:stop]

    @property
    def shard_numbers(self) -> list[int]:
        """The numbers of its shards."""
        return list(range(int(self.shards[0]), int(self.shards[-1]) + 1))


class ExportRecord:
    """The record of one OUT."""

    def __init__(self, output: Location) -> None:
        self.location = output
        self.store = open_store(output)
        self.folder = output / "_export"
        self._file = output / "_export.json"

    def lease(self) -> AbstractContextManager[Lease]:
        """Return the lease of OUT: one export at a time writes it. Raises OutputError where another one does."""
        return take_lease(self.store, self.folder, "export")

    # What OUT is

    def refuse_other_files(self, settings: Mapping[str, Any]) -> bool:
        """Return whether OUT is one of these settings already; an export of them may write here. Writes nothing.

        Raises OutputError for another export's OUT, and for a folder with files of others."""
        found = (self.read() or {}).get("settings")
        if found is not None:
            if found != json.loads(to_json(settings)):
                raise OutputError(refusal(self.location, "another export", found, settings, output="OUT"))
            return True
        names = [urls.name(entry.url) for entry in self.store.entries(self.location)]
        others = [name for name in names if name != self.folder.name and not is_temporary(name)]
        if others:
            other = (self.location / others[0]).name
            raise OutputError(
                f"{self.location} holds {other} and no _export.json; expected an empty or new folder, or that of an"
                " earlier export. Choose another OUT"
            )
        return False

    def claim(self, settings: Mapping[str, Any]) -> None:
        """Make OUT one of these settings, unless it is."""
        if not self.refuse_other_files(settings):
            self._write({"format": FORMAT, "settings": settings, "exports": []})

    def remove_temporaries(self, *, everywhere: bool) -> None:
        """Remove what a killed export left half written on a local disk, below OUT or in its usual places alone."""
        if not isinstance(self.store, LocalStore):
            return
        if everywhere:
            entries = [entry for page in self.store.pages(self.location / "") for entry in page]
        else:
            folders = (self.location, self.folder, self.folder / "shards")
            entries = [entry for folder in folders for entry in self.store.entries(folder)]
        for entry in entries:
            if is_temporary(urls.name(entry.url)):
                self.store.remove(entry.url)

    def read(self) -> dict[str, Any] | None:
        """Return what `_export.json` holds; None where there is none."""
        if (data := self.store.read_or_none(self._file)) is None:
            return None
        try:
            return parse_object(data)
        except ValueError as error:
            raise OutputError(
                f"{self._file} is damaged: {error}; expected the JSON that an export wrote. Restore it, or choose"
                " another OUT"
            ) from error

    def _write(self, value: Mapping[str, Any]) -> None:
        self.store.write_atomic(self._file, to_json(value))

    # Batches

    def batches(self, without: Collection[int] = ()) -> Iterator[Batch]:
        """Yield every batch that was written down but those of these numbers, the first one first."""
        for name in sorted(name for name in self.store.names(self.folder) if name.startswith("batch-")):
            number = int(name.removeprefix("batch-").removesuffix(".parquet"))
            if number in without:
                continue
            with open_parquet_file(self.store.read_bytes(self.folder / name)) as file:
                rows, metadata = file.read(), file.metadata.metadata or {}
            yield Batch(
                number=number,
                keys=rows.column("key").to_numpy(),
                shards=rows.column("shard").to_numpy(),
                facts=json.loads(metadata[b"captioner.export"]),
            )

    def add_batch(self, batch: Batch) -> None:
        """Write a batch down: from then on its files are decided."""
        schema = _BATCH.with_metadata({b"captioner.export": json.dumps(batch.facts).encode()})
        buffer = io.BytesIO()
        columns = [pa.array(batch.keys, pa.int64()), pa.array(batch.shards, pa.int32())]
        encodings = {"key": "DELTA_BINARY_PACKED", "shard": "DELTA_BINARY_PACKED"}
        pq.write_table(
            pa.table(columns, schema), buffer, compression="zstd", use_dictionary=False, column_encoding=encodings
        )
        self.store.write_atomic(self.folder / f"batch-{batch.number:05d}.parquet", buffer.getvalue())

    def exported(self) -> tuple[KeySet, int, int]:
        """Return the keys of all batches, the number of the last one, and how many shards they have."""
        keys, number, num_shards = KeySet(), 0, 0
        for batch in self.batches():
            keys.add(batch.keys)
            number, num_shards = batch.number, int(batch.shards[-1]) + 1
        return keys, number, num_shards

    # Shards

    def finished(self) -> set[int]:
        """Return the numbers of the shards whose files are there."""
        names = self.store.names(self.folder / "shards")
        return {int(name.removesuffix(".json")) for name in names if name.endswith(".json") and name[0] != "."}

    def finish(self, outcome: Outcome) -> None:
        """Record that the files of a shard are there."""
        self.store.write_atomic(self.folder / "shards" / f"{outcome.number:08d}.json", to_json(asdict(outcome)))

    def outcomes(self, batch: Batch) -> list[Outcome]:
        """Return what became of the shards of a batch, which are all finished."""

        def read(number: int) -> Outcome:
            return Outcome(**parse_object(self.store.read_bytes(self.folder / "shards" / f"{number:08d}.json")))

        with ThreadPoolExecutor(_READERS) as readers:
            return list(readers.map(read, batch.shard_numbers))

    def finish_batch(self, batch: Batch) -> dict[str, Any]:
        """Add a batch whose shards are all finished to `_export.json`, and return what stands there."""
        outcomes, found = self.outcomes(batch), self.read()
        assert found is not None
        refused: Counter[str] = Counter(batch.facts.get("refused", {}))
        for outcome in outcomes:
            refused.update(outcome.refused)
        entry = {
            **batch.facts,
            "number": batch.number,
            "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "rows": sum(outcome.rows for outcome in outcomes),
            "refused": dict(refused),
            "shards": [batch.shard_numbers[0], batch.shard_numbers[-1]],
            "size_bytes": sum(sum(outcome.files.values()) for outcome in outcomes),
        }
        self.add_entry(entry)
        return entry

    def add_entry(self, entry: Mapping[str, Any]) -> None:
        """Add what one export did to `_export.json`, in place of an entry of the same number."""
        found = self.read() or {}
        others = [one for one in found.get("exports", []) if one.get("number") != entry["number"]]
        self._write({**found, "exports": [*others, entry]})

    def entries(self) -> list[dict[str, Any]]:
        """Return what `_export.json` says of each export that is finished."""
        return list((self.read() or {}).get("exports", []))
