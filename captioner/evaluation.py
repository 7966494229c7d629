"""What `jobs/evaluate.py` says: how good captions are against references, and whether that is good enough.

Reads both sides part by part; what stays in memory is the image ids, the captions as word numbers and twelve numbers an
image. Knows nothing of metrics but their names, and nothing of file formats.
"""

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from captioner.caption_files import CaptionRow, read_captions
from captioner.config import EvaluateConfig
from captioner.errors import InputError
from captioner.metrics import METRICS, CaptionEncoder, EncodedCaptions, ImageScores, IntArray, score_encoded
from captioner.sources.urls import redact

__all__ = ["RULES", "Captions", "Matching", "evaluate", "match"]

RULES = {
    "id": "image_id",
    "name": "file name without folder and suffix",
    "number": "number at the end of the file name",
}
"""From strict to lenient: when two names mean the same image."""

_TITLES = dict(zip(METRICS, ("BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "ROUGE-L", "CIDEr-D"), strict=True))
_ROWS_A_BATCH = 8192
_NUM_EXAMPLES = 3


def evaluate(config: EvaluateConfig) -> Mapping[str, Any]:
    """Return the figures as a summary, `ok` unless one is below its --min; the table for people goes to stderr.

    Raises InputError where a side cannot be read, or no caption has a reference."""
    encoder = CaptionEncoder()
    captions = Captions.read(read_captions(config.captions, config.storage_options), encoder)
    references = Captions.read(read_captions(config.references, config.storage_options), encoder).spoken()
    matching = _matching(captions, references, config)
    place = np.full(references.num_images, -1)
    place[matching.images] = np.arange(len(matching.images))
    scores = score_encoded(captions.texts.take(matching.rows), references.texts, place[references.image])
    summary = _summary(captions, references, matching, scores, config)
    for line in _lines(summary, matching):
        print(line, file=sys.stderr)
    return summary


@dataclass(frozen=True)
class Captions:
    """Captions of one side, and whose they are.

    image: int64[C], the image of each caption, an index of image_ids. file_names: image_id -> another name of it."""

    image_ids: pa.Array
    image: IntArray
    texts: EncodedCaptions
    file_names: Mapping[str, str] = field(default_factory=dict)

    @property
    def num_images(self) -> int:
        """Number of distinct images."""
        return len(self.image_ids)

    @staticmethod
    def read(rows: Iterator[CaptionRow], encoder: CaptionEncoder) -> "Captions":
        """Return all rows, read a batch at a time."""
        ids, texts, file_names = [], [], {}
        while batch := list(islice(rows, _ROWS_A_BATCH)):
            ids.append(pa.array([row.image_id for row in batch], pa.large_string()))
            texts.append(encoder.encode(row.caption for row in batch))
            file_names.update({row.image_id: row.file_name for row in batch if row.file_name})
        coded = pa.chunked_array(ids, pa.large_string()).combine_chunks().dictionary_encode()
        image = coded.indices.to_numpy().astype(np.int64)
        return Captions(coded.dictionary, image, EncodedCaptions.concat(texts), file_names)

    def spoken(self) -> "Captions":
        """Return the captions that have a word in them, and their images."""
        kept = np.flatnonzero(self.texts.lengths)
        present, image = np.unique(self.image[kept], return_inverse=True)
        return Captions(self.image_ids.take(pa.array(present)), image, self.texts.take(kept), self.file_names)


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
    """Captions of an image that had one already; the first counts."""

    unmatched_examples: list[str]


def _matching(captions: Captions, references: Captions, config: EvaluateConfig) -> Matching:
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

    A name that two images of one side share is none's; of several captions of an image the first counts."""
    of_captions = _owners(captions.image_ids, np.arange(captions.num_images), rule)
    aliases = pa.array(list(references.file_names), pa.large_string())
    names = pa.concat_arrays([references.image_ids, pa.array(references.file_names.values(), pa.large_string())])
    owners = pc.index_in(aliases, value_set=references.image_ids).fill_null(-1).to_numpy()
    of_references = _owners(names, np.concatenate([np.arange(references.num_images), owners]), rule)
    found = pc.index_in(of_captions.column("name"), value_set=of_references.column("name"))
    image = of_references.column("owner").take(found).fill_null(-1).to_numpy()
    image_of = np.full(captions.num_images, -1)
    image_of[of_captions.column("owner").to_numpy()] = image
    return _first_rows(captions, image_of, rule)


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
    """Return what must be equal for two names to mean the same image; null for a name that has no such thing."""
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


# What is said


def _summary(
    captions: Captions, references: Captions, matching: Matching, scores: ImageScores, config: EvaluateConfig
) -> dict[str, Any]:
    figures = scores.figures()
    intervals = scores.intervals(num_resamples=config.num_resamples, seed=config.seed)
    share = 1 - matching.num_unmatched / len(captions.image)
    below = [f"{flag} {lowest}" for flag, value, lowest in _gates(config, figures, share) if value < lowest]
    return {
        "ok": not below,
        "images": len(scores),
        **{name: round(value, 6) for name, value in figures.items()},
        "intervals": {name: [round(bound, 6) for bound in bounds] for name, bounds in intervals.items()},
        "below": below,
        "matched_by": matching.rule,
        "captions": len(captions.image),
        "captions_unmatched": matching.num_unmatched,
        "captions_repeated": matching.num_repeated,
        "references": len(references.image),
        "reference_images": references.num_images,
        "reference_images_without_caption": references.num_images - len(scores),
    }


def _gates(config: EvaluateConfig, figures: Mapping[str, float], share: float) -> Iterator[tuple[str, float, float]]:
    """Yield flag, value and lowest value that passes, of each gate that is set."""
    values = {
        "--min-bleu-4": (figures["bleu_4"], config.min_bleu_4),
        "--min-rouge-l": (figures["rouge_l"], config.min_rouge_l),
        "--min-cider": (figures["cider_d"], config.min_cider),
        "--min-matched": (share, config.min_matched),
    }
    for flag, (value, lowest) in values.items():
        if lowest is not None:
            yield flag, value, lowest


def _lines(summary: Mapping[str, Any], matching: Matching) -> Iterator[str]:
    """Yield what people read: what was compared with what, and the figures."""
    yield f"{summary['images']:,} images have a caption and references, matched by {RULES[matching.rule]}"
    examples = ", ".join(matching.unmatched_examples)
    yield from _counted(summary["captions_unmatched"], "captions without references", f", such as {examples}")
    yield from _counted(summary["captions_repeated"], "captions of an image that had one: the first counts", "")
    yield from _counted(summary["reference_images_without_caption"], "images with references but no caption", "")
    yield ""
    yield f"{'':12}{'':>8}   95 % interval"
    for name, title in _TITLES.items():
        low, high = summary["intervals"][name]
        yield f"{title:12}{summary[name]:8.3f}   {low:.3f} .. {high:.3f}"
    yield ""
    yield from (f"below {gate}" for gate in summary["below"])


def _counted(count: int, what: str, examples: str) -> Iterator[str]:
    if count:
        yield f"  {count:,} {what}{examples}"
