"""What each step of a sampled image costs on this machine: fetch | decode | encode | generate.

Runs the workers of a job in this process, and times them. Of Ray it knows only that the smallest job starts one.
"""

import json
import logging
import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from captioner.captioning.caption_worker import CaptionWorker
from captioner.captioning.costs import Costs, settings_digest
from captioner.captioning.decode_worker import DecodeWorker
from captioner.captioning.input_sample import ReadRate
from captioner.captioning.plan import Plan
from captioner.captioning.resources import Allocation
from captioner.captioning.timing import timed
from captioner.config import CaptionJobConfig
from captioner.errors import InputError, JobError
from captioner.inputs import Fetcher
from captioner.model.image_encoder import pixel_tensor
from captioner.prompts import num_tokens
from captioner.schema import ASKED, Reject

__all__ = ["PromptCost", "measure_costs", "measure_start"]

log = logging.getLogger("captioner")

_CAPTIONS_PER_SLOT = 8  # the last ones, which leave slots empty, then weigh little
_OF_A_SUBMISSION = {"RAY_ADDRESS", "RAY_JOB_CONFIG_JSON_ENV_VAR"}  # what would bind the job to a cluster, and its files
_TOO_FEW = "sample=%d slots=%d: slots stood empty, so a job will generate faster than predicted; give --sample %d"
_SMALLEST_JOB = """
import json, pickle, sys
from captioner.cluster.caption_pipeline import caption_images
print(json.dumps(caption_images(pickle.load(sys.stdin.buffer))))
"""


class PromptCost(NamedTuple):
    """What one of several prompts adds to the costs of an image."""

    model_s: float
    """Seconds on a model worker with all slots busy."""

    tokens_per_image: float


class _ModelTime(NamedTuple):
    """What one image takes on a model worker with all slots busy."""

    seconds: float
    work_s: float
    """CPU seconds of a model on CPUs, which others on the machine do not lengthen; else `seconds`."""

    num_tokens: float


def measure_costs(
    plan: Plan,
    rows: pa.Table,
    reading: ReadRate,
    allocation: Allocation,
    *,
    measure_start: Callable[[CaptionJobConfig], float],
    slow_sample_s: float,
) -> tuple[Costs, dict[str, PromptCost]]:
    """Return what an image costs, from sampled source rows, and what of that each of several named prompts does.

    slow_sample_s: a model that takes longer for the sample captions it once only. Raises InputError where no row is an
    image."""
    fetched, fetch_s, fetch_cpu_s = timed(lambda: _fetch(plan.config, rows))
    images, decode_s = _decode(plan, fetched)
    start_s = measure_start(plan.config)  # before the model is here: a GPU may not hold it twice
    worker = CaptionWorker(plan.config, _kept_fields(rows), allocation.torch_threads, prompts=plan.prompts)
    encode_s = _encode_s(worker, images)
    measure = partial(
        _model_s, worker, num_calls=allocation.caption_calls, slow_sample_s=slow_sample_s, answers=plan.answers
    )
    model = measure(images)
    costs = Costs(
        device=worker.captioner.model.device.type,
        num_images=rows.num_rows,
        captioned_share=images.num_rows / rows.num_rows,
        read_s=reading.read_s,
        read_cpu_s=reading.read_cpu_s,
        fetch_s=fetch_s / rows.num_rows,
        fetch_cpu_s=fetch_cpu_s / rows.num_rows,
        decode_s=decode_s / rows.num_rows,
        encode_s=encode_s,
        generate_s=max(0.0, model.seconds - encode_s),
        tokens_per_image=model.num_tokens,
        slots=worker.captioner.num_slots,
        model_threads=allocation.torch_threads,
        start_s=start_s,
        fingerprint=plan.model.fingerprint,
        settings=settings_digest(plan.config, plan.prompts),
    )
    names = [prompt.name for prompt in plan.prompts] if len(plan.prompts) > 1 else []
    return costs, {name: _added_by(model, measure(_without(name, images, plan))) for name in names}


def _without(prompt: str, images: pa.Table, plan: Plan) -> pa.Table:
    """Return images that are asked what they were, but for one prompt."""
    names, place = [one.name for one in plan.prompts], images.schema.get_field_index(ASKED.name)
    asked = [names] * images.num_rows if place < 0 else images.column(place).to_pylist()
    others = pa.array([[name for name in of_image if name != prompt] for of_image in asked], ASKED.type)
    return images.append_column(ASKED, others) if place < 0 else images.set_column(place, ASKED, others)


def _added_by(whole: _ModelTime, without: _ModelTime) -> PromptCost:
    """Return what a prompt adds, from what images take with it and without it."""
    share = max(0.0, 1.0 - without.work_s / whole.work_s)
    return PromptCost(whole.seconds * share, whole.num_tokens - without.num_tokens)


def _fetch(job: CaptionJobConfig, rows: pa.Table) -> pa.Table:
    """Return the rows with the bytes of each image in place of its URI."""
    uris = rows.column("uri").to_pylist()
    outcomes = iter(Fetcher(job.input_path, job.input, job.image).fetch([uri for uri in uris if uri is not None]))
    made = rows.to_pydict()
    for row, uri in enumerate(uris):
        if uri is not None:
            outcome = next(outcomes)
            made["uri"][row] = None
            if isinstance(outcome, Reject):
                made["reason"][row], made["detail"][row] = str(outcome.reason), outcome.detail
            else:
                made["data"][row] = outcome
    return pa.table(made, rows.schema)


def _decode(plan: Plan, fetched: pa.Table) -> tuple[pa.Table, float]:
    """Return the rows that are images, decoded, and the seconds that all rows took."""
    decoder = DecodeWorker(plan.config, plan.model.preprocessing, _kept_fields(fetched))
    decoder(fetched.slice(0, 1))  # starts its child process
    decoded, decode_s, _ = timed(lambda: decoder(fetched))
    images = decoded.filter(pc.is_null(decoded.column("reason")))
    if not images.num_rows:
        raise InputError(
            f"none of {fetched.num_rows} images of {plan.job.images} can be captioned:"
            f" {decoded.column('reason')[0]}: {decoded.column('detail')[0]}"
        )
    return images, decode_s


def _kept_fields(rows: pa.Table) -> list[pa.Field]:
    fixed = {"key", "image_id", "attempt", "reason", "detail", "uri", "data"}
    return [field for field in rows.schema if field.name not in fixed]


def _encode_s(worker: CaptionWorker, images: pa.Table) -> float:
    """Return the seconds that CLIP and the projector take for one image, by the path that a job takes."""
    encoder = worker.captioner.encoder
    pixels = pixel_tensor(images.column("pixels"), worker.captioner.model.image_size)
    batch = pixels[:1].expand(encoder.num_rows, *pixels.shape[1:]).contiguous()
    num_batches = max(2, len(pixels) // encoder.num_rows)
    encoder.encode_squares(batch)
    seconds = timed(lambda: [encoder.encode_squares(batch) for _ in range(num_batches)]).seconds
    tiles_per_image = len(pixels) / int(images.num_rows)
    return tiles_per_image * seconds / (num_batches * encoder.num_rows)


def _model_s(
    worker: CaptionWorker, images: pa.Table, *, num_calls: int, slow_sample_s: float, answers: Sequence[pa.Field]
) -> _ModelTime:
    """Return what one image takes. num_calls: fewest calls at once."""
    captioned, seconds, cpu_s = timed(lambda: worker(images))
    tokens = num_tokens(captioned, answers) / int(captioned.num_rows)
    slots = worker.captioner.num_slots
    if seconds > slow_sample_s:
        if images.num_rows < slots:
            log.info(_TOO_FEW, images.num_rows, slots, slots)
        num_images = images.num_rows + slots / 2  # half the slots stood empty while it ended
        return _ModelTime(seconds / num_images, _work_s(worker, seconds, cpu_s) / num_images, tokens)
    total = max(num_calls, -(-_CAPTIONS_PER_SLOT * slots // images.num_rows))
    with ThreadPoolExecutor(max(num_calls, -(-2 * slots // images.num_rows))) as threads:
        _, seconds, cpu_s = timed(lambda: list(threads.map(worker, [images] * total)))
    num_images = total * images.num_rows + slots / 2
    return _ModelTime(seconds / num_images, _work_s(worker, seconds, cpu_s) / num_images, tokens)


def _work_s(worker: CaptionWorker, seconds: float, cpu_s: float) -> float:
    return cpu_s if worker.captioner.model.device.type == "cpu" else seconds


def measure_start(job: CaptionJobConfig) -> float:
    """Return the seconds that a job takes beside its images: those of a job of the embedded images on a local Ray.

    Raises JobError where that job fails."""
    environment = {name: value for name, value in os.environ.items() if name not in _OF_A_SUBMISSION}
    with tempfile.TemporaryDirectory() as output:
        smallest = CaptionJobConfig(
            input_path="demo",
            output=output,
            model=job.model,
            decoding=job.decoding,
            scoring=job.scoring,
            resources=replace(job.resources, workers="1", cpu_workers="auto"),
        )
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", _SMALLEST_JOB],
            input=pickle.dumps(smallest),
            env=environment,
            capture_output=True,
            check=False,
        )
    if done.returncode:
        raise JobError(f"the smallest job failed: {done.stderr.decode(errors='replace').strip().splitlines()[-1]}")
    return float(json.loads(done.stdout.splitlines()[-1])["seconds"])
