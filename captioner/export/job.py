"""What `jobs/export.py` does: find the rows that are new, write them down as a batch, write its files, record them.

A killed export continues: the batch that it wrote down is finished first, and only shards that were not recorded are
written. Knows no format, and how shards are run only where one after the other is enough.
"""

import importlib.util
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from captioner.config import ExportConfig
from captioner.errors import ConfigError, InputError, OutputError
from captioner.export.formats.table import EXPORT_FORMATS
from captioner.export.hub import push
from captioner.export.images import ImageSource
from captioner.export.prompts import prompts_of
from captioner.export.record import Batch, ExportRecord
from captioner.export.request import DEFAULT_TEXT, ExportFormat, Outcome, Refusal, Request, Shard
from captioner.export.rows import NewRows, columns_of, cut, find_new, read_rows, selection_sql
from captioner.export.text import named_columns, text_sql, texts_sql
from captioner.prompts import details_name
from captioner.query.views import Connection, ask, select
from captioner.storage import Location
from captioner.storage.faults import output_errors
from captioner.tables import CaptionTable, ColumnFamily, open_table
from captioner.tables.table_images import TableImages
from captioner.terminal import counted, say

__all__ = ["Pending", "RunShards", "export_table", "write_shard", "write_shards"]


@dataclass(frozen=True)
class Pending:
    """The shards that are to be written, and how their rows are read."""

    connection: Connection
    table: CaptionTable
    request: Request
    form: ExportFormat
    batch: Batch
    numbers: Sequence[int]

    @property
    def reads_images(self) -> bool:
        """Whether the images are read again."""
        return self.form.reads_images and self.request.config.images

    def rows(self, number: int) -> Iterator[pa.RecordBatch]:
        """Yield the rows of a shard, as `read_rows`."""
        return read_rows(self.connection, self.request, self.form, self.batch.keys_of(number))


RunShards = Callable[[Pending], Iterator[Outcome]]
"""Writes the files of shards and yields what became of each."""


def write_shards(pending: Pending) -> Iterator[Outcome]:
    """Write the files of shards one after the other."""
    for number in pending.numbers:
        yield write_shard(pending.form, pending.request, number, pending.rows(number))


def write_shard(form: ExportFormat, request: Request, number: int, rows: Iterator[pa.RecordBatch]) -> Outcome:
    """Write the files of one shard and return what became of its rows. Raises StoreError, JobError."""
    shard = Shard(request, number, rows)
    form.write(shard)
    return shard.outcome()


def export_table(config: ExportConfig, run: RunShards = write_shards) -> Mapping[str, Any]:
    """Export what is new and return the summary.

    Raises ConfigError for a format or a text that cannot be, InputError for a table without such captions, OutputError
    for an OUT that holds something else."""
    start = time.monotonic()
    form = _format_of(config)
    table = open_table(Location(config.table, config.storage_options))
    output = _output(config, table.location)
    request = _request(table, config, form, output)
    record = ExportRecord(output)
    with output_errors(output):
        record.refuse_other_files(_settings(request, table, form))
        with record.lease():
            done = (_register if form.register else _export)(table, request, form, record, run)
            pushed = push(record, config.push_to_hub) if config.push_to_hub else 0
    say(_lines(done, output))
    return {
        "ok": done.has_any,
        "rows": done.num_rows,
        "refused": done.refused,
        **({"unanswered": done.unanswered} if done.unanswered else {}),
        "exports": [entry["number"] for entry in done.entries],
        **({"pushed_files": pushed} if config.push_to_hub else {}),
        "seconds": round(time.monotonic() - start, 2),
        "output": str(output),
    }


@dataclass(frozen=True)
class _Done:
    """What OUT now holds, as its record says."""

    before: Sequence[Mapping[str, Any]]
    """The entries of `_export.json` of earlier exports."""

    entries: Sequence[Mapping[str, Any]]
    """Those of this one."""

    without_text: int = 0
    """Images that were found without a text, which every export looks at again."""

    @property
    def num_rows(self) -> int:
        """The rows that this export wrote."""
        return sum(entry["rows"] for entry in self.entries)

    @property
    def answers(self) -> Mapping[str, int]:
        """Of columns that have a table of their own: that table -> rows that this export wrote."""
        return {entry["table"]: entry["answers"] for entry in self.entries if entry.get("answers")}

    @property
    def has_any(self) -> bool:
        """Whether OUT has any row."""
        return any(entry["rows"] for entry in [*self.before, *self.entries])

    @property
    def unanswered(self) -> dict[str, int]:
        """Prompt that was added later -> images in OUT that had no answer to it when they were exported."""
        summed = Counter[str]()
        for entry in [*self.before, *self.entries]:
            summed.update(entry.get("unanswered", {}))
        return dict(summed)

    @property
    def refused(self) -> dict[str, int]:
        """Reason -> images that this export left out; of all exports where this one found nothing new."""
        summed = Counter({str(Refusal.NO_TEXT): self.without_text})
        for entry in self.entries or self.before:
            summed.update({reason: num for reason, num in entry["refused"].items() if reason != Refusal.NO_TEXT})
        return dict(+summed)


def _lines(done: _Done, output: Location) -> list[str]:
    """Return what a person is told at the end."""
    left_out = [f"{counted(count, 'image')} left out: {reason}" for reason, count in done.refused.items()]
    left_out += [
        f"{counted(count, 'image')} exported without an answer to {prompt}, which these files never get: export to a"
        f' new OUT once it is there, or from the start with --where "{prompt}_details IS NOT NULL"'
        for prompt, count in done.unanswered.items()
    ]
    beside = [f"{counted(num_rows, 'answer')} in {table}, by key" for table, num_rows in done.answers.items()]
    if done.num_rows or beside:
        exported = [f"{counted(done.num_rows, 'image')} exported to {output}"] if done.num_rows else []
        return [*exported, *beside, *left_out]
    has_all = f"nothing is new: {output} has all" + (" but these" if left_out else "")
    return [has_all if done.has_any else f"NOTHING WAS EXPORTED to {output}", *left_out]


def _format_of(config: ExportConfig) -> ExportFormat:
    """Return the format. Raises ConfigError for an unknown one, a flag that it has no use for, a missing package."""
    form = EXPORT_FORMATS.get(config.format)
    if form is None:
        raise ConfigError(f"--format is {config.format}; expected one of {', '.join(EXPORT_FORMATS)}")
    if config.columns and not form.has_columns:
        raise ConfigError(f"--columns is {','.join(config.columns)}; expected none with --format {form.name}")
    if config.captions == "all" and not form.has_several:
        able = ", ".join(one.name for one in EXPORT_FORMATS.values() if one.has_several)
        raise ConfigError(f"--captions is all; expected best with --format {form.name}, or one of {able}")
    chosen = config.where or config.columns or config.text != DEFAULT_TEXT
    if form.register and chosen:
        raise ConfigError(
            f"--format {form.name} takes the parts as they are; expected no --where, --columns or --text with it"
        )
    if config.push_to_hub and not form.goes_to_hub:
        able = ", ".join(one.name for one in EXPORT_FORMATS.values() if one.goes_to_hub)
        raise ConfigError(f"--push-to-hub is {config.push_to_hub}; expected --format with it: one of {able}")
    if form.needs and importlib.util.find_spec(form.needs[0]) is None:
        package, extra = form.needs
        raise ConfigError(f"--format {form.name} needs the package {package}: pip install '.[{extra}]'")
    return form


def _output(config: ExportConfig, table: Location) -> Location:
    if config.output_storage_options is not None:
        return Location(config.output, config.output_storage_options)
    return table.beside(config.output)


def _request(table: CaptionTable, config: ExportConfig, form: ExportFormat, output: Location) -> Request:
    """Return what was asked for in the terms of the table. Reads no row.

    Raises ConfigError for a column that the table does not have or the format cannot hold, and for a --where that is
    no condition over the columns of `captions`."""

    def made(connection: Connection) -> Request | ConfigError:
        try:
            request = _in_terms_of(connection, table, config, form, output)
        except ConfigError as error:  # returned: what is raised is the fault of --where
            return error
        select(connection, selection_sql(request))
        return request

    where = f" WHERE ({config.where}\n)" if config.where.strip() else ""
    try:
        found = ask(table, made, f"SELECT key FROM captions{where}")
    except ConfigError as error:
        raise ConfigError(f"--where is {config.where}: {error}" if config.where else str(error)) from error
    if isinstance(found, ConfigError):
        raise found
    return found


def _in_terms_of(
    connection: Connection, table: CaptionTable, config: ExportConfig, form: ExportFormat, output: Location
) -> Request:
    kinds = columns_of(connection)
    unknown = [name for name in config.columns if name not in kinds]
    if unknown:
        raise ConfigError(f"--columns has {unknown[0]}; expected columns of the table: {', '.join(kinds)}")
    text = text_sql(config.text, kinds)
    texts = texts_sql(config.text, kinds) if config.captions == "all" else f"[{text}]"
    images = TableImages.of(table, config.image_access)
    request = Request(
        config=config,
        output=output,
        kinds=kinds,
        text=text,
        texts=texts,
        images=ImageSource(images),
        prompts=prompts_of(table, named_columns(config.text)) if form.needs_prompts and config.prompt is None else {},
        added=_added(table, config, form),
        folder=str((table.identity() or {}).get("input", "")),
    )
    form.columns(request)
    return request


def _added(table: CaptionTable, config: ExportConfig, form: ExportFormat) -> list[str]:
    """Return the prompts that were added later whose answers the files hold."""
    added = [family.prompt for family in table.families()[1:]]
    named = {*config.columns, *named_columns(config.text)}
    has_all = form.has_columns and not config.columns
    return [name for name in added if has_all or named & {name, details_name(name)}]


def _settings(request: Request, table: CaptionTable, form: ExportFormat) -> dict[str, Any]:
    """Return what decides the files of OUT: where it has all columns, those too that were added to the table later."""
    config = request.config
    added = list(request.added) if form.has_columns and not config.columns else []
    return {
        "table": table.digest,
        "format": config.format,
        "text": config.text,
        "where": config.where,
        "columns": list(config.columns),
        "captions": config.captions,
        "names": config.names,
        "rows_per_file": config.rows_per_file,
        "bytes_per_file": config.bytes_per_file,
        "images": config.images,
        "prompt": config.prompt,
        "iceberg_table": config.iceberg_table if config.format == "iceberg" else None,
        **({"csv_safe": True} if config.csv_safe else {}),  # left out, so that older exports stay the same
        **({"added_columns": added} if added else {}),
    }


def _export(table: CaptionTable, request: Request, form: ExportFormat, record: ExportRecord, run: RunShards) -> _Done:
    """Finish what an earlier export began, then export what is new."""
    before = record.entries()
    begun = list(record.batches(without={entry["number"] for entry in before}))
    record.remove_temporaries(everywhere=bool(begun))
    entries = [_finish(table, request, form, record, batch, run) for batch in begun]
    batch, without_text = ask(
        table, lambda connection: _plan(connection, request, form, record), selection_sql(request)
    )
    record.claim(_settings(request, table, form))  # not before: a selection without rows claims nothing
    if batch is not None:
        record.add_batch(batch)
        entries.append(_finish(table, request, form, record, batch, run))
    return _Done(before, entries, without_text)


def _plan(
    connection: Connection, request: Request, form: ExportFormat, record: ExportRecord
) -> tuple[Batch | None, int]:
    """Return the rows that are new as a batch, None for none, and the number of those without a text.

    Raises InputError where nothing was ever selected."""
    exported, number, num_shards = record.exported()
    new = find_new(connection, request, exported)
    without_text = new.refused[Refusal.NO_TEXT]
    if len(new.keys):
        return _cut_batch(new, request, form, record, number + 1, num_shards), without_text
    if not number:
        raise _nothing(request, new.num_selected)
    return None, without_text


def _cut_batch(
    new: NewRows, request: Request, form: ExportFormat, record: ExportRecord, number: int, num_shards: int
) -> Batch:
    """Return new rows as a batch whose shards follow the first ones. Raises OutputError for a file of others."""
    config = request.config
    holds_images = form.reads_images and config.images
    rows_per_file = config.rows_per_file or (min(form.rows_per_file, 10_000) if holds_images else form.rows_per_file)
    shards = cut(new, num_shards, rows_per_file, config.bytes_per_file if holds_images else None)
    for shard in range(num_shards, int(shards[-1]) + 1):
        name = form.file_of(shard)
        if name and record.store.info(record.location / name) is not None:
            raise OutputError(f"{record.location / name} exists and is no file of this export; expected to write it")
    facts = {
        "started": _now(),
        "runs": new.runs,
        "selected": len(new.keys) + new.refused.total(),
        "refused": dict(new.refused),
        **({"unanswered": dict(new.unanswered)} if new.unanswered else {}),
    }
    return Batch(number, new.keys, shards, facts)


def _nothing(request: Request, num_selected: int) -> InputError:
    where = f" --where {request.config.where}" if request.config.where else ""
    if num_selected:
        return InputError(
            f"--text {request.config.text} is empty for all {num_selected:,} captions{where}; expected a text for some"
        )
    return InputError(f"the table has no captions{where}; expected some to export")


def _finish(
    table: CaptionTable, request: Request, form: ExportFormat, record: ExportRecord, batch: Batch, run: RunShards
) -> dict[str, Any]:
    """Write the files of a batch that are not there; return its entry in `_export.json`."""

    def write_rest(connection: Connection) -> None:
        finished = record.finished()
        numbers = [number for number in batch.shard_numbers if number not in finished]
        for outcome in run(Pending(connection, table, request, form, batch, numbers)) if numbers else ():
            record.finish(outcome)

    ask(table, write_rest, "FROM captions")
    return record.finish_batch(batch)


def _register(table: CaptionTable, request: Request, form: ExportFormat, record: ExportRecord, run: RunShards) -> _Done:
    """Let a format register the parts themselves. Raises InputError where there are none."""
    del run
    if not table.parts("captions"):
        raise _nothing(request, 0)
    record.claim(_settings(request, table, form))
    before, entries = record.entries(), list[Mapping[str, Any]]()
    for family in table.families():
        if parts := table.parts(family.rows):
            entry = _registered(form, table, request, family, parts)
            if entry["key"] not in [one.get("key") for one in before]:
                entries.append({"number": len(before) + len(entries) + 1, **entry})
                record.add_entry(entries[-1])
    return _Done(before, entries)


def _registered(
    form: ExportFormat, table: CaptionTable, request: Request, family: ColumnFamily, parts: Sequence[str]
) -> dict[str, Any]:
    """Return the entry of a column family whose parts are registered; the rows of an added one are no new images."""
    assert form.register is not None
    started = _now()
    counts = form.register(request, table, family, parts)
    rows = {"rows": 0, "answers": counts["rows"]} if family.is_added else {}
    return {"started": started, "refused": {}, **counts, **rows, "finished": _now()}


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
