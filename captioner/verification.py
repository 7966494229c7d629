"""What `jobs/verify.py` says and does: whether a caption table holds every image of its input exactly once; what a
repair puts aside; fewer parts.
"""

import logging
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from captioner import __version__
from captioner.config import VerifyConfig
from captioner.errors import InputError, OutputError
from captioner.sources import Frozen, listed_ids, load_frozen
from captioner.sources.faults import output_errors
from captioner.sources.urls import absolute, redact
from captioner.tables import Audit, CaptionTable, Finding, audit, compact, findings, holder, repair
from captioner.tables.audit import Problem
from captioner.tables.lease import refuse_if_held

__all__ = ["verify"]

log = logging.getLogger("captioner")


def verify(config: VerifyConfig) -> Mapping[str, Any]:
    """Return the proof as a summary, `ok` if it holds; repair or compact the table first where that is asked for.

    Raises InputError where no table is, OutputError where another job writes it and it was to be changed.
    """
    table = CaptionTable(absolute(config.table), config.storage_options)
    with output_errors(table.url):
        frozen = load_frozen(table.run_folder, config.storage_options)
        if frozen is None or table.identity() is None:
            raise InputError(f"{redact(table.url)} is no caption table; expected the OUTPUT of jobs/caption.py")
        changed = _change(table, frozen, config) if config.repair or config.compact else {}
        found, problems = _audit(table, frozen, config)
        for line in _lines(found, problems, table):
            print(line, file=sys.stderr)
    return {"ok": found.is_whole, **vars(found), **changed, "output": redact(table.url)}


def _audit(table: CaptionTable, frozen: Frozen, config: VerifyConfig) -> tuple[Audit, list[Problem]]:
    return audit(table, frozen, listed_ids(frozen, table.run_folder, config.storage_options))


def _change(table: CaptionTable, frozen: Frozen, config: VerifyConfig) -> dict[str, Any]:
    """Repair and compact the table under its lease, or say what would be done."""
    refuse_if_held(table.store, table.run_folder)
    if config.dry_run:
        _, found = _findings(table, frozen, config)
        return {"dry_run": True, "repairs": len(found)}
    with table.take_lease("repair" if config.repair else "compact") as lease:
        audited, found = _findings(table, frozen, config)
        changed: dict[str, Any] = {}
        if config.repair and found:
            changed = {"repairs": len(found), "dropped": repair(table, frozen, found, lease.run_id)}
            print(f"  put aside below {redact(table.run_folder)}/removed/{lease.run_id}", file=sys.stderr)
        if config.compact:
            changed |= _compact(table, audited, [] if config.repair else found, lease.run_id)
    return changed


def _findings(table: CaptionTable, frozen: Frozen, config: VerifyConfig) -> tuple[Audit, list[Finding]]:
    audited, problems = _audit(table, frozen, config)
    found = list(findings(table, frozen, problems))
    if config.repair:
        for finding in found:
            print(f"  {finding.kind}: {redact(finding.url)}: {finding.why}", file=sys.stderr)
        if not found:
            print("nothing to repair", file=sys.stderr)
    return audited, found


def _compact(table: CaptionTable, audited: Audit, found: Sequence[Finding], run_id: str) -> dict[str, Any]:
    wrong = [finding.url for finding in found if finding.kind != "leftover"]
    wrong += [*audited.foreign_parts, *audited.strangers]
    if wrong:
        raise OutputError(
            f"{redact(table.url)} has {len(wrong)} files that have to be mended before it can be compacted, such as"
            f" {redact(wrong[0])}; repair it with --repair, and move what is not of this table away"
        )
    facts = {"purpose": "compact", "versions": {"captioner": __version__}}
    table.record(run_id, facts | {"started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())})
    counts = compact(table, run_id)
    for folder, (before, after) in counts.items():
        print(f"  {folder}: {before:,} parts are {after:,} now", file=sys.stderr)
    return {"parts": {folder: after for folder, (_, after) in counts.items()}}


def _lines(audit: Audit, problems: Sequence[Problem], table: CaptionTable) -> Iterator[str]:
    """Yield the proof as people read it: the sum, the reasons, and whatever breaks it."""
    if writer := holder(table.store, table.run_folder):
        yield f"run {writer.run_id} on {writer.host} may still write this table: what is missing may be on its way"
    read = "unknown" if audit.read is None else f"{audit.read:,}"
    sign = "=" if audit.is_whole else "!="
    yield f"read {read} {sign} captioned {audit.captioned:,} + failed {audit.failed:,}"
    for reason, count in sorted(audit.failed_by_reason.items(), key=lambda item: -item[1]):
        yield f"  {reason:16} {count:,}"
    yield f"  missing {audit.missing:,}, twice {audit.duplicated:,}, of no input row {audit.alien:,}"
    if audit.misnamed:
        yield f"  {audit.misnamed:,} rows have another image_id than the input has at their place"
    if audit.unread_units:
        yield f"  {audit.unread_units:,} input files were not read to their end: run the same command again"
    yield from (f"  {problem.kind}: {redact(problem.url)}: {problem.why}" for problem in problems)
    if audit.duplicated or audit.torn_parts or audit.alien_failures:
        yield f"  next: python jobs/verify.py {redact(table.url)} --repair"
