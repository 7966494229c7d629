"""A caption job without Ray, in this process: the steps that its tasks and workers take, one after the other."""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import pyarrow as pa
import pytest

from captioner.captioning import captioner, decode_worker
from captioner.captioning.caption_worker import CaptionWorker
from captioner.captioning.decode_worker import DecodeWorker
from captioner.captioning.plan import Plan, plan_job
from captioner.config import CaptionJobConfig
from captioner.images import Decoder
from captioner.model.bundle import load
from captioner.model.caption_model import CaptionModel
from captioner.tables import PartSummary, Stamp

_decoder = cache(Decoder)
"""One for all jobs of the same preprocessing: to start its child process takes 0.3 s."""


_models: dict[str, CaptionModel] = {}


def _load(fingerprint: str, model: str, **options: Any) -> CaptionModel:
    """One model for all jobs of a bundle that has not changed."""
    key = f"{fingerprint} {model} {options}"
    if key not in _models:
        _models[key] = load(model, **options)
    return _models[key]


def run_job(
    config: CaptionJobConfig, run_id: str, *, num_rows: int | None = None, plan: Callable[..., Plan] = plan_job
) -> PartSummary:
    """Run a job; return what its last part holds. num_rows: after so many it is killed."""
    made = plan(config)
    made.table.record(run_id, {"model": {"name": "tiny"}})
    if not made.slices:
        return PartSummary(0, {}, 0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decode_worker, "Decoder", _decoder)
        decoder = DecodeWorker(made.config, made.model.preprocessing, made.row_columns)
        patch.setattr(captioner, "load", partial(_load, made.model.fingerprint))
        worker = CaptionWorker(made.config, made.row_columns, prompts=made.prompts)
    with worker.captioner:
        blocks = [decoder(rows) for piece in made.slices for rows in made.reader.read(piece)]
        rows = worker(pa.concat_tables(blocks).slice(0, num_rows))
    stamp = Stamp(run_id, made.table.digest)
    return made.table.write(rows, stamp, made.frozen.columns.kept, made.families)
