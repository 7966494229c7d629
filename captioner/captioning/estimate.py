"""What a caption job will take, from a small sample captioned on this machine: what `jobs/plan.py` runs.

    plan of the job -> sample -> costs of each step -> prediction for this machine and for clusters

Writes OUTPUT/_run/plan.json where an OUTPUT is given, so that the job's summary can compare. Knows no Ray.
"""

import logging
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from captioner.captioning.capacity import model_capacity
from captioner.captioning.costs import Costs, save_costs
from captioner.captioning.input_sample import measure_reading, sample_rows, sample_slices
from captioner.captioning.plan import Plan, plan_job
from captioner.captioning.prediction import (
    Prediction,
    Prices,
    cpus_per_worker,
    predict,
    recommended_decoders,
    recommended_flags,
)
from captioner.captioning.resources import Allocation, Cluster, allocate, readers_for, useful_workers
from captioner.config import CaptionJobConfig, PlanConfig, ResourceConfig, worker_range
from captioner.errors import InputError
from captioner.machine import num_cpus
from captioner.storage.urls import redact
from captioner.terminal import counted, say

if TYPE_CHECKING:
    from captioner.captioning.measurement import PromptCost  # not at run time: it brings torch

__all__ = ["estimate_job"]

log = logging.getLogger("captioner")

_CLUSTER_SIZES = (1, 8, 64)  # model workers


def estimate_job(
    config: PlanConfig,
    *,
    measure_start: Callable[[CaptionJobConfig], float] | None = None,
    slow_sample_s: float = 10.0,
) -> Mapping[str, Any]:
    """Return the summary of `jobs/plan.py`: what each step costs, what a job will take, which flags to give it.

    Without an input, what the model takes (`capacity`).
    measure_start, slow_sample_s: see `measurement.measure_costs`. Raises UsageError for what a job would refuse,
    and InputError where no image of the sample can be captioned.
    """
    if config.is_of_model:
        return model_capacity(config)
    with tempfile.TemporaryDirectory() as folder:
        plan = _plan(config, folder)
        import torch  # here, not above: what cannot run has been refused

        from captioner.captioning import measurement

        here = Cluster(cpus=num_cpus(), gpus=torch.cuda.device_count())
        # The pools of this machine: those that were asked for are those of the cluster.
        allocation = allocate(replace(config.resources, workers="auto", cpu_workers="auto"), here, plan.num_left)
        slices = sample_slices(plan.slices)
        reading = measure_reading(plan.reader, slices)
        rows = sample_rows(plan.reader, slices, config.sample)
        costs, of_prompts = measurement.measure_costs(
            plan,
            rows,
            reading,
            allocation,
            measure_start=measure_start or measurement.measure_start,
            slow_sample_s=slow_sample_s,
        )
    if config.output:
        save_costs(costs, plan.table.store, plan.table.location)
    summary = _summary(config, plan.num_expected(reading.image_bytes), costs, allocation, here)
    summary["is_estimate"] = plan.num_left is None
    if of_prompts:
        summary["prompts"] = _prompts(config, of_prompts, costs, allocation, here)
    say(_lines(summary, len(plan.prompts)))
    return summary


def _plan(config: PlanConfig, folder: str) -> Plan:
    """Return the plan of the job, its input listed into a folder unless a run has frozen it."""
    output = config.output or str(Path(folder, "captions"))
    job = replace(config.job, output=output, dry_run=True)
    plan = plan_job(job, lambda num_images: log.info("listed=%d", num_images), scratch=str(Path(folder, "listing")))
    if not plan.slices:
        raise InputError(f"nothing of {plan.job.images} is left to caption into {redact(config.output)}")
    return plan


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


def _prompts(
    config: PlanConfig, of_prompts: "Mapping[str, PromptCost]", costs: Costs, allocation: Allocation, here: Cluster
) -> dict[str, Any]:
    """Return what each named prompt adds, to the model's time and to the price of a million images on this machine."""
    prices = Prices(config.gpu_hourly, config.cpu_hourly)

    def price(generate_s: float) -> float | None:
        changed = replace(costs, generate_s=max(0.0, generate_s))
        return predict(changed, allocation, None, shared_cpus=here.cpus, prices=prices).price_per_million

    found = {}
    for name, added in of_prompts.items():
        with_it, without = price(costs.generate_s), price(costs.generate_s - added.model_s)
        found[name] = {
            "generate_ms": _ms(added.model_s),
            "tokens_per_image": round(added.tokens_per_image, 1),
            "price_per_million": None if with_it is None or without is None else round(with_it - without, 2),
        }
    return found


def _sizes(resources: ResourceConfig, num_images: int | None) -> list[int]:
    """Return the numbers of model workers to predict for: the one asked for, or a few that the work keeps busy."""
    if wanted := worker_range(resources.workers, "--workers"):
        return [wanted[1]]
    return sorted({useful_workers(num_images, size) for size in _CLUSTER_SIZES})


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


def _lines(summary: Mapping[str, Any], num_prompts: int) -> Iterator[str]:
    """Yield the summary as people read it."""
    about = "about " if summary["is_estimate"] else ""
    images = "an unknown number of" if summary["images"] is None else f"{about}{summary['images']:,}"
    yield f"{images} images; measured on {summary['sample']} of them, model on {summary['device']}"
    for step in ("read", "fetch", "decode", "encode", "generate"):
        yield f"  {step:9} {summary[f'{step}_ms']:10.3f} ms an image"
    of_prompts = f" to {counted(num_prompts, 'prompt')}" if num_prompts else ""
    yield f"  {summary['tokens_per_image']:g} tokens an image{of_prompts}, {summary['slots']} at a time"
    for name, added in summary.get("prompts", {}).items():
        priced = "" if added["price_per_million"] is None else f", {added['price_per_million']:.2f} per million"
        yield f"  of these {name} {added['generate_ms']:.3f} ms, {added['tokens_per_image']:g} tokens{priced}"
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
