"""The same caption job in this process, without Ray: an unbroken table, or the rest of one whose job was killed."""

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

from captioner.captioning.plan import plan_job
from captioner.captioning.summary import summarize
from captioner.command_line import parse
from captioner.config import CaptionJobConfig
from tests.job_in_process import run_job

__all__ = ["captioned_without_ray"]


def captioned_without_ray(arguments: Sequence[str]) -> dict[str, Any]:
    """Caption what is left, under the table's lease, and write it as one part; return the summary.

    arguments: INPUT, OUTPUT and the flags of the command."""
    config = parse(CaptionJobConfig, list(arguments))
    with ExitStack() as held:
        plan = plan_job(config, take_lease=lambda table: held.enter_context(table.take_lease("caption")))
        assert plan.lease is not None
        part = run_job(config, plan.lease.run_id, plan=lambda _: plan)
        return summarize(plan, [part], seconds=1.0)
