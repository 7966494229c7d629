"""What a user may set: frozen dataclasses, checked once when they are made.

Flags, `--config` files, help texts and `_run/` are all made from these, so that they never drift. Knows no torch and
no Ray; a bad value raises `ConfigError`. A second line of a field's docstring begins a sentence: the help page breaks
its lines there.
"""

import math
import re
from dataclasses import dataclass, field, replace
from typing import Annotated, Literal, get_args

from tyro.conf import Positional, arg

from captioner.errors import ConfigError

__all__ = [
    "MAX_CARDS",
    "CaptionJobConfig",
    "DecodingConfig",
    "EvaluateConfig",
    "FitConfig",
    "FitModelConfig",
    "FitResourceConfig",
    "FitTargetConfig",
    "GalleryConfig",
    "ImageConfig",
    "InputConfig",
    "LabelsConfig",
    "ModelConfig",
    "PlanConfig",
    "QueryConfig",
    "ResourceConfig",
    "ScoringConfig",
    "TrainingConfig",
    "VerifyConfig",
]

MAX_CARDS = 5_000  # a page of more is one that no browser likes
_DAY_S = 86_400  # no timer of the system takes any number, and infinity least of all

InputFormat = Literal["auto", "files", "list", "parquet", "webdataset"]
LabelsFormat = Literal["auto", "parquet", "csv", "tsv", "jsonl", "json", "token", "webdataset"]
MatchRule = Literal["auto", "id", "name", "number"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Ranking = Literal["logprob", "clip-score"]
RowFormat = Literal["auto", "table", "csv", "json", "parquet"]


@dataclass(frozen=True, kw_only=True)
class InputConfig:
    """Where the images are and which of their columns to use."""

    input_format: InputFormat = "auto"
    """What INPUT is. `auto` goes by its name: .parquet is a table, .tar a shard, .txt and .csv are lists of URIs.
    A folder is what most of its files are: images, tars or Parquet. The others are left out and counted."""

    image_column: str | None = None
    """Column of a table that holds the image: bytes, Hugging Face's struct<bytes, path>, or a URI.
    By default the only column that can be one."""

    id_column: str | None = None
    """Column that names each image in the output. By default the URI, the tar member, or file#row."""

    keep_columns: tuple[str, ...] = ()
    """Input columns to carry into the output; `a=b` keeps column a under the name b.
    For tars: a member's extension (`txt`) or a key of its .json."""

    storage_options: dict[str, object] = field(default_factory=dict)
    """fsspec options of the input's store, as JSON. By default the usual environment variables. Never written down."""

    output_storage_options: dict[str, object] | None = None
    """fsspec options of the output's store, as JSON.
    By default those of the input, when both are on the same kind of store or the input is local."""

    allow_local_uris: bool = False
    """Follow local paths, and loopback or link-local hosts, that a remote list points to."""

    limit: int | None = None
    """Caption only the first N images of the input. A later run without it continues."""

    def __post_init__(self) -> None:
        _check(self.limit is None or self.limit > 0, "--limit", self.limit, "at least 1")
        names = list(self.kept)
        repeated = sorted({name for name in names if names.count(name) > 1})
        _check(not repeated, "--keep-columns", ",".join(self.keep_columns), "each new name once")

    @property
    def kept(self) -> dict[str, str]:
        """Name in the output -> name in the input, of each kept column."""
        pairs = [name.partition("=") for name in self.keep_columns]
        return {new or old: old for old, _, new in pairs}


@dataclass(frozen=True, kw_only=True)
class ImageConfig:
    """How bytes become pixels, and what is refused."""

    max_image_bytes: int = 64 << 20
    """Largest image file that is fetched, in bytes; a larger one is a `too_large` row."""

    max_image_pixels: int = 100_000_000
    """Largest image that is decoded, in pixels; a larger one is a `too_many_pixels` row (decompression bombs)."""

    decode_timeout_s: float = 20.0
    """Time one image may take to decode, in seconds."""

    fetch_timeout_s: float = 60.0
    """Time one image may take to arrive, all retries included, in seconds."""

    fetch_retries: int = 4
    """Times a throttled, reset or timed-out fetch is tried again, with growing pauses."""

    fetch_concurrency: int = 32
    """Images that one CPU worker fetches at the same time."""

    fast_decode: bool = False
    """Decode JPEGs at the smallest scale that covers the model's input: faster, but pixels are off by more."""

    def __post_init__(self) -> None:
        for name in ("max_image_bytes", "max_image_pixels", "fetch_concurrency"):
            _check(getattr(self, name) > 0, _flag(name), getattr(self, name), "more than 0")
        for name in ("decode_timeout_s", "fetch_timeout_s"):
            is_time = 0 < getattr(self, name) <= _DAY_S
            _check(is_time, _flag(name), getattr(self, name), f"more than 0, at most {_DAY_S} (a day)")
        _check(self.fetch_retries >= 0, "--fetch-retries", self.fetch_retries, "0 or more")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which model captions, and where its numbers live."""

    model: str = "demo"
    """A bundle: `demo`, a folder on any store, or a LLaVA checkpoint of CLIP and LLaMA-3 by hub name or path."""

    prompt: str | None = None
    """What to ask a LLaVA checkpoint, with `{image}` for the picture; by default it is asked for one sentence."""

    dtype: Dtype = "auto"
    """Number format of the weights. `auto`: bfloat16 on a GPU, float32 on a CPU."""

    device: str = "auto"
    """`auto`: the worker's GPU, or the CPU when it has none."""

    def __post_init__(self) -> None:
        is_device = re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", self.device) is not None
        _check(is_device, "--device", self.device, "auto, cpu, mps, cuda or cuda:N")


@dataclass(frozen=True, kw_only=True)
class DecodingConfig:
    """How tokens are chosen. Names and meanings are those of transformers' `GenerationConfig`."""

    max_new_tokens: int = 64
    """Longest caption, in tokens; a caption cut here has finish_reason `length`."""

    min_new_tokens: int = 0
    """Tokens before which the end token is not allowed."""

    do_sample: bool = False
    """Draw tokens instead of taking the most probable one. The draw depends on seed and image only."""

    temperature: float = 1.0
    """Divides the logits before sampling; below 1 is more careful."""

    top_k: int = 50
    """Sample among the k most probable tokens; 0 for all."""

    top_p: float = 1.0
    """Sample among the fewest tokens whose probabilities reach this sum."""

    min_p: float = 0.0
    """Sample among tokens at least this share as probable as the best one."""

    repetition_penalty: float = 1.0
    """Above 1 makes tokens that the caption already has less probable."""

    num_beams: int = 1
    """Beams of the beam search; 1 for none."""

    length_penalty: float = 1.0
    """Exponent of the length in a beam's score; above 0 favours longer captions."""

    early_stopping: bool = False
    """End the beam search when num_beams captions are complete, rather than when no better one is possible."""

    num_captions: int = 1
    """Captions an image, best first; all are kept in the column `candidates`."""

    stop: tuple[str, ...] = ()
    """Strings that end a caption; they are not part of it. As `a,b`."""

    seed: int = 0
    """Seed of every draw."""

    def __post_init__(self) -> None:
        _check(self.max_new_tokens >= 1, "--max-new-tokens", self.max_new_tokens, "at least 1")
        _check(
            0 <= self.min_new_tokens <= self.max_new_tokens,
            "--min-new-tokens",
            self.min_new_tokens,
            f"0 to --max-new-tokens ({self.max_new_tokens})",
        )
        for name in ("temperature", "repetition_penalty", "length_penalty"):
            _check(math.isfinite(getattr(self, name)), _flag(name), getattr(self, name), "a number that is finite")
        _check(self.temperature > 0, "--temperature", self.temperature, "more than 0 (for greedy: --no-do-sample)")
        _check(self.top_k >= 0, "--top-k", self.top_k, "0 (off) or more")
        _check(0 < self.top_p <= 1, "--top-p", self.top_p, "above 0, at most 1")
        _check(0 <= self.min_p <= 1, "--min-p", self.min_p, "0 to 1")
        _check(self.repetition_penalty > 0, "--repetition-penalty", self.repetition_penalty, "more than 0")
        _check(self.num_beams >= 1, "--num-beams", self.num_beams, "at least 1")
        _check(self.num_captions >= 1, "--num-captions", self.num_captions, "at least 1")
        _check(all(self.stop), "--stop", ",".join(self.stop), "strings of at least one character")
        self._check_strategy()

    def _check_strategy(self) -> None:
        if self.do_sample:
            _check(self.num_beams == 1, "--num-beams", self.num_beams, "1 with --do-sample")
        elif self.num_beams == 1:
            _check(
                self.num_captions == 1, "--num-captions", self.num_captions, "1, or --do-sample, or --num-beams >= it"
            )
        else:
            _check(
                self.num_captions <= self.num_beams,
                "--num-captions",
                self.num_captions,
                f"at most --num-beams ({self.num_beams})",
            )


@dataclass(frozen=True, kw_only=True)
class ScoringConfig:
    """What is measured of each caption beside its log probabilities, and what the best of several is."""

    clip_score: bool = False
    """Write the CLIPScore of every caption (arXiv:2104.08718) into the column `clip_score`.
    Needs a bundle whose CLIP has its text tower."""

    rerank: Ranking = "logprob"
    """What the best of --num-captions is: the most probable, or the one of the highest CLIPScore."""

    @property
    def needs_text_tower(self) -> bool:
        """Whether CLIP's text tower has to read the captions."""
        return self.clip_score or self.rerank == "clip-score"


@dataclass(frozen=True, kw_only=True)
class ResourceConfig:
    """What the job may take of the machine or the cluster."""

    workers: str = "auto"
    """Model workers, as `8` or `1:8` (autoscaling).
    `auto`: from 1 to as many as there are GPUs, 1 without a GPU."""

    gpus_per_worker: float | None = None
    """GPUs each model worker takes; a fraction lets several small models share a card.
    By default 1 when the cluster has GPUs, else 0; one that grows and has none yet must be told."""

    cpu_workers: str = "auto"
    """Workers that fetch and decode, as `8` or `1:8`.
    `auto`: as many as the CPUs allow, up to 16 for each model worker."""

    slots: str = "auto"
    """Captions that one model worker writes at the same time. `auto`: as many as its memory holds."""

    rows_per_part: int | None = None
    """Rows of one output file, or some more: what a worker gives at once is not cut.
    By default a 64th of the work, from 256 to 16,384: small files are slow to query, large ones late to be safe."""

    def __post_init__(self) -> None:
        worker_range(self.workers, "--workers")
        worker_range(self.cpu_workers, "--cpu-workers")
        _check(self.slots == "auto" or _is_count(self.slots), "--slots", self.slots, "`auto` or a number from 1 up")
        _check(
            self.gpus_per_worker is None or self.gpus_per_worker >= 0, "--gpus-per-worker", self.gpus_per_worker, ">= 0"
        )
        _check(
            self.gpus_per_worker is None or self.gpus_per_worker <= 1 or self.gpus_per_worker % 1 == 0,
            "--gpus-per-worker",
            self.gpus_per_worker,
            "a share of one GPU, or a whole number of them",
        )
        _check(
            self.rows_per_part is None or self.rows_per_part > 0, "--rows-per-part", self.rows_per_part, "at least 1"
        )


@dataclass(frozen=True, kw_only=True)
class CaptionJobConfig:
    """One caption job: images in, a Parquet caption table out."""

    input_path: Annotated[Positional[str], arg(metavar="INPUT")] = "demo"
    """Folder, prefix, glob, file, list of URIs, Parquet or tars (shard-{0000..0099}.tar), on any fsspec store.
    `demo` is the embedded images."""

    output: Annotated[Positional[str], arg(metavar="OUTPUT")] = ""
    """Folder of the caption table, on any fsspec store. The same command again continues it.
    By default `captions-demo` when the input is `demo`."""

    input: InputConfig = field(default_factory=InputConfig)
    image: ImageConfig = field(default_factory=ImageConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    decoding: DecodingConfig = field(default_factory=DecodingConfig)
    scoring: ScoringConfig = field(default_factory=ScoringConfig)
    resources: ResourceConfig = field(default_factory=ResourceConfig)

    retry_failures: str = "transient"
    """Failures of earlier runs to try again: `transient`, `all`, `none`, or reasons as `corrupt,missing`."""

    max_failed_share: float = 1.0
    """Share of the images, 0 to 1, whose failure ends the job; what was captioned stays. 1: they are only counted."""

    refresh: bool = False
    """List the input again and caption what is new in it too; what an earlier run froze keeps its place.
    Images that changed or vanished since are counted and not touched."""

    dry_run: bool = False
    """Print the plan - images, units, model, what is left - and stop."""

    def __post_init__(self) -> None:
        if not self.output:
            _check(self.input_path == "demo", "OUTPUT", "missing", f"a folder for the captions of {self.input_path}")
            object.__setattr__(self, "output", "captions-demo")
        _check(0 <= self.max_failed_share <= 1, "--max-failed-share", self.max_failed_share, "0 to 1")
        is_choice = self.scoring.rerank == "logprob" or self.decoding.num_captions > 1
        _check(is_choice, "--rerank", self.scoring.rerank, "--num-captions of 2 or more with it")
        self._check_slots()

    def _check_slots(self) -> None:
        beams = self.decoding.num_beams if self.decoding.num_beams > 1 else self.decoding.num_captions
        enough = self.resources.slots == "auto" or int(self.resources.slots) >= beams
        _check(enough, "--slots", self.resources.slots, f"at least {beams}, the beams or captions of one image")


@dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """What a caption job will take: a small sample captioned here, then time, workers and price of the whole input."""

    input_path: Annotated[Positional[str], arg(metavar="INPUT")] = "demo"
    """As for jobs/caption.py."""

    output: Annotated[Positional[str], arg(metavar="OUTPUT")] = ""
    """Folder that the job is going to write; its summary will then say what was predicted.
    By default nothing is written."""

    sample: int = 256
    """Images to caption."""

    gpu_hourly: float | None = None
    """Price of a GPU for an hour, in any currency."""

    cpu_hourly: float | None = None
    """Price of a CPU core for an hour."""

    input: InputConfig = field(default_factory=InputConfig)
    image: ImageConfig = field(default_factory=ImageConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    decoding: DecodingConfig = field(default_factory=DecodingConfig)
    scoring: ScoringConfig = field(default_factory=ScoringConfig)
    resources: ResourceConfig = field(default_factory=ResourceConfig)

    def __post_init__(self) -> None:
        _check(self.sample >= 1, "--sample", self.sample, "at least 1")
        for name in ("gpu_hourly", "cpu_hourly"):
            price = getattr(self, name)
            _check(price is None or price >= 0, _flag(name), price, "0 or more")

    @property
    def job(self) -> CaptionJobConfig:
        """The caption job that is planned."""
        return CaptionJobConfig(
            input_path=self.input_path,
            output=self.output or "captions",
            input=self.input,
            image=self.image,
            model=self.model,
            decoding=self.decoding,
            scoring=self.scoring,
            resources=self.resources,
        )


@dataclass(frozen=True, kw_only=True)
class VerifyConfig:
    """Prove that every image of a caption table came out exactly once; exit 1 where that does not hold."""

    table: Annotated[Positional[str], arg(metavar="OUTPUT")] = "captions-demo"
    """Folder of the caption table, on any fsspec store."""

    storage_options: dict[str, object] = field(default_factory=dict)
    """fsspec options of its store, as JSON. By default the usual environment variables."""

    repair: bool = False
    """Put aside, below OUTPUT/_run/removed, what a crash or a late writer left: torn parts, rows that stand twice,
    temporaries. Says first what and why; deletes nothing."""

    compact: bool = False
    """Make few, large parts, sorted by key, out of many small ones."""

    dry_run: bool = False
    """With --repair: say what it would do, and stop."""

    def __post_init__(self) -> None:
        _check(not self.dry_run or self.repair, "--dry-run", self.dry_run, "--repair beside it")
        _check(not (self.dry_run and self.compact), "--dry-run", self.dry_run, "--repair without --compact")


_BEST_FIGURES = {"min_bleu_4": 1, "min_rouge_l": 1, "min_cider": 10, "min_clip_score": 2.5, "min_matched": 1}


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """How good captions are: BLEU, ROUGE-L and CIDEr-D against references; exit 1 below a --min."""

    captions: Annotated[Positional[str], arg(metavar="CAPTIONS")] = "captions-demo"
    """The OUTPUT of a caption job, or .parquet, .csv, .tsv, .jsonl, .json with image_id and caption."""

    references: Annotated[Positional[str], arg(metavar="REFERENCES")] = ""
    """COCO captions or Karpathy's .json, or .parquet, .csv, .tsv, .jsonl with image_id and a caption or a list of them.
    `demo` is the embedded images, and the default for `captions-demo`."""

    storage_options: dict[str, object] = field(default_factory=dict)
    """fsspec options of their stores, as JSON. By default the usual environment variables."""

    match_by: MatchRule = "auto"
    """When two names mean the same image: equal as they stand (`id`), equal without folder and suffix (`name`), or
    ending in the same number (`number`: COCO_val2014_000000000400.jpg is 400). A name shared by two images is none's.
    `auto`: the rule that finds most captions, the strictest of equals."""

    min_bleu_4: float | None = None
    """Lowest BLEU-4 (0 to 1) that passes."""

    min_rouge_l: float | None = None
    """Lowest ROUGE-L (0 to 1) that passes."""

    min_cider: float | None = None
    """Lowest CIDEr-D (0 to 10; 1.0 is what papers print as 100) that passes."""

    min_clip_score: float | None = None
    """Lowest CLIPScore (0 to 2.5) that passes."""

    min_matched: float | None = None
    """Lowest share of the captions that has references, 0 to 1, that passes."""

    model: str = ""
    """A bundle whose CLIP has a text tower, for RefCLIPScore, and for CLIPScore where a table lacks it: its images are
    read again. Without a model, CLIPScore is what the column `clip_score` says."""

    device: str = "auto"
    """Where that CLIP computes: auto, cpu, cuda or cuda:N."""

    image_storage_options: dict[str, object] | None = None
    """fsspec options of the images' store, as JSON.
    By default those of the captions, when both are on the same kind of store or the captions are local."""

    allow_local_uris: bool = False
    """Follow local paths, and loopback or link-local hosts, that a remote list of images points to."""

    num_resamples: int = 1000
    """Bootstrap samples behind each interval."""

    seed: int = 0
    """Seed of the bootstrap."""

    def __post_init__(self) -> None:
        if not self.references:
            is_demo = self.captions == "captions-demo"
            _check(is_demo, "REFERENCES", "missing", f"what {self.captions} is to be measured against")
            object.__setattr__(self, "references", "demo")
        for name, best in _BEST_FIGURES.items():
            lowest = getattr(self, name)
            _check(lowest is None or 0 <= lowest <= best, _flag(name), lowest, f"0 to {best}")
        _check(self.num_resamples >= 1, "--num-resamples", self.num_resamples, "at least 1")


@dataclass(frozen=True, kw_only=True)
class GalleryConfig:
    """Captions beside their pictures, on one page that needs no server and loads nothing."""

    table: Annotated[Positional[str], arg(metavar="TABLE")] = "captions-demo"
    """The OUTPUT of a caption job, on any fsspec store; it may still be running."""

    output: Annotated[Positional[str], arg(metavar="OUT.html")] = ""
    """The page to write, on any fsspec store. By default the table's name with .html, in this folder."""

    sample: int = 200
    """Images on the page: drawn at random, the first rows of --query, or with --compare the largest changes."""

    seed: int = 0
    """Seed of the draw."""

    query: str | None = None
    """SQL whose rows to show, in their order, in place of a sample; as jobs/query.py has it.
    The rows need `key` or `image_id`; columns that the SQL makes stand on each card."""

    compare: str | None = None
    """Another table of the same images, whose captions to set beside these, the largest changes first."""

    references: str | None = None
    """Captions by people to set beside them: any file that jobs/evaluate.py reads; `demo` is the embedded images."""

    storage_options: dict[str, object] = field(default_factory=dict)
    """fsspec options of the tables' store, as JSON. By default the usual environment variables."""

    image_storage_options: dict[str, object] | None = None
    """fsspec options of the images' store, as JSON.
    By default those of the table, when both are on the same kind of store or the table is local."""

    allow_local_uris: bool = False
    """Follow local paths, and loopback or link-local hosts, that a remote list of images points to."""

    def __post_init__(self) -> None:
        if not self.output:
            object.__setattr__(self, "output", re.split(r"[/\\]", self.table.rstrip("/"))[-1] + ".html")
        is_page = self.output.lower().endswith((".html", ".htm"))
        _check(is_page, "OUT.html", self.output, "a name that ends in .html")
        _check(1 <= self.sample <= MAX_CARDS, "--sample", self.sample, f"1 to {MAX_CARDS:,}")
        _check(not (self.compare and self.references), "--references", self.references, "none with --compare")
        _check(not (self.compare and self.query), "--query", self.query, "none with --compare")


@dataclass(frozen=True, kw_only=True)
class QueryConfig:
    """Query a caption table by DuckDB's SQL; without SQL say what is in it."""

    table: Annotated[Positional[str], arg(metavar="TABLE")] = "captions-demo"
    """The OUTPUT of a caption job, on any fsspec store; it may still be running."""

    sql: Annotated[Positional[str], arg(metavar="SQL")] = ""
    """One SELECT over captions, failures, attempts, images and runs. `DESCRIBE captions` shows a view's columns."""

    format: RowFormat = "auto"
    """Form of the rows: a table for terminals, or all rows as csv, json (one object a line) or parquet.
    `auto`: by the ending of --out, without it a table."""

    out: str = ""
    """File for the rows, on any fsspec store, in place of stdout. One that ends in .html is a gallery of them."""

    review: int | None = None
    """Take the N most doubtful captions in place of SQL: improbable, repetitive, cut, of a low CLIPScore.
    Without --format they become a gallery, --out or review.html."""

    storage_options: dict[str, object] = field(default_factory=dict)
    """fsspec options of the table's store, as JSON. By default the usual environment variables."""

    image_storage_options: dict[str, object] | None = None
    """fsspec options of the store of a gallery's images, as JSON.
    By default those of the table, when both are on the same kind of store or the table is local."""

    allow_local_uris: bool = False
    """For a gallery follow local paths, and loopback or link-local hosts, that a remote list of images points to."""

    def __post_init__(self) -> None:
        is_count = self.review is None or 0 < self.review <= MAX_CARDS
        _check(is_count, "--review", self.review, f"1 to {MAX_CARDS:,}")
        _check(self.review is None or not self.sql, "SQL", self.sql, "none with --review, which brings its own")
        if self.review is not None and not self.out and self.format == "auto":
            object.__setattr__(self, "out", "review.html")
        has_rows = bool(self.sql) or self.review is not None
        _check(has_rows or not self.out, "--out", self.out, "SQL or --review with it: a summary goes to stdout")
        _check(has_rows or self.format == "auto", "--format", self.format, "SQL or --review with it")
        endings = "a name that ends in .csv, .json, .jsonl, .parquet or .html, or --format"
        _check(self.is_gallery or self.chosen_format in get_args(RowFormat)[1:], "--out", self.out, endings)
        _check(self.chosen_format != "parquet" or bool(self.out), "--format", "parquet", "--out FILE with it")
        _check(self.chosen_format != "table" or not self.out, "--format", "table", "csv, json or parquet with --out")

    @property
    def is_gallery(self) -> bool:
        """Whether the rows become a page of pictures."""
        return self.format == "auto" and self.out.lower().endswith((".html", ".htm"))

    @property
    def chosen_format(self) -> str:
        """The form of the rows; the ending of --out where it says none of them."""
        if self.format != "auto" or not self.out:
            return "table" if self.format == "auto" else self.format
        ending = self.out.lower().rpartition(".")[2]
        return {"jsonl": "json", "ndjson": "json", "pq": "parquet"}.get(ending, ending)


@dataclass(frozen=True, kw_only=True)
class LabelsConfig:
    """Images with captions, and which of them a projector is fitted on, chosen by and judged by."""

    labels_path: Annotated[Positional[str], arg(metavar="LABELS")] = "demo"
    """Images with captions, on any fsspec store: .parquet, .csv, .tsv, .jsonl, COCO's or Karpathy's .json,
    Flickr8k.token.txt, .tar shards. Several files as train-{00..07}.tar, a glob or a folder.
    `demo` is the embedded scenes."""

    labels_format: LabelsFormat = "auto"
    """What LABELS is. `auto` goes by its name."""

    image_root: str | None = None
    """Folder that relative image names are below. By default the folder of LABELS.
    With braces as in LABELS, one folder for each of its files."""

    image_column: str | None = None
    """Column with the image: bytes, Hugging Face's struct<bytes, path>, or a URI. By default the only one that can be.
    For tars: the ending of the member."""

    caption_column: str | None = None
    """Column with a caption or a list of captions. By default `caption` or `captions`.
    For tars: the ending of a member, or a key of its .json; by default `txt`, or `caption` in the .json."""

    split_column: str | None = None
    """Column with the split: train, validation or test, also as val, dev or restval. By default `split`, if there is
    one."""

    validation_share: float = 0.05
    """Share of the images, 0 to 1, that becomes the validation split where LABELS names none."""

    test_share: float = 0.05
    """Share of the images, 0 to 1, that becomes the test split where LABELS names no split at all; 0 for none."""

    split_seed: int = 0
    """Seed of these shares. Each image falls by its own name, so that another image moves none."""

    limit: int | None = None
    """Use only the first N images of each split."""

    max_failed_share: float = 0.05
    """Share of the images, 0 to 1, that may be missing, unreadable or without a caption; above it the job stops."""

    storage_options: dict[str, object] = field(default_factory=dict)
    """fsspec options of the store of LABELS, as JSON. By default the usual environment variables. Never written down.
    """

    allow_local_uris: bool = False
    """Follow local paths, and loopback or link-local hosts, that remote LABELS point to."""

    def __post_init__(self) -> None:
        for name in ("validation_share", "test_share", "max_failed_share"):
            _check(0 <= getattr(self, name) <= 1, _flag(name), getattr(self, name), "0 to 1")
        held_out = self.validation_share + self.test_share
        _check(held_out < 1, "--validation-share and --test-share together", held_out, "less than 1")
        _check(self.limit is None or self.limit > 0, "--limit", self.limit, "at least 1")


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How a projector learns. An example is one caption with its image; a step is one update of the weights."""

    projector: Literal["linear", "mlp"] = "linear"
    """What turns CLIP's pooled state into --image-tokens embeddings: one linear map, or two with a GELU between."""

    image_tokens: int = 1
    """Embeddings that stand for one image."""

    epochs: int = 1
    """Times every example is seen."""

    max_steps: int | None = None
    """Steps to take, whatever the epochs."""

    batch_size: int = 256
    """Examples of one step, over all workers and all its parts: the weights that come out do not depend on either."""

    gradient_accumulation_steps: int = 1
    """Parts in which each worker computes its share of a step: more take less memory."""

    learning_rate: float = 1e-3
    """Highest learning rate of AdamW: reached after the warm-up, then a cosine to nothing."""

    warmup_steps: int | None = None
    """Steps in which the learning rate rises. By default 3 % of all."""

    weight_decay: float = 0.0
    """Weight decay of AdamW, on matrices."""

    max_grad_norm: float = 1.0
    """Longest gradient; a longer one is shortened to it."""

    seed: int = 0
    """Seed of the first weights and of the order of the examples."""

    max_caption_tokens: int = 64
    """Longest caption, in tokens, that is learned and written; of a longer one the beginning is learned."""

    gradient_checkpointing: bool = False
    """Compute LLaMA's activations twice instead of keeping them: slower, far less memory."""

    log_every: int = 10
    """Steps between two lines of progress and of metrics.jsonl."""

    eval_every: int | None = None
    """Steps between two looks at the validation split. By default an epoch, or if that is less a twentieth of the fit,
    at least 250."""

    checkpoint_every: int | None = None
    """Steps between two checkpoints. By default an epoch, or if that is less a twentieth of the fit, at least 250.
    Whatever it says, one is kept every three minutes."""

    num_measured_images: int = 1000
    """Validation images, drawn by lot, whose captions give the loss at each evaluation."""

    num_scored_images: int = 200
    """As many of these are captioned and scored with BLEU and CIDEr-D at each evaluation; 0 for none."""

    keep_best_by: Literal["val_loss", "cider"] = "val_loss"
    """Which weights come out: those with the lowest loss, or the highest CIDEr-D, on the validation split."""

    early_stop: int = 0
    """Evaluations without a better one after which the fit ends; 0 for never."""

    def __post_init__(self) -> None:
        counts = ("image_tokens", "epochs", "batch_size", "gradient_accumulation_steps", "max_caption_tokens")
        for name in (*counts, "num_measured_images"):
            _check(getattr(self, name) >= 1, _flag(name), getattr(self, name), "at least 1")
        for name in ("max_steps", "log_every", "eval_every", "checkpoint_every"):
            value = getattr(self, name)
            _check(value is None or value >= 1, _flag(name), value, "at least 1")
        for name in ("learning_rate", "max_grad_norm"):
            value = getattr(self, name)
            _check(0 < value < math.inf, _flag(name), value, "more than 0")
        for name in ("warmup_steps", "weight_decay", "num_scored_images", "early_stop", "seed"):
            value = getattr(self, name)
            _check(value is None or 0 <= value < math.inf, _flag(name), value, "0 or more")
        fewest = self.gradient_accumulation_steps
        _check(self.batch_size >= fewest, "--batch-size", self.batch_size, f"at least its {fewest} parts")
        most = self.num_measured_images
        is_known = self.num_scored_images <= most
        _check(is_known, "--num-scored-images", self.num_scored_images, f"at most --num-measured-images ({most})")
        is_scored = self.keep_best_by == "val_loss" or self.num_scored_images > 0
        _check(is_scored, "--num-scored-images", self.num_scored_images, "more than 0 with --keep-best-by cider")


@dataclass(frozen=True, kw_only=True)
class FitModelConfig:
    """Which CLIP and LLaMA are tied together. Both stay as they are."""

    model: str | None = None
    """A bundle whose CLIP, LLaMA and template are used, by folder on any store; its projector is not.
    By default `demo` when LABELS is `demo`."""

    clip: str | None = None
    """A CLIP by hub name or path, with --llama instead of --model: openai/clip-vit-large-patch14."""

    llama: str | None = None
    """A LLaMA by hub name or path: meta-llama/Meta-Llama-3-8B."""

    template: str | None = None
    """Prompt, special tokens written out, with `{image}` once. By default that of --model, or
    `<|begin_of_text|>{image}`."""

    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Number format of CLIP and LLaMA; the projector's weights are always float32.
    `auto`: bfloat16 on a GPU, float32 on a CPU."""

    device: str = "auto"
    """`auto`: the worker's GPU, or the CPU when it has none; or `cpu`."""

    def __post_init__(self) -> None:
        _check(self.device in ("auto", "cpu"), "--device", self.device, "auto or cpu")
        _check((self.clip is None) == (self.llama is None), "--clip without --llama, or the reverse,", "given", "both")
        is_one = self.model is None or self.clip is None
        _check(is_one, "--model", self.model, "either a bundle, or --clip and --llama")


@dataclass(frozen=True, kw_only=True)
class FitResourceConfig:
    """What the fit may take of the machine or the cluster."""

    workers: str = "auto"
    """Workers that fit together, as `8`, or as `1:8` (elastic: as many of them as there is room for).
    `auto`: one a GPU, 1 without a GPU."""

    gpus_per_worker: float | None = None
    """GPUs each worker takes. By default 1 when the cluster has GPUs, else 0."""

    cpu_workers: str = "auto"
    """Workers that fetch and decode images, before the fit, as `8` or `1:8`. `auto`: as many as the CPUs allow."""

    max_failures: int = 3
    """Lost workers, beside preempted ones, after which the fit gives up; each time it goes on from its checkpoint."""

    def __post_init__(self) -> None:
        _check(self.max_failures >= 0, "--max-failures", self.max_failures, "0 or more")
        self.of_features()

    def of_features(self) -> ResourceConfig:
        """Return what the features of the images may take. Raises ConfigError for what no job can take."""
        return ResourceConfig(workers=self.workers, gpus_per_worker=self.gpus_per_worker, cpu_workers=self.cpu_workers)


@dataclass(frozen=True, kw_only=True)
class FitTargetConfig:
    """Where the bundle goes, and what is kept beside it."""

    output: Annotated[Positional[str], arg(metavar="OUTPUT_BUNDLE")] = ""
    """Folder of the bundle, on any fsspec store. The same command again continues the fit.
    By default `demo-refit` when LABELS is `demo`."""

    output_storage_options: dict[str, object] | None = None
    """fsspec options of its store, as JSON.
    By default those of LABELS, when both are on the same kind of store or LABELS is local."""

    features: str | None = None
    """Folder of the image features, which several fits may share. By default inside OUTPUT_BUNDLE."""

    carry_models: bool = False
    """Copy CLIP and LLaMA into the bundle, so that it can move."""

    tensorboard: bool = False
    """Write TensorBoard's events beside metrics.jsonl; only into a folder of this machine."""

    def __post_init__(self) -> None:
        is_local = not self.tensorboard or "://" not in self.output
        _check(is_local, "--tensorboard", f"given with {self.output}", "an OUTPUT_BUNDLE of this machine")


@dataclass(frozen=True, kw_only=True)
class FitConfig:
    """Fit the projector between a CLIP and a LLaMA on labelled images: out comes a bundle to caption with."""

    labels: LabelsConfig = field(default_factory=LabelsConfig)

    target: FitTargetConfig = field(default_factory=FitTargetConfig)
    model: FitModelConfig = field(default_factory=FitModelConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    image: ImageConfig = field(default_factory=ImageConfig)
    resources: FitResourceConfig = field(default_factory=FitResourceConfig)

    dry_run: bool = False
    """Print the plan - images, models, steps, what is left - and stop."""

    def __post_init__(self) -> None:
        is_demo = self.labels.labels_path == "demo"
        if not self.target.output:
            _check(is_demo, "OUTPUT_BUNDLE", "missing", f"a folder for the bundle fitted to {self.labels.labels_path}")
            object.__setattr__(self, "target", replace(self.target, output="demo-refit"))
        has_model = is_demo or self.model.model or self.model.clip
        _check(bool(has_model), "--model", "missing", "a bundle, or --clip and --llama")


def worker_range(text: str, flag: str) -> tuple[int, int] | None:
    """Return `(min, max)` of `8` or `1:8`, or None for `auto`. Raises ConfigError for anything else."""
    if text == "auto":
        return None
    low, _, high = text.partition(":")
    high = high or low
    expected = "`auto`, a number from 1 up, or `min:max`"
    _check(_is_count(low) and _is_count(high), flag, text, expected)
    _check(int(low) <= int(high), flag, text, expected)
    return int(low), int(high)


def _is_count(text: str) -> bool:
    return text.isdecimal() and int(text) >= 1


def _check(holds: bool, flag: str, value: object, expected: str) -> None:
    if not holds:
        raise ConfigError(f"{flag} is {value}; expected {expected}")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
