"""What `jobs/verify.py` does: audit a caption table, and repair or compact it where that is asked for."""

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from captioner import __version__
from captioner.config import VerifyConfig
from captioner.errors import InputError, OutputError
from captioner.inputs import Frozen, listed_ids, load_frozen
from captioner.storage import Location
from captioner.storage.faults import output_errors
from captioner.storage.urls import redact
from captioner.tables import Audit, CaptionTable, Finding, audit, compact, findings, holder, repair
from captioner.tables.audit import AddedAudit, Problem
from captioner.tables.lease import refuse_if_held
from captioner.terminal import command, say

__all__ = ["verify"]


def verify(config: VerifyConfig) -> Mapping[str, Any]:
    """Repair or compact the table where that is asked for, then audit it; return the audit as a summary.

    Raises InputError where no table is, OutputError where it is to be changed and another job writes it.
    """
    table = CaptionTable(Location(config.table, config.storage_options))
    with output_errors(table.location):
        frozen = load_frozen(table.run_folder)
        if frozen is None or table.identity() is None:
            raise InputError(f"{table.location} is no caption table; expected the OUTPUT of jobs/caption.py")
        changed = _change(table, frozen, config) if config.repair or config.compact else {}
        found, problems = _audit(table, frozen)
        say(_lines(found, problems, table))
    columns = {name: {"ok": one.is_whole, **vars(one)} for name, one in found.columns.items()}
    of_captions = {name: value for name, value in vars(found).items() if name != "columns"}
    return {
        "ok": found.is_whole,
        **of_captions,
        **({"columns": columns} if columns else {}),
        **changed,
        "output": str(table.location),
    }


def _audit(table: CaptionTable, frozen: Frozen) -> tuple[Audit, list[Problem]]:
    return audit(table, frozen, listed_ids(frozen, table.run_folder))


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
            say([f"  put aside below {table.run_folder}/removed/{lease.run_id}"])
        if config.compact:
            changed |= _compact(table, audited, [] if config.repair else found, lease.run_id)
    return changed


def _findings(table: CaptionTable, frozen: Frozen, config: VerifyConfig) -> tuple[Audit, list[Finding]]:
    audited, problems = _audit(table, frozen)
    found = list(findings(table, frozen, problems))
    if config.repair:
        for finding in found:
            say([f"  {finding.kind}: {redact(finding.url)}: {finding.why}"])
        if not found:
            say(["nothing to repair"])
    return audited, found


def _compact(table: CaptionTable, audited: Audit, found: Sequence[Finding], run_id: str) -> dict[str, Any]:
    wrong = [finding.url for finding in found if finding.kind != "leftover"]
    wrong += [*audited.foreign_parts, *audited.strangers]
    if wrong:
        raise OutputError(
            f"{table.location} has {len(wrong)} files that have to be repaired before it can be compacted, such as"
            f" {redact(wrong[0])}; repair it with --repair, and move what is not of this table away"
        )
    facts: dict[str, Any] = {"purpose": "compact", "versions": {"captioner": __version__}}
    facts |= {"started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
    table.record(run_id, facts)
    counts = compact(table, run_id)
    for folder, (before, after) in counts.items():
        say([f"  {folder}: {before:,} parts are {after:,} now"])
    summary = {"parts": {folder: after for folder, (_, after) in counts.items()}}
    table.record(run_id, facts | {"summary": summary})
    return summary


def _lines(audit: Audit, problems: Sequence[Problem], table: CaptionTable) -> Iterator[str]:
    """Yield the audit as lines for people: the sum, the reasons, and each problem."""
    if writer := holder(table.store, table.run_folder):
        yield f"run {writer.run_id} on {writer.host} may still write this table: what is missing may be on its way"
    read = "unknown" if audit.read is None else f"{audit.read:,}"
    sign = "=" if audit.has_whole_captions else "!="
    yield f"read {read} {sign} captioned {audit.captioned:,} + failed {audit.failed:,}"
    yield from _row_lines(audit)
    if audit.unread_units:
        yield f"  {audit.unread_units:,} input files were not read to their end: run the same command again"
    for name, added in audit.columns.items():
        yield from _added_lines(name, added, audit.captioned)
    yield from (f"  {problem.kind}: {redact(problem.url)}: {problem.why}" for problem in problems)
    everything: list[Audit | AddedAudit] = [audit, *audit.columns.values()]
    if any(one.missing for one in everything) and not (any(one.duplicated for one in everything) or audit.torn_parts):
        yield "  next: the command of the caption job again, which captions what is missing"
    if audit.torn_parts or any(one.duplicated or one.alien_failures for one in everything):
        yield f"  next: {command('verify', str(table.location), '--repair')}"


def _added_lines(name: str, audit: AddedAudit, captioned: int) -> Iterator[str]:
    """Yield what an audit found of a prompt that was added later."""
    sign = "=" if audit.is_whole else "!="
    yield f"{name}: captioned {captioned:,} {sign} answered {audit.answered:,} + failed {audit.failed:,}"
    yield from _row_lines(audit)


def _row_lines(audit: Audit | AddedAudit) -> Iterator[str]:
    """Yield why rows failed, and which rows are wrong."""
    for reason, count in sorted(audit.failed_by_reason.items(), key=lambda item: -item[1]):
        yield f"  {reason:16} {count:,}"
    yield f"  missing {audit.missing:,}, twice {audit.duplicated:,}, of no input row {audit.alien:,}"
    if audit.misnamed:
        yield f"  {audit.misnamed:,} rows have another image_id than the input has at their place"
