"""A small random sample captioned on the machine at hand, each step timed apart: what `jobs/plan.py` runs.

    frozen input -> sample -> fetch | decode | encode | generate -> Costs -> predict

Knows the steps and a clock; of Ray only that a job starts it. Writes OUTPUT/_run/plan.json where an OUTPUT is given.
"""

import json
import os
import pickle
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from captioner import demo
from captioner.config import CaptionJobConfig, InputConfig, PlanConfig
from captioner.decode_worker import DecodeWorker
from captioner.errors import InputError, JobError
from captioner.model.bundle import BundleDescription, describe
from captioner.plan import output_options
from captioner.prediction import Costs, Prediction, Prices, cpus_per_worker, keep, predict, recommended_decoders
from captioner.resources import Allocation, Cluster, allocate
from captioner.rows import Reject
from captioner.slices import Slice, SliceReader, cut
from captioner.sources import Fetcher, Frozen, freeze, open_store
from captioner.sources.urls import absolute, redact
from captioner.worker import CaptionWorker, pixel_tensor

__all__ = ["rehearse"]

_PIECES = 32  # places in the input that the sample comes from
_CALLS = 4  # calls that share one engine, as in a job
_STEADY = 8  # captions for each slot: the last ones, which leave slots empty, then weigh little
_LONG_S = 10.0  # a model that took this long for the sample is not asked again
_SCALES = (1, 8, 64)
_SMALLEST = """
import json, pickle, sys
from captioner.caption_pipeline import caption_images
print(json.dumps(caption_images(pickle.load(sys.stdin.buffer))))
"""


def rehearse(config: PlanConfig) -> Mapping[str, Any]:
    """Return the summary of `jobs/plan.py`: what each step costs, what a job will take, which flags to give it.

    Raises UsageError for what a job would refuse, and InputError where no image of the sample can be captioned.
    """
    job = _resolved(config.job)
    model = describe(job.model.model, job.input.storage_options, prompt=job.model.prompt)
    here = Cluster(cpus=os.cpu_count() or 1, gpus=torch.cuda.device_count())
    with tempfile.TemporaryDirectory() as folder:
        frozen = freeze(job.input_path, job.input, folder, None)
        allocation = allocate(job.resources, here, frozen.num_images)
        costs = _costs(job, model, _sample(job, frozen, folder, config.sample), allocation)
    if config.output:
        keep(costs, open_store(job.output, output_options(job)), job.output)
    summary = _summary(config, frozen, costs, allocation, here)
    for line in _lines(summary):
        print(line, file=sys.stderr)
    return summary


def _resolved(job: CaptionJobConfig) -> CaptionJobConfig:
    path = str(demo.images_path()) if job.input_path == "demo" else job.input_path
    return replace(job, input_path=absolute(path), output=absolute(job.output))


def _sample(job: CaptionJobConfig, frozen: Frozen, folder: str, num_rows: int) -> pa.Table:
    """Return random rows of the input, some from each of a few random places; always the same ones."""
    chance = random.Random(0)
    none = np.empty(0, bool)
    pieces = [
        piece
        for unit in frozen.units
        for piece in cut(unit, unit.num_rows, none if unit.num_rows is None else np.zeros(unit.num_rows, bool), {})
    ]
    chosen = chance.sample(pieces, min(_PIECES, len(pieces)))
    reader = SliceReader(config=job, columns=frozen.columns, run_folder=folder, output_options={})
    each = -(-num_rows // len(chosen))
    return pa.concat_tables(table for piece in chosen for table in _some_rows(reader, piece, each, chance))


def _some_rows(reader: SliceReader, piece: Slice, num_rows: int, chance: random.Random) -> Iterator[pa.Table]:
    if piece.stop is not None:
        left = piece.stop - piece.start
        done = np.ones(left, bool)
        done[chance.sample(range(left), min(num_rows, left))] = False
        piece = replace(piece, done=done)
    for table in islice(reader.read(piece), 1):  # of a tar that nobody counted, the first ones
        yield table.slice(0, num_rows)


def _costs(job: CaptionJobConfig, model: BundleDescription, rows: pa.Table, allocation: Allocation) -> Costs:
    fetched, fetch_s, fetch_cpu_s = _timed(lambda: _fetched(job, rows))
    decoder = DecodeWorker(job, model.preprocessing, _kept(rows))
    decoder(fetched.slice(0, 1))  # starts its child process
    decoded, decode_s, _ = _timed(lambda: decoder(fetched))
    images = decoded.filter(pc.is_null(decoded.column("reason")))
    if not images.num_rows:
        raise InputError(
            f"none of {rows.num_rows} images of {redact(job.input_path)} can be captioned:"
            f" {decoded.column('reason')[0]}: {decoded.column('detail')[0]}"
        )
    worker = CaptionWorker(job, _kept(rows), allocation.torch_threads)
    encode_s = _encode_s(worker, images)
    model_s, num_tokens = _model_s(worker, images)
    captioner = worker.captioner
    return Costs(
        device=captioner.model.device.type,
        num_images=rows.num_rows,
        captioned_share=images.num_rows / rows.num_rows,
        fetch_s=fetch_s / rows.num_rows,
        fetch_cpu_s=fetch_cpu_s / rows.num_rows,
        decode_s=decode_s / rows.num_rows,
        encode_s=encode_s,
        generate_s=max(0.0, model_s - encode_s),
        tokens_per_image=num_tokens,
        slots=captioner.num_slots,
        model_threads=allocation.torch_threads,
        start_s=_start_s(job),
        fingerprint=model.fingerprint,
    )


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
    """Return the seconds that CLIP and the projector take for one image."""
    captioner = worker.captioner
    pixels = pixel_tensor(images.column("pixels"), captioner.model.image_size)
    batch = pixels[:1].expand(captioner.encode_rows, *pixels.shape[1:]).contiguous()
    num_batches = max(2, len(pixels) // captioner.encode_rows)

    def encode(times: int) -> None:
        for _ in range(times):
            last = captioner.model.encode(batch)
        last.cpu()  # waits for the device

    encode(1)
    _, seconds, _ = _timed(lambda: encode(num_batches))
    return seconds / (num_batches * captioner.encode_rows)


def _model_s(worker: CaptionWorker, images: pa.Table) -> tuple[float, float]:
    """Return the seconds and tokens of one image on one model worker with all slots busy."""
    captioned, seconds, _ = _timed(lambda: worker(images))
    tokens: float = pc.mean(captioned.column("num_tokens")).as_py()
    slots = worker.captioner.num_slots
    if seconds > _LONG_S:
        return seconds / (images.num_rows + slots / 2), tokens  # half the slots stood empty while it ended
    calls = max(_CALLS, -(-_STEADY * slots // images.num_rows))
    with ThreadPoolExecutor(_CALLS) as threads:
        _, seconds, _ = _timed(lambda: list(threads.map(worker, [images] * calls)))
    return seconds / (calls * images.num_rows + slots / 2), tokens


def _start_s(job: CaptionJobConfig) -> float:
    """Return what a job takes beside its images: a real one, of the embedded images, on a Ray of this machine."""
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    with tempfile.TemporaryDirectory() as output:
        smallest = CaptionJobConfig(
            input_path="demo",
            output=output,
            input=InputConfig(storage_options=job.input.storage_options),  # of the model's store
            model=job.model,
            decoding=job.decoding,
            scoring=job.scoring,
            resources=job.resources,
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


def _summary(config: PlanConfig, frozen: Frozen, costs: Costs, allocation: Allocation, here: Cluster) -> dict[str, Any]:
    prices = Prices(config.gpu_hourly, config.cpu_hourly)
    num_images = frozen.num_images
    on_this = predict(costs, allocation, num_images, shared_cpus=here.cpus, prices=prices)
    sizes = _SCALES if config.resources.workers == "auto" else (allocation.workers[1],)
    scaled = [_scaled(costs, allocation, size) for size in sizes]
    return {
        "images": num_images,
        "sample": costs.num_images,
        "device": costs.device,
        "fetch_ms": _ms(costs.fetch_s),
        "decode_ms": _ms(costs.decode_s),
        "encode_ms": _ms(costs.encode_s),
        "generate_ms": _ms(costs.generate_s),
        "tokens_per_image": round(costs.tokens_per_image, 1),
        "cpus_per_worker": round(cpus_per_worker(costs), 2),
        "slots": costs.slots,
        "here": _row(allocation, on_this),
        "clusters": [_row(size, predict(costs, size, num_images, shared_cpus=None, prices=prices)) for size in scaled],
    }


def _scaled(costs: Costs, allocation: Allocation, num_workers: int) -> Allocation:
    """Return the allocation of a cluster with so many model workers and the decoders that keep them busy."""
    decoders = recommended_decoders(costs, num_workers)
    return replace(allocation, workers=(num_workers, num_workers), decoders=(decoders, decoders), decoder_cpus=0.9)


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
    images = "an unknown number of" if summary["images"] is None else f"{summary['images']:,}"
    yield f"{images} images; measured on {summary['sample']} of them, model on {summary['device']}"
    for step in ("fetch", "decode", "encode", "generate"):
        yield f"  {step:9} {summary[f'{step}_ms']:10.3f} ms an image"
    yield f"  {summary['tokens_per_image']:g} tokens an image, {summary['slots']} at a time"
    yield f"  a model worker needs {summary['cpus_per_worker']:g} CPUs that fetch and decode"
    yield "             workers  cpu-workers  images/s     hours  per million  bottleneck"
    for name, row in [("this machine", summary["here"]), *(("a cluster", row) for row in summary["clusters"])]:
        hours = "?" if row["hours"] is None else f"{row['hours']:.2f}"
        price = "?" if row["price_per_million"] is None else f"{row['price_per_million']:.2f}"
        yield (
            f"{name:12} {row['workers']:7} {row['cpu_workers']:12} {row['images_per_s']:9} {hours:>9} {price:>12}"
            f"  {row['bottleneck']}"
        )
    best = summary["clusters"][-1]
    yield f"next      --workers 1:{best['workers']} --cpu-workers 1:{best['cpu_workers']} --slots {summary['slots']}"
