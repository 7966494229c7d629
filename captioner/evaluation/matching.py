"""Captions of each side by image, and which of them belong together.

Image ids and captions as word numbers stay in memory; the texts of captions only if CLIP has to read
them. Knows nothing of file formats.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from captioner.config import EvaluateConfig
from captioner.errors import InputError
from captioner.evaluation.caption_files import CaptionRow
from captioner.evaluation.metrics import CaptionEncoder, EncodedCaptions, IntArray
from captioner.storage.urls import redact

__all__ = ["RULES", "Captions", "Matching", "match", "match_sides"]

RULES = {
    "id": "image_id",
    "name": "file name without folder and suffix",
    "number": "number at the end of the file name",
}
"""From strict to lenient: when two names mean the same image."""

_NUM_EXAMPLES = 3
_ROW_TYPES = {"caption": pa.large_string(), "key": pa.int64(), "clip_score": pa.float64()}


@dataclass(frozen=True)
class Captions:
    """Captions of one side, and the image of each.

    image: int64[C], the image of each caption, an index of image_ids. file_names: image_id -> another name of it."""

    image_ids: pa.Array
    image: IntArray
    texts: EncodedCaptions
    file_names: Mapping[str, str] = field(default_factory=dict)
    rows: pa.Table = field(default_factory=lambda: pa.table(dict[str, pa.Array]()))
    """The columns asked for, of each caption: its text, and its `key` and `clip_score` in a caption table."""

    @property
    def num_images(self) -> int:
        """Number of distinct images."""
        return len(self.image_ids)

    @staticmethod
    def read(
        rows: Iterator[CaptionRow], encoder: CaptionEncoder, columns: Sequence[str] = (), *, rows_per_batch: int = 8192
    ) -> "Captions":
        """Return all rows, read a batch at a time. columns: those of `rows`."""
        schema = pa.schema([(name, _ROW_TYPES[name]) for name in columns])
        ids, file_names, kept = [], dict[str, str](), [schema.empty_table()]

        def captions() -> Iterator[str]:
            while batch := list(islice(rows, rows_per_batch)):
                ids.append(pa.array([row.image_id for row in batch], pa.large_string()))
                file_names.update({row.image_id: row.file_name for row in batch if row.file_name})
                kept.append(pa.table([[getattr(row, name) for row in batch] for name in columns], schema))
                yield from (row.caption for row in batch)

        texts = encoder.encode(captions())
        coded = pa.chunked_array(ids, pa.large_string()).combine_chunks().dictionary_encode()
        image = coded.indices.to_numpy().astype(np.int64)
        return Captions(coded.dictionary, image, texts, file_names, pa.concat_tables(kept))

    def with_words(self) -> "Captions":
        """Return the captions that have a word in them, and their images."""
        kept = np.flatnonzero(self.texts.lengths)
        if len(kept) == len(self.image):
            return self
        present, image = np.unique(self.image[kept], return_inverse=True)
        rows = self.rows.take(pa.array(kept))
        return Captions(self.image_ids.take(pa.array(present)), image, self.texts.take(kept), self.file_names, rows)


# Which caption belongs to which references


@dataclass(frozen=True)
class Matching:
    """Rows of captions and the images of references that they belong to: int64[N] twice, each image once."""

    rule: str
    rows: IntArray
    images: IntArray
    num_unmatched: int
    """Captions without references."""

    num_repeated: int
    """Further captions of an image; the first counts."""

    unmatched_examples: list[str]


def match_sides(captions: Captions, references: Captions, config: EvaluateConfig) -> Matching:
    """Return which captions have references, by the rule asked for or the one that finds most.

    Raises InputError where a side is empty, or no caption has a reference."""
    for side, path in ((captions, config.captions), (references, config.references)):
        if not side.num_images:
            raise InputError(f"{redact(path)} holds no caption; expected at least one")
    rules = RULES if config.match_by == "auto" else [config.match_by]
    matchings = [match(captions, references, rule) for rule in rules]
    best = min(matchings, key=lambda matching: matching.num_unmatched)  # the first of equals is the strictest
    if not len(best.rows):
        how = " or ".join(RULES[rule] for rule in rules)
        raise InputError(
            f"no caption has a reference by {how}: {redact(config.captions)} has {_examples(captions.image_ids)};"
            f" {redact(config.references)} has {_examples(references.image_ids)}. Expected names of the same images:"
            " check that both are of the same data, or give the captions the references' image_id"
        )
    return best


def match(captions: Captions, references: Captions, rule: str) -> Matching:
    """Return which captions have references when images are the same by `rule`: id, name or number.

    A name that two images of one side share matches neither; of several captions of an image the first counts."""
    of_captions, of_references = (_owners(*_names(side), rule) for side in (captions, references))
    found = pc.index_in(of_captions.column("name"), value_set=of_references.column("name"))
    image = of_references.column("owner").take(found).fill_null(-1).to_numpy()
    owner = of_captions.column("owner").to_numpy()
    lowest, highest = np.full(captions.num_images, references.num_images), np.full(captions.num_images, -1)
    np.minimum.at(lowest, owner[image >= 0], image[image >= 0])
    np.maximum.at(highest, owner, image)
    image_of = np.where(lowest == highest, highest, -1)  # two names of an image may lead to one reference only
    return _first_rows(captions, image_of, rule)


def _names(side: Captions) -> tuple[pa.Array, IntArray]:
    """Return every name of every image of a side, and the image of each."""
    aliases = pa.array(list(side.file_names), pa.large_string())
    owners = pc.index_in(aliases, value_set=side.image_ids).fill_null(-1).to_numpy()
    names = pa.concat_arrays([side.image_ids, pa.array(side.file_names.values(), pa.large_string())])
    return names, np.concatenate([np.arange(side.num_images), owners])


def _first_rows(captions: Captions, image_of: IntArray, rule: str) -> Matching:
    image = image_of[captions.image]
    matched = np.flatnonzero(image >= 0)
    images, first = np.unique(image[matched], return_index=True)
    unmatched = captions.image_ids.take(pa.array(np.flatnonzero(image_of < 0)[:_NUM_EXAMPLES])).to_pylist()
    return Matching(
        rule=rule,
        rows=matched[first],
        images=images,
        num_unmatched=len(image) - len(matched),
        num_repeated=len(matched) - len(first),
        unmatched_examples=unmatched,
    )


def _owners(names: pa.Array, owners: IntArray, rule: str) -> pa.Table:
    """Return the names that one image alone has by this rule, and that image: columns `name` and `owner`."""
    table = pa.table({"name": _reduce(names, rule), "owner": owners})
    table = table.filter(pc.and_(pc.is_valid(table.column("name")), pc.greater_equal(table.column("owner"), 0)))
    grouped = table.group_by("name").aggregate([("owner", "min"), ("owner", "max")])
    is_alone = pc.equal(grouped.column("owner_min"), grouped.column("owner_max"))
    return grouped.filter(is_alone).select(["name", "owner_min"]).rename_columns(["name", "owner"]).combine_chunks()


def _reduce(names: pa.Array, rule: str) -> pa.Array:
    """Return the part of each name that must be equal for two names to mean the same image; null for none."""
    if rule == "id":
        return names
    plain = pc.replace_substring_regex(names, r"^([a-z0-9]+://[^?]*)\?.*$", r"\1")  # the signature of a URL
    plain = pc.replace_substring_regex(plain, r"^.*/", "")
    plain = pc.replace_substring_regex(plain, r"(?i)(.)\.[a-z0-9]*[a-z][a-z0-9]*$", r"\1")
    if rule == "name":
        return plain
    # `file.parquet#12` is a row of a table that names no images: its number says nothing.
    number = pc.extract_regex(plain, r"(?:^|[^#0-9])0*(?P<number>[0-9]+)$")
    return pc.struct_field(number, "number")


def _examples(names: pa.Array) -> str:
    return ", ".join(map(repr, names.slice(0, _NUM_EXAMPLES).to_pylist()))
