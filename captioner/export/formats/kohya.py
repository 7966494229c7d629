"""`kohya`: the metadata JSON of kohya's sd-scripts: the path of an image without its suffix -> caption and tags.

`tags` are the table's own column of that name, if it has one.
"""

from collections.abc import Iterator, Mapping
from typing import IO

from captioner.export.formats.documents import encoded, write_members
from captioner.export.names import file_name
from captioner.export.request import ExportFormat, Refusal, Request, Shard

__all__ = ["KOHYA"]

_TAGS = "tags"


def _columns(request: Request) -> Mapping[str, str]:
    kind = request.kinds.get(_TAGS, "")
    tags = "''" if not kind else "array_to_string(tags, ', ')" if kind.endswith("[]") else "tags::VARCHAR"
    return {"image_id": "image_id", "text": request.text, _TAGS: tags}


def _write(shard: Shard) -> None:
    shard.publish(KOHYA.file_of(shard.number), lambda file: _document(shard, file))


def _document(shard: Shard, file: IO[bytes]) -> None:
    write_members(file, _members(shard), b"{", b"}\n")


def _members(shard: Shard) -> Iterator[bytes]:
    taken: set[int] = set()
    for batch in shard.rows:
        for row in batch.to_pylist():
            name, why = file_name(row["image_id"], "", shard.request.folder)
            if not why and (mark := hash(name)) in taken:
                why = Refusal.TAKEN
            if why:
                shard.refused[why] += 1
                continue
            taken.add(mark)
            entry = {"caption": row["text"], **({_TAGS: row[_TAGS]} if row[_TAGS] else {})}
            yield encoded(name) + b": " + encoded(entry)


KOHYA = ExportFormat(
    name="kohya",
    help="the metadata JSON of kohya's sd-scripts, with the column tags if the table has it",
    columns=_columns,
    write=_write,
    file="captions-{:05d}.json",
)
