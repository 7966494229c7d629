"""The caption job: plan it, run it on Ray, say what came of it.

Imports Ray once a plan is made, so that what cannot run is refused at once. The stream is in `caption_stream`.
"""

import logging
import sys
from collections.abc import Mapping
from contextlib import ExitStack, redirect_stdout
from typing import Any

from captioner.captioning.closing import closing_lines
from captioner.captioning.plan import Plan, plan_job
from captioner.captioning.summary import dry_run_summary, run_record, summarize
from captioner.cluster.progress import progress
from captioner.config import CaptionJobConfig
from captioner.storage.faults import output_errors
from captioner.terminal import say

__all__ = ["caption_images"]

log = logging.getLogger("captioner")


def caption_images(config: CaptionJobConfig) -> Mapping[str, Any]:
    """Run the job, or for a dry run print its plan; return the summary whose fields the guide lists.

    Raises UsageError before anything is started for what cannot run, JobError when the job itself fails.
    """
    with output_errors(config.output), ExitStack() as held:  # errors of the input have been converted before
        plan = plan_job(config, _report_listing, lambda table: held.enter_context(table.take_lease("caption")))
        say(plan.lines())
        if config.dry_run:
            return dry_run_summary(plan)
        with redirect_stdout(sys.stderr):  # Ray prints what happens to workers on stdout
            summary = _run(plan) if plan.slices else _nothing_left(plan)
        plan.failure_limit.check(summary["failed_by_reason"], summary["read"] + plan.num_skipped)
        say(closing_lines(plan, summary))
    return summary


def _run(plan: Plan) -> dict[str, Any]:
    with progress(plan.num_left, num_done=plan.num_skipped) as shown:
        shown.phase = "starting Ray"
        from captioner.cluster.caption_stream import run  # here, not above: it brings Ray

        return run(plan, shown)


def _nothing_left(plan: Plan) -> dict[str, Any]:
    """Return the summary of a run that found nothing to do.

    It is recorded where no earlier run is known to have finished: one that was killed after its last part."""
    assert plan.lease is not None
    summary = summarize(plan, [], 0.0)
    if not any({"model", "summary"} <= set(plan.table.recorded(run_id)) for run_id in plan.table.run_ids()):
        plan.table.record(plan.lease.run_id, run_record(plan, None) | {"summary": summary})
    return summary


def _report_listing(num_images: int) -> None:
    log.info("listed=%d", num_images)
