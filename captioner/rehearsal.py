"""A small random sample captioned on the machine at hand, each step timed apart: what `jobs/plan.py` runs.

    plan of the job -> sample -> read | fetch | decode | encode | generate -> Costs -> predict

Knows the steps and a clock; of Ray only that a job starts it. Writes OUTPUT/_run/plan.json where an OUTPUT is given.
"""

import json
import logging
import os
import pickle
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from captioner.config import CaptionJobConfig, InputConfig, PlanConfig, ResourceConfig, worker_range
from captioner.decode_worker import DecodeWorker
from captioner.errors import InputError, JobError
from captioner.machine import num_cpus
from captioner.plan import Plan, plan_job
from captioner.prediction import (
    Costs,
    Prediction,
    Prices,
    cpus_per_worker,
    keep,
    predict,
    recommended_decoders,
    recommended_flags,
    settings_digest,
)
from captioner.resources import Allocation, Cluster, allocate, readers_for, useful_workers
from captioner.rows import MAX_UNIT_ROWS, Reject
from captioner.slices import Slice, SliceReader
from captioner.sources import Fetcher
from captioner.sources.urls import redact
from captioner.worker import CaptionWorker, pixel_tensor

__all__ = ["rehearse"]

log = logging.getLogger("captioner")

_PIECES = 32  # places in the input that the sample comes from
_READ_S = 2.0  # of reading tell how fast it goes
_TAR_BLOCK = 512  # a member has a header of one, and fills up its last
_STEADY = 8  # captions for each slot: the last ones, which leave slots empty, then weigh little
_LONG_S = 10.0  # a model that took this long for the sample is not asked again
_SCALES = (1, 8, 64)
_OF_A_SUBMISSION = {"RAY_ADDRESS", "RAY_JOB_CONFIG_JSON_ENV_VAR"}  # what would bind the job to a cluster, and its files
_TOO_FEW = "sample=%d slots=%d: slots stood empty, so a job will generate faster than predicted; give --sample %d"
_SMALLEST = """
import json, pickle, sys
from captioner.caption_pipeline import caption_images
print(json.dumps(caption_images(pickle.load(sys.stdin.buffer))))
"""


def rehearse(config: PlanConfig) -> Mapping[str, Any]:
    """Return the summary of `jobs/plan.py`: what each step costs, what a job will take, which flags to give it.

    Raises UsageError for what a job would refuse, and InputError where no image of the sample can be captioned.
    """
    with tempfile.TemporaryDirectory() as folder:
        plan = _plan(config, folder)
        here = Cluster(cpus=num_cpus(), gpus=torch.cuda.device_count())
        allocation = allocate(_everything_here(config.resources), here, plan.num_left)
        pieces = random.Random(0).sample(plan.slices, min(_PIECES, len(plan.slices)))
        reading = _read(plan.reader, pieces)
        costs = _costs(plan, _sample(plan, pieces, config.sample), reading, allocation)
    if config.output:
        keep(costs, plan.table.store, plan.table.url)
    summary = _summary(config, plan.num_expected(reading.image_bytes), costs, allocation, here)
    summary["is_estimate"] = plan.num_left is None
    for line in _lines(summary):
        print(line, file=sys.stderr)
    return summary


def _plan(config: PlanConfig, folder: str) -> Plan:
    """Return the plan of the job, its input listed into a folder unless a run has frozen it."""
    output = config.output or str(Path(folder, "captions"))
    job = replace(config.job, output=output, dry_run=True)
    plan = plan_job(job, lambda num_images: log.info("listed=%d", num_images), scratch=str(Path(folder, "listing")))
    if not plan.slices:
        raise InputError(f"nothing of {redact(plan.config.input_path)} is left to caption into {redact(config.output)}")
    return plan


def _everything_here(resources: ResourceConfig) -> ResourceConfig:
    """Return resources with the pools of this machine: those that were asked for are those of the cluster."""
    return replace(resources, workers="auto", cpu_workers="auto")


@dataclass(frozen=True)
class _Reading:
    """How fast rows of the input come, in seconds a row."""

    read_s: float
    read_cpu_s: float
    image_bytes: float
    """Bytes of a tar for each of its images."""


def _read(reader: SliceReader, pieces: list[Slice]) -> _Reading:
    """Read some of the pieces from their beginning, for a while, as read tasks do."""
    until = time.perf_counter() + _READ_S
    read, seconds, cpu_s = _timed(
        lambda: [_read_piece(reader, piece, until) for piece in pieces if time.perf_counter() < until]
    )
    num_rows = max(1, sum(rows for rows, _, _ in read))
    whole = [found for found in read if found[2]] or read
    image_bytes = sum(size for _, size, _ in whole) / max(1, sum(rows for rows, _, _ in whole))
    return _Reading(seconds / num_rows, cpu_s / num_rows, max(1.0, image_bytes))


def _read_piece(reader: SliceReader, piece: Slice, until: float) -> tuple[int, int, bool]:
    """Return rows that were read, the bytes that they take in a tar, and whether these were all of its unit."""
    num_rows, num_bytes = 0, 0
    for table in reader.read(_uncounted(piece)):
        num_rows += table.num_rows
        num_bytes += _bytes_in_tar(table)
        if time.perf_counter() > until:
            return num_rows, num_bytes, False
    return num_rows, piece.unit.size_bytes or num_bytes, piece.done is None


def _uncounted(piece: Slice) -> Slice:
    """Return a slice that leaves no count of its tar behind when it was read to the end."""
    return replace(piece, stop=MAX_UNIT_ROWS) if piece.stop is None else piece


def _bytes_in_tar(table: pa.Table) -> int:
    lengths = pc.fill_null(pc.binary_length(table.column("data")), 0).to_numpy()
    return int(((lengths + 2 * _TAR_BLOCK - 1) // _TAR_BLOCK * _TAR_BLOCK).sum())


def _sample(plan: Plan, pieces: list[Slice], num_rows: int) -> pa.Table:
    """Return random rows of what is left, some from each of a few random places; always the same ones."""
    chance = random.Random(0)
    each = -(-num_rows // len(pieces))
    return pa.concat_tables(table for piece in pieces for table in _some_rows(plan.reader, piece, each, chance))


def _some_rows(reader: SliceReader, piece: Slice, num_rows: int, chance: random.Random) -> Iterator[pa.Table]:
    if piece.stop is not None:
        done = np.zeros(piece.stop - piece.start, bool) if piece.done is None else piece.done
        left = np.flatnonzero(~done).tolist()
        done = np.ones(len(done), bool)
        done[chance.sample(left, min(num_rows, len(left)))] = False
        piece = replace(piece, done=done)
    for table in islice(reader.read(_uncounted(piece)), 1):  # of a tar that nobody counted, the first ones
        yield table.slice(0, num_rows)


def _costs(plan: Plan, rows: pa.Table, reading: _Reading, allocation: Allocation) -> Costs:
    job = plan.config
    fetched, fetch_s, fetch_cpu_s = _timed(lambda: _fetched(job, rows))
    images, decode_s = _decoded(plan, fetched)
    start_s = _start_s(job)  # before the model is here: a card may not hold it twice
    worker = CaptionWorker(job, _kept(rows), allocation.torch_threads)
    encode_s = _encode_s(worker, images)
    model_s, num_tokens = _model_s(worker, images, allocation.caption_calls)
    captioner = worker.captioner
    return Costs(
        device=captioner.model.device.type,
        num_images=rows.num_rows,
        captioned_share=images.num_rows / rows.num_rows,
        read_s=reading.read_s,
        read_cpu_s=reading.read_cpu_s,
        fetch_s=fetch_s / rows.num_rows,
        fetch_cpu_s=fetch_cpu_s / rows.num_rows,
        decode_s=decode_s / rows.num_rows,
        encode_s=encode_s,
        generate_s=max(0.0, model_s - encode_s),
        tokens_per_image=num_tokens,
        slots=captioner.num_slots,
        model_threads=allocation.torch_threads,
        start_s=start_s,
        fingerprint=plan.model.fingerprint,
        settings=settings_digest(job),
    )


def _decoded(plan: Plan, fetched: pa.Table) -> tuple[pa.Table, float]:
    """Return the rows that are images, decoded, and the seconds that all rows took."""
    decoder = DecodeWorker(plan.config, plan.model.preprocessing, _kept(fetched))
    decoder(fetched.slice(0, 1))  # starts its child process
    decoded, decode_s, _ = _timed(lambda: decoder(fetched))
    images = decoded.filter(pc.is_null(decoded.column("reason")))
    if not images.num_rows:
        raise InputError(
            f"none of {fetched.num_rows} images of {redact(plan.config.input_path)} can be captioned:"
            f" {decoded.column('reason')[0]}: {decoded.column('detail')[0]}"
        )
    return images, decode_s


def _kept(rows: pa.Table) -> list[pa.Field]:
    fixed = {"key", "image_id", "attempt", "reason", "detail", "uri", "data"}
    return [field for field in rows.schema if field.name not in fixed]


def _timed(call: Callable[[], Any]) -> tuple[Any, float, float]:
    """Return what a call returns, its seconds, and the CPU seconds of this process meanwhile."""
    start, cpu = time.perf_counter(), time.process_time()
    found = call()
    return found, time.perf_counter() - start, time.process_time() - cpu


def _fetched(job: CaptionJobConfig, rows: pa.Table) -> pa.Table:
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


def _encode_s(worker: CaptionWorker, images: pa.Table) -> float:
    """Return the seconds that CLIP and the projector take for one image, by the path that a job takes."""
    encoder = worker.captioner.encoder
    pixels = pixel_tensor(images.column("pixels"), worker.captioner.model.image_size)
    batch = pixels[:1].expand(encoder.num_rows, *pixels.shape[1:]).contiguous()
    num_batches = max(2, len(pixels) // encoder.num_rows)
    encoder(batch)
    _, seconds, _ = _timed(lambda: [encoder(batch) for _ in range(num_batches)])
    return seconds / (num_batches * encoder.num_rows)


def _model_s(worker: CaptionWorker, images: pa.Table, num_calls: int) -> tuple[float, float]:
    """Return the seconds and tokens of one image on one model worker with all slots busy, by at least so many calls at
    once."""
    captioned, seconds, _ = _timed(lambda: worker(images))
    tokens: float = pc.mean(captioned.column("num_tokens")).as_py()
    slots = worker.captioner.num_slots
    if seconds > _LONG_S:
        if images.num_rows < slots:
            log.info(_TOO_FEW, images.num_rows, slots, slots)
        return seconds / (images.num_rows + slots / 2), tokens  # half the slots stood empty while it ended
    total = max(num_calls, -(-_STEADY * slots // images.num_rows))
    with ThreadPoolExecutor(max(num_calls, -(-2 * slots // images.num_rows))) as threads:
        _, seconds, _ = _timed(lambda: list(threads.map(worker, [images] * total)))
    return seconds / (total * images.num_rows + slots / 2), tokens


def _start_s(job: CaptionJobConfig) -> float:
    """Return what a job takes beside its images: a real one, of the embedded images, on a Ray of this machine."""
    environment = {name: value for name, value in os.environ.items() if name not in _OF_A_SUBMISSION}
    with tempfile.TemporaryDirectory() as output:
        smallest = CaptionJobConfig(
            input_path="demo",
            output=output,
            input=InputConfig(storage_options=job.input.storage_options),  # of the model's store
            model=job.model,
            decoding=job.decoding,
            scoring=job.scoring,
            resources=replace(_everything_here(job.resources), workers="1"),
        )
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", _SMALLEST],
            input=pickle.dumps(smallest),
            env=environment,
            capture_output=True,
            check=False,
        )
    if done.returncode:
        raise JobError(f"the smallest job failed: {done.stderr.decode(errors='replace').strip().splitlines()[-1]}")
    return float(json.loads(done.stdout.splitlines()[-1])["seconds"])


def _summary(
    config: PlanConfig, num_images: int | None, costs: Costs, allocation: Allocation, here: Cluster
) -> dict[str, Any]:
    prices = Prices(config.gpu_hourly, config.cpu_hourly)
    on_this = predict(costs, allocation, num_images, shared_cpus=here.cpus, prices=prices)
    scaled = [_scaled(costs, allocation, config.resources, size) for size in _sizes(config.resources, num_images)]
    return {
        "images": num_images,
        "sample": costs.num_images,
        "device": costs.device,
        "read_ms": _ms(costs.read_s),
        "fetch_ms": _ms(costs.fetch_s),
        "decode_ms": _ms(costs.decode_s),
        "encode_ms": _ms(costs.encode_s),
        "generate_ms": _ms(costs.generate_s),
        "tokens_per_image": round(costs.tokens_per_image, 1),
        "cpus_per_worker": round(cpus_per_worker(costs), 2),
        "slots": costs.slots,
        "here": _row(allocation, on_this),
        "clusters": [_row(size, predict(costs, size, num_images, shared_cpus=None, prices=prices)) for size in scaled],
        "recommended": recommended_flags(costs, allocation, num_images),
    }


def _sizes(resources: ResourceConfig, num_images: int | None) -> list[int]:
    """Return the numbers of workers to predict for: those asked for, or a few that the work keeps busy."""
    if wanted := worker_range(resources.workers, "--workers"):
        return [wanted[1]]
    return sorted({useful_workers(num_images, size) for size in _SCALES})


def _scaled(costs: Costs, allocation: Allocation, resources: ResourceConfig, num_workers: int) -> Allocation:
    """Return the allocation of a cluster with so many model workers and the decoders that keep them busy."""
    wanted = worker_range(resources.cpu_workers, "--cpu-workers")
    decoders = wanted[1] if wanted else recommended_decoders(costs, num_workers)
    return replace(
        allocation,
        workers=(num_workers, num_workers),
        decoders=(decoders, decoders),
        decoder_cpus=0.9,
        num_readers=readers_for(decoders),
    )


def _row(allocation: Allocation, found: Prediction) -> dict[str, Any]:
    return {
        "workers": allocation.workers[1],
        "cpu_workers": allocation.decoders[1],
        "images_per_s": round(found.images_per_s, 1),
        "tokens_per_s": round(found.tokens_per_s, 1),
        "bottleneck": found.bottleneck,
        "hours": None if found.seconds is None else round(found.seconds / 3600, 4),
        "price_per_million": None if found.price_per_million is None else round(found.price_per_million, 2),
    }


def _ms(seconds: float) -> float:
    return round(1000 * seconds, 3)


def _lines(summary: Mapping[str, Any]) -> Iterator[str]:
    """Yield the summary as people read it."""
    about = "about " if summary["is_estimate"] else ""
    images = "an unknown number of" if summary["images"] is None else f"{about}{summary['images']:,}"
    yield f"{images} images; measured on {summary['sample']} of them, model on {summary['device']}"
    for step in ("read", "fetch", "decode", "encode", "generate"):
        yield f"  {step:9} {summary[f'{step}_ms']:10.3f} ms an image"
    yield f"  {summary['tokens_per_image']:g} tokens an image, {summary['slots']} at a time"
    yield f"  a model worker needs {summary['cpus_per_worker']:g} CPUs that read, fetch and decode"
    yield "             workers  cpu-workers  images/s     hours  per million  bottleneck"
    for name, row in [("this machine", summary["here"]), *(("a cluster", row) for row in summary["clusters"])]:
        hours = "?" if row["hours"] is None else f"{row['hours']:.2f}"
        price = "?" if row["price_per_million"] is None else f"{row['price_per_million']:.2f}"
        yield (
            f"{name:12} {row['workers']:7} {row['cpu_workers']:12} {row['images_per_s']:9} {hours:>9} {price:>12}"
            f"  {row['bottleneck']}"
        )
    flags = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in summary["recommended"].items())
    yield f"next      {flags}"
