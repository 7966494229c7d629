"""`txt`: a text file an image, in a tree like that of the images or beside each image; a caption a line.

A file that is there with other contents is never replaced: the row is refused. So of two images that share a name the
first one gets the file.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

import pyarrow as pa

from captioner.export.names import file_name, stem
from captioner.export.request import ExportFormat, Refusal, Shard
from captioner.export.text import one_a_line
from captioner.storage import Location, Store, full_url, open_store, urls

__all__ = ["TXT"]

_SUFFIX = ".txt"
_WRITERS = 16  # they wait for the disk or store
_AT_ONCE = 1024


def _write(shard: Shard) -> None:
    is_beside, stores = shard.request.config.names == "beside", _Stores()
    with ThreadPoolExecutor(_WRITERS) as writers:
        for batch in shard.rows:
            names = _beside(shard, batch) if is_beside else _in_tree(shard, batch)
            for start in range(0, batch.num_rows, _AT_ONCE):
                files = _files(shard, batch.slice(start, _AT_ONCE), names)
                for is_ours in writers.map(lambda file: stores.create(*file), files.items()):
                    shard.refused.update([] if is_ours else [Refusal.TAKEN])


def _in_tree(shard: Shard, rows: pa.RecordBatch) -> Iterator[tuple[Location, str]]:
    """Yield the place of each row's file below OUT, and why it can have none."""
    for image_id in rows.column("image_id").to_pylist():
        name, why = file_name(image_id, _SUFFIX, shard.request.folder)
        yield shard.request.output / name, why


def _beside(shard: Shard, rows: pa.RecordBatch) -> Iterator[tuple[Location, str]]:
    """Yield the place of each row's file beside its image, and why it can have none."""
    images = shard.request.images
    for _, uri in images.uris(rows.column("key").to_numpy()):
        place = stem(uri, keep_scheme=True) + _SUFFIX
        yield Location(place, images.images.access.storage_options), "" if uri else Refusal.NO_FILE


def _files(shard: Shard, rows: pa.RecordBatch, names: Iterator[tuple[Location, str]]) -> dict[Location, bytes]:
    """Return place -> contents of the files of some rows, the first of each place."""
    files: dict[Location, bytes] = {}
    for (place, why), texts in zip(islice(names, rows.num_rows), rows.column("texts").to_pylist(), strict=True):
        if why := why or (Refusal.TAKEN if place in files else ""):
            shard.refused[why] += 1
        else:
            files[place] = one_a_line(texts)
    return files


class _Stores:
    """The stores that files are created in: one a server, for the images of a list may lie on several."""

    def __init__(self) -> None:
        self._opened: dict[tuple[str, str], Store] = {}

    def create(self, place: Location, data: bytes) -> bool:
        """Return whether the file now holds this: it did not exist, or an earlier try made it."""
        server = urls.server(full_url(place))
        if (store := self._opened.get(server)) is None:
            store = self._opened[server] = open_store(place)
        return store.write_new(place, data)


TXT = ExportFormat(
    name="txt",
    help="NAME.txt for each image, in a tree below OUT or beside the image",
    columns=lambda request: {"image_id": "image_id", "texts": request.texts},
    write=_write,
    rows_per_file=10_000,
    has_several=True,
)
