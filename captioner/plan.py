"""What a caption job is going to do: its input frozen, its model described, what is done and what is left.

Everything a job refuses is refused here, before any model is loaded and any accelerator is taken. Knows no weights and
no Ray. Rows are planned as slices: a unit, the positions in it that are left, and where to stop.
"""

import logging
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

from captioner import demo
from captioner.config import CaptionJobConfig
from captioner.errors import ConfigError
from captioner.failure_limit import FailureLimit
from captioner.model.bundle import BundleDescription, describe
from captioner.rows import TRANSIENT_REASONS, RejectReason, split_key
from captioner.slices import Slice, SliceReader, cut, listing_rows
from captioner.sources import (
    Columns,
    Frozen,
    Refreshed,
    Unit,
    count_images,
    freeze,
    load_frozen,
    refresh,
    revisit,
    save_count,
)
from captioner.sources.urls import absolute, redact, scheme
from captioner.stopping import StopFile
from captioner.tables import CaptionTable, Done, Lease, holder, mend

__all__ = ["Plan", "output_options", "plan_job"]

log = logging.getLogger("captioner")

_PART_ROWS = (256, 16_384)  # fewest and most rows of a part by default
_PARTS = 64  # parts of a job whose size lies between: a crash costs at most this share of the work


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A caption job that is ready to run."""

    config: CaptionJobConfig
    table: CaptionTable
    frozen: Frozen
    model: BundleDescription
    done: Done
    slices: list[Slice]
    num_skipped: int
    """Images that earlier runs finished, among those asked for."""

    lease: Lease | None = None
    """What keeps other jobs away from the table; None for a dry run."""

    scratch: str | None = None
    """Folder of the listing, where a dry run made one; None where it lies beside the table."""

    refreshed: Refreshed | None = None
    """What `--refresh` found; None where it was not asked for, or the input is frozen for the first time."""

    @property
    def num_left(self) -> int | None:
        """Images that this run will read; None while there is a tar that nobody has counted."""
        counts = [piece.num_left for piece in self.slices]
        return None if None in counts else sum(count for count in counts if count is not None)

    def num_expected(self, image_bytes: float) -> int | None:
        """Return `num_left`, a tar that nobody has counted taken for images of this size; None without its size."""
        total = 0.0
        for piece in self.slices:
            if piece.num_left is not None:
                total += piece.num_left
            elif piece.unit.size_bytes is None:
                return None
            else:
                num_done = 0 if piece.done is None else int(piece.done.sum())
                total += max(1.0, piece.unit.size_bytes / image_bytes - num_done)
        return math.ceil(total)

    @property
    def failure_limit(self) -> FailureLimit:
        """How many images may fail."""
        num_images = None if self.num_left is None else self.num_left + self.num_skipped
        return FailureLimit(
            share=self.config.max_failed_share, num_images=num_images, num_failed_before=self.done.num_failed
        )

    @property
    def rows_per_part(self) -> int:
        """Rows of one output file."""
        if self.config.resources.rows_per_part:
            return self.config.resources.rows_per_part
        fewest, most = _PART_ROWS
        num_expected = sum(piece.num_expected for piece in self.slices)
        return min(most, max(fewest, math.ceil(num_expected / _PARTS)))

    @property
    def reader(self) -> SliceReader:
        """What reads the slices, in any process."""
        return SliceReader(
            config=self.config,
            columns=self.frozen.columns,
            run_folder=self.scratch or self.table.run_folder,
            output_options={} if self.scratch else output_options(self.config),
            stop=self.stop_file,
        )

    @property
    def stop_file(self) -> StopFile | None:
        """What tells the read tasks of this run to end early; None for a dry run."""
        if self.lease is None:
            return None
        return StopFile(self.table.run_folder, self.lease.run_id, output_options(self.config))

    def lines(self) -> Iterator[str]:
        """Yield the plan as people read it."""
        counted = "unknown until its tars are read" if self.frozen.num_images is None else f"{self.frozen.num_images:,}"
        skipped = ", ".join(f"{count:,} {kind}" for kind, count in self.frozen.skipped.items())
        yield f"input     {redact(self.config.input_path)} ({self.frozen.kind})"
        yield f"images    {counted} in {len(self.frozen.units):,} units" + (f"; left out: {skipped}" if skipped else "")
        if self.refreshed:
            yield f"refresh   {self.refreshed}"
        yield f"model     {self.model.summary}"
        yield f"output    {redact(self.table.url)}"
        if self.lease is None and (writer := holder(self.table.store, self.table.run_folder)):
            yield f"in use    by {writer.purpose} run {writer.run_id}, process {writer.pid} on {writer.host}"
        yield f"done      {self.done.num_captioned:,} captioned, {self.done.num_failed:,} failed for good"
        left = "unknown" if self.num_left is None else f"{self.num_left:,}"
        again = f", of which {len(self.done.attempts):,} failed before" if self.done.attempts else ""
        yield f"left      {left}{again}"


def plan_job(
    config: CaptionJobConfig,
    on_progress: Callable[[int], None] = lambda _: None,
    take_lease: Callable[[CaptionTable], Lease | None] = lambda _: None,
    scratch: str | None = None,
) -> Plan:
    """Return the plan of a job; with `config.dry_run` nothing is written.

    take_lease: called before the first byte is written, when nothing else is left to refuse. scratch: folder for what a
    dry run lists, so that its slices can be read; by default one that is gone by then.
    Raises UsageError for whatever cannot run: no input, no model, another job's output, a flag out of range.
    """
    config = _resolve(config)
    is_retried = _retry_rule(config.retry_failures)
    model = describe(config.model.model, config.input.storage_options, prompt=config.model.prompt)
    _check_context(config, model)
    _check_scoring(config, model)
    table = CaptionTable(config.output, output_options(config))
    table.check(identity := _identity(config, model))
    lease = None if config.dry_run else take_lease(table)
    frozen, refreshed, scratch = _frozen(config, table, on_progress, scratch)
    if not config.dry_run:
        table.claim(identity)
    done = table.done(is_retried)
    if done.num_doubled and lease:
        log.info("doubled=%d reason=%s", mend(table, lease.run_id), "a writer outlived its driver")
        done = table.done(is_retried)
    count = partial(_count, config=config, columns=frozen.columns, table=table)
    slices, num_skipped = _slices(frozen, done, config.input.limit, count)
    return Plan(
        config=config,
        table=table,
        frozen=frozen,
        model=model,
        done=done,
        slices=slices,
        num_skipped=num_skipped,
        lease=lease,
        scratch=scratch,
        refreshed=refreshed,
    )


def output_options(config: CaptionJobConfig) -> Mapping[str, Any]:
    """Return the fsspec options of the output's store: the input's own, unless others are given."""
    if config.input.output_storage_options is not None:
        return config.input.output_storage_options
    is_shared = scheme(config.input_path) in (scheme(config.output), "file")  # a local input needs none for itself
    return config.input.storage_options if is_shared else {}


def _resolve(config: CaptionJobConfig) -> CaptionJobConfig:
    path = str(demo.images_path()) if config.input_path == "demo" else config.input_path
    return replace(config, input_path=absolute(path), output=absolute(config.output))


def _check_context(config: CaptionJobConfig, model: BundleDescription) -> None:
    prompt = model.num_prompt_tokens + model.num_image_tokens
    room = model.context_length - prompt
    if config.decoding.max_new_tokens > room:
        raise ConfigError(
            f"--max-new-tokens is {config.decoding.max_new_tokens}; {model.name} reads {model.context_length} tokens,"
            f" of which prompt and image take {prompt}: expected at most {room}"
        )


def _check_scoring(config: CaptionJobConfig, model: BundleDescription) -> None:
    if config.scoring.needs_text_tower:
        model.check_text_tower("--clip-score" if config.scoring.clip_score else "--rerank clip-score")


def _retry_rule(text: str) -> Callable[[str], bool]:
    groups = {"transient": TRANSIENT_REASONS, "all": frozenset(RejectReason), "none": frozenset[RejectReason]()}
    if text in groups:
        return groups[text].__contains__
    unknown = sorted(set(text.split(",")) - set(RejectReason))
    if unknown:
        raise ConfigError(
            f"--retry-failures names {', '.join(unknown)}; expected transient, all, none, or some of"
            f" {', '.join(RejectReason)}"
        )
    return frozenset(text.split(",")).__contains__


def _frozen(
    config: CaptionJobConfig, table: CaptionTable, on_progress: Callable[[int], None], scratch: str | None
) -> tuple[Frozen, Refreshed | None, str | None]:
    """Return the input as an earlier run froze it, grown where that is asked for, or freeze it now.

    For a dry run in `scratch`, or in a folder that vanishes again. The last is where the listing lies, if not beside
    the table.
    """
    options, path = output_options(config), config.input_path
    earlier = load_frozen(table.run_folder, options) if table.identity() else None
    if earlier:
        earlier = revisit(config.input, earlier, None if config.dry_run else table.run_folder, options)
    if earlier and not config.refresh:
        return earlier, None, None
    with tempfile.TemporaryDirectory() as folder:
        place = (scratch or folder) if config.dry_run else None
        if earlier:
            return *refresh(path, config.input, earlier, table.run_folder, options, on_progress, place), None
        if place:
            return freeze(path, config.input, place, None, on_progress), None, scratch
        return freeze(path, config.input, table.run_folder, options, on_progress), None, None


def _identity(config: CaptionJobConfig, model: BundleDescription) -> dict[str, Any]:
    """Return everything that decides which captions the table holds; no credentials, no limits, no resources."""
    access = config.input
    columns = {"image_column": access.image_column, "id_column": access.id_column, "keep_columns": access.keep_columns}
    scoring = {"scoring": {**asdict(config.scoring), "text_tower": model.text_fingerprint}}
    return {
        "input": redact(_without_slash(config.input_path)),
        "columns": {name: list(value) if isinstance(value, tuple) else value for name, value in columns.items()},
        "model": {"name": model.name, "fingerprint": model.fingerprint, "dtype": config.model.dtype},
        "decoding": {**asdict(config.decoding), "stop": list(config.decoding.stop)},
        "image": {"size": model.image_size, "fast_decode": config.image.fast_decode},
        **(scoring if config.scoring.needs_text_tower else {}),  # so that tables without it stay what they were
    }


def _without_slash(path: str) -> str:
    """Return a local path as it is called without the slash that a shell adds; on a store `a` and `a/` may differ."""
    return path.rstrip("/") or path if scheme(path) == "file" else path


def _count(unit: Unit, *, config: CaptionJobConfig, columns: Columns, table: CaptionTable) -> int:
    """Return how many rows a unit gives, and note it, so that a tar is counted once."""

    def note(num_rows: int) -> None:
        if not config.dry_run:
            save_count(unit.ordinal, num_rows, table.run_folder, output_options(config))

    return count_images(unit, columns, config.input, note)


def _slices(frozen: Frozen, done: Done, limit: int | None, count: Callable[[Unit], int]) -> tuple[list[Slice], int]:
    """Return what is left to read of the first `limit` images, and how many of them need not be read again."""
    attempts = _by_unit(done.attempts)
    slices: list[Slice] = []
    num_skipped, left = 0, limit
    num_images = sum(unit.num_rows or 0 for unit in frozen.units)
    num_listed = listing_rows(num_images if limit is None else min(limit, num_images))
    for unit in frozen.units:
        stop = unit.num_rows
        if left is not None:
            stop = min(left, count(unit) if stop is None else stop)
            left -= stop
        finished = done.keys.positions(unit.ordinal, stop)
        num_skipped += int(finished.sum())
        slices += cut(unit, stop, finished, attempts.get(unit.ordinal, {}), num_listed)
        if left == 0:
            break
    return slices, num_skipped


def _by_unit(attempts: Mapping[int, int]) -> dict[int, dict[int, int]]:
    found: dict[int, dict[int, int]] = {}
    for key, count in attempts.items():
        unit, position = split_key(key)
        found.setdefault(unit, {})[position] = count
    return found
