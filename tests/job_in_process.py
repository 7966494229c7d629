"""A caption job without Ray, in this process: the steps that its tasks and workers take, one after the other."""

from collections.abc import Callable

import pyarrow as pa

from captioner.captioning.caption_worker import CaptionWorker
from captioner.captioning.decode_worker import DecodeWorker
from captioner.captioning.plan import Plan, plan_job
from captioner.config import CaptionJobConfig
from captioner.tables import PartSummary, Stamp


def run_job(
    config: CaptionJobConfig, run_id: str, *, num_rows: int | None = None, plan: Callable[..., Plan] = plan_job
) -> PartSummary:
    """Run a job; return what its last part holds. num_rows: after so many it is killed."""
    made = plan(config)
    made.table.record(run_id, {"model": {"name": "tiny"}})
    if not made.slices:
        return PartSummary(0, {}, 0)
    decoder = DecodeWorker(made.config, made.model.preprocessing, made.row_columns)
    worker = CaptionWorker(made.config, made.row_columns, prompts=made.prompts)
    with worker.captioner:
        blocks = [decoder(rows) for piece in made.slices for rows in made.reader.read(piece)]
        rows = worker(pa.concat_tables(blocks).slice(0, num_rows))
    stamp = Stamp(run_id, made.table.digest)
    return made.table.write(rows, stamp, made.frozen.columns.kept, made.families)
