"""The plan of a caption job: its frozen input, its model, what is done and what is left.

Raises all that a job can refuse before a model is loaded and an accelerator is taken. What is left is cut into slices:
a unit and the positions of it that one read task reads. Knows no weights and no Ray.
"""

import logging
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

import numpy as np
import pyarrow as pa

from captioner.captioning.failure_limit import FailureLimit
from captioner.captioning.job import Job, resolve
from captioner.captioning.job_prompts import answers_of, prompt_lines
from captioner.captioning.refusals import (
    check_columns_are_kept,
    check_device,
    check_list_options,
    check_model_is_named,
    check_places,
    warnings,
)
from captioner.config import CaptionJobConfig, ModelConfig
from captioner.errors import OutputError
from captioner.inputs import (
    Columns,
    Frozen,
    Refreshed,
    Unit,
    check_input,
    count_images,
    empty_columns,
    freeze,
    load_frozen,
    refresh,
    revisit,
    save_count,
    save_further,
)
from captioner.inputs.slices import Slice, SliceReader, cut, listing_rows
from captioner.model.bundle import BundleDescription, describe
from captioner.prompts import CAPTION, Prompt
from captioner.schema import ASKED, split_key
from captioner.storage.faults import StoreError
from captioner.storage.stop_file import StopFile
from captioner.tables import CaptionTable, ColumnFamily, Done, KeySet, Lease, deduplicate, find_done, holder

__all__ = ["Plan", "describe_model", "plan_job"]

log = logging.getLogger("captioner")

_PART_ROWS = (256, 16_384)  # fewest and most rows of a part by default
_SEEN_SAMPLES = 16  # of a tar, whose columns no schema says
_PARTS = 64  # parts of a job in between: a crash costs at most a 64th of the work


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A caption job that is ready to run."""

    job: Job
    table: CaptionTable
    frozen: Frozen
    model: BundleDescription
    families: list[ColumnFamily]
    """The column families of the table, those among them that this job adds."""

    done: Done
    slices: list[Slice]
    num_skipped: int
    """Images that earlier runs finished, among those asked for."""

    lease: Lease | None = None
    """Keeps other jobs from writing the table; None for a dry run."""

    scratch: str | None = None
    """Folder with the listing of a dry run; None where the listing lies beside the table."""

    empty_columns: tuple[str, ...] = ()
    """Columns that prompts name and the first samples of the first tar have not: only its samples say which there are.
    """

    refreshed: Refreshed | None = None
    """What `--refresh` found; None where it was not asked for, or the input is frozen for the first time."""

    @property
    def config(self) -> CaptionJobConfig:
        """What the user set."""
        return self.job.config

    @property
    def prompts(self) -> tuple[Prompt, ...]:
        """The named prompts that some image is asked."""
        lacking = {
            name
            for one in self.families
            if any(piece.lacks(one.prompt) for piece in self.slices)
            for name in one.prompts
        }
        return tuple(prompt for prompt in self.job.asked(self.model) if prompt.name in lacking)

    @property
    def added_alone(self) -> tuple[str, ...]:
        """The prompts that images are asked, where these were all added to captions that are there already."""
        names = tuple(prompt.name for prompt in self.prompts)
        return () if CAPTION in names or not self.done.held else names

    @property
    def answers(self) -> list[pa.Field]:
        """The columns of these prompts."""
        return answers_of(self.config.decoding, self.prompts)

    @property
    def row_columns(self) -> list[pa.Field]:
        """The columns that travel with each row: those that are kept, and what it is asked where rows differ in it."""
        return [*self.frozen.columns.kept, *([ASKED] if self.done.held else [])]

    @property
    def num_left(self) -> int | None:
        """Images that this run will read; None while a tar is not counted."""
        counts = [piece.num_left for piece in self.slices]
        return None if None in counts else sum(count for count in counts if count is not None)

    def num_expected(self, image_bytes: float) -> int | None:
        """Return `num_left`, an uncounted tar estimated by images of this size; None if its own size is unknown."""
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
            stop=self.stop_file,
            prompts={one.prompt: one.prompts for one in self.families} if self.done.held else {},
        )

    @property
    def stop_file(self) -> StopFile | None:
        """Tells the tasks of this run to end early; None for a dry run."""
        if self.lease is None:
            return None
        return StopFile(self.table.run_folder, self.lease.run_id)

    def lines(self) -> Iterator[str]:
        """Yield the plan as people read it."""
        counted = "unknown until its tars are read" if self.frozen.num_images is None else f"{self.frozen.num_images:,}"
        skipped = ", ".join(f"{count:,} {kind}" for kind, count in self.frozen.left_out.items())
        yield f"input     {self.job.images} ({self.frozen.kind})"
        yield f"images    {counted} in {len(self.frozen.units):,} units" + (f"; left out: {skipped}" if skipped else "")
        if self.refreshed:
            yield f"refresh   {self.refreshed}"
        yield f"model     {self.model.summary}"
        if self.job.prompts:
            yield from (f"prompt    {line}" for line in prompt_lines(self.job.asked(self.model), self.model))
        else:
            yield f"prompt    {' '.join(self.model.prompt_tokens)}"
        yield from (f"beware    {warning}" for warning in warnings(self.job, self.frozen.kind))
        for name in self.empty_columns:
            where = self.frozen.units[0].name
            yield f"beware    {{{name}}} has no value in the first {_SEEN_SAMPLES} samples of {where}: is it called so?"
        yield f"output    {self.table.location}"
        if self.lease is None and (writer := holder(self.table.store, self.table.run_folder)):
            yield f"in use    by {writer.purpose} run {writer.run_id}, process {writer.pid} on {writer.host}"
        yield f"done      {self.done.num_captioned:,} captioned, {self.done.num_failed:,} failed for good"
        left = "unknown" if self.num_left is None else f"{self.num_left:,}"
        again = f", of which {len(self.done.attempts):,} failed before" if self.done.attempts else ""
        yield f"left      {left}{again}"
        if self.added_alone:
            yield f"asked     {', '.join(self.added_alone)} alone: these images have all else"


def describe_model(asked: ModelConfig) -> BundleDescription:
    """Return the description of the model that a config names, with what it sets for a published checkpoint."""
    return describe(
        asked.model,
        asked.model_storage_options,
        allow_remote_parts=asked.allow_remote_parts,
        **asked.checkpoint_options,
    )


def plan_job(
    config: CaptionJobConfig,
    on_progress: Callable[[int], None] = lambda _: None,
    take_lease: Callable[[CaptionTable], Lease | None] = lambda _: None,
    scratch: str | None = None,
) -> Plan:
    """Return the plan of a job; with `config.dry_run` nothing is written.

    take_lease: called before the first byte is written, once nothing is left to refuse. scratch: folder for the listing
    of a dry run, so that its slices can be read; by default the listing is removed.
    Raises UsageError for what cannot run: no input, no model, another job's output, a flag out of range.
    """
    job = resolve(config)
    check_model_is_named(job)
    check_device(job.config.model.device)
    is_retried = job.retried_reasons.__contains__
    model = describe_model(job.config.model)
    job.check_model(model)
    table = CaptionTable(job.output)
    table.refuse_other_job(identity := job.identity(model))
    if table.identity() is None:
        check_places(job, table)
        check_input(job.images.url_with_secrets, job.config.input)
    lease = None if config.dry_run else take_lease(table)
    before_write = lease.check if lease else lambda: None
    table.refuse_other_job(identity)  # again: another job may have begun the table while this one waited for the lease
    frozen, refreshed, scratch = _frozen(job, table, on_progress, scratch, before_write)
    check_list_options(job, frozen.kind)
    check_columns_are_kept(job, frozen.columns)
    if not config.dry_run:
        table.claim(identity, before_write)
    families = table.families(identity)
    done = _done(table, families, is_retried, lease)
    count = partial(_count, job=job, columns=frozen.columns, table=table)
    slices, num_skipped = _slices(frozen, done, config.input.limit, count)
    return Plan(
        job=job,
        table=table,
        frozen=frozen,
        model=model,
        families=families,
        done=done,
        slices=slices,
        num_skipped=num_skipped,
        lease=lease,
        scratch=scratch,
        empty_columns=_empty_columns(job, frozen, table) if slices else (),
        refreshed=refreshed,
    )


def _frozen(
    job: Job,
    table: CaptionTable,
    on_progress: Callable[[int], None],
    scratch: str | None,
    before_write: Callable[[], None],
) -> tuple[Frozen, Refreshed | None, str | None]:
    """Return the input as an earlier run froze it, grown where that is asked for, or freeze it now.

    A dry run lists into `scratch`, or into a folder that is removed again. The third is the folder of that listing.
    before_write: called before each change of the table's folder, which it prevents by raising.
    """
    config, path = job.config, job.images.url_with_secrets
    earlier = load_frozen(table.run_folder) if table.identity() else None
    if earlier:
        earlier = revisit(config.input, earlier, None if config.dry_run else table.run_folder, before_write)
    elif table.identity():
        table.refuse_parts("no _run/units.parquet, which says what their keys mean")
    if earlier and not config.refresh:
        return earlier, None, None
    with tempfile.TemporaryDirectory() as folder:
        listing = (scratch or folder) if config.dry_run else None
        if earlier:
            return *refresh(path, config.input, earlier, table.run_folder, on_progress, listing, before_write), None
        if listing:
            return freeze(path, config.input, listing, on_progress), None, scratch
        return freeze(path, config.input, table.run_folder, on_progress, before_write), None, None


def _empty_columns(job: Job, frozen: Frozen, table: CaptionTable) -> tuple[str, ...]:
    """Return the columns of `Plan.empty_columns`; none where the tar cannot be read, which its read task says."""
    access = job.config.input
    if frozen.kind != "webdataset" or not access.prompt_columns:
        return ()
    with suppress(StoreError):
        found = empty_columns(
            frozen.units[0], frozen.columns, access, run_folder=table.run_folder, num_rows=_SEEN_SAMPLES
        )
        return tuple(name for name in found if name in access.prompt_columns)
    return ()


def _done(
    table: CaptionTable, families: Sequence[ColumnFamily], is_retried: Callable[[str], bool], lease: Lease | None
) -> Done:
    """Return what is done, once duplicates are dropped."""
    done = find_done(table, is_retried, families)
    if not (done.num_duplicates and lease):
        return done
    log.info("duplicates=%d reason=%s", deduplicate(table, lease.run_id), "a writer outlived its driver")
    return find_done(table, is_retried, families)


def _count(unit: Unit, *, job: Job, columns: Columns, table: CaptionTable) -> int:
    """Return how many rows a unit gives, and save that, so that a tar is counted once."""

    def note(num_rows: int) -> None:
        if not job.config.dry_run:
            save_count(unit.ordinal, num_rows, table.run_folder)

    def note_further(num_images: int) -> None:
        if not job.config.dry_run:
            save_further(unit.ordinal, num_images, table.run_folder)

    return count_images(unit, columns, job.config.input, note, note_further)


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
        finished, held = partial(_finished, done.keys, unit), partial(_held, done.held, unit)
        end = _end(done, unit) if stop is None else stop
        num_skipped += done.keys.count(unit.ordinal, stop=end)
        slices += cut(unit, stop, finished, attempts.get(unit.ordinal, {}), num_listed, end, held)
        if left == 0:
            break
    return slices, num_skipped


def _end(done: Done, unit: Unit) -> int:
    """Return the position after the last row of an uncounted tar in the table. Raises OutputError for a wild one."""
    end = done.end(unit.ordinal)
    if end > unit.max_rows:
        raise OutputError(
            f"the table has row {end - 1:,} of {unit.name}; expected at most {unit.max_rows:,} rows of a tar:"
            " no run of this job wrote that part. Restore it, or choose another OUTPUT"
        )
    return end


def _finished(keys: KeySet, unit: Unit, start: int, stop: int) -> np.ndarray:
    return keys.positions(unit.ordinal, stop, start)


def _held(held: Mapping[str, KeySet], unit: Unit, start: int, stop: int) -> dict[str, np.ndarray]:
    return {family: _finished(keys, unit, start, stop) for family, keys in held.items()}


def _by_unit(attempts: Mapping[int, int]) -> dict[int, dict[int, int]]:
    found: dict[int, dict[int, int]] = {}
    for key, count in attempts.items():
        unit, position = split_key(key)
        found.setdefault(unit, {})[position] = count
    return found
