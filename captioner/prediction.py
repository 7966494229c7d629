"""What a caption job will take, from what each step of one image costs. Arithmetic only; knows no Ray and no model.

An image is read, fetched, decoded, encoded and captioned by pools that work at the same time, so the slowest pool
decides. Where all of them share CPUs there is one more limit: the CPU seconds that an image takes in total.

    Costs (measured by `captioner.rehearsal`) -> predict -> Prediction
"""

import hashlib
import json
import logging
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from captioner.config import CaptionJobConfig
from captioner.resources import Allocation, useful_workers
from captioner.sources import StoreError
from captioner.sources.store import Store
from captioner.sources.urls import join

__all__ = [
    "Costs",
    "Prediction",
    "Prices",
    "cpus_per_worker",
    "keep",
    "kept",
    "predict",
    "recommended_decoders",
    "recommended_flags",
    "settings_digest",
]

log = logging.getLogger("captioner")

_RAY_CPU_S = 0.0012
"""CPU seconds that Ray itself takes for an image; an upper bound for arrays of 150 KB on 2 cores."""

_MOST_WORKERS = 64  # that are recommended
_SPARE = 1.25  # decoders beyond what the model needs, so that it never waits


@dataclass(frozen=True, kw_only=True)
class Costs:
    """What one image costs on one machine, in seconds unless it says otherwise."""

    device: str
    """`cpu` or `cuda`: where the model ran."""

    num_images: int
    """Images in the sample."""

    captioned_share: float
    """Share of them that could be decoded."""

    read_s: float
    """Time until one read task has its row: of a tar or a Parquet file with its bytes, else with its URI."""

    read_cpu_s: float
    """CPU time of that."""

    fetch_s: float
    """Time until the bytes are there, with as many fetches at once as one worker makes."""

    fetch_cpu_s: float
    """CPU time of that."""

    decode_s: float
    encode_s: float
    generate_s: float
    """Time with all slots busy."""

    tokens_per_image: float
    slots: int
    model_threads: int
    """CPU threads that the model ran on."""

    start_s: float
    """What a job takes beside its images: Ray and its pools start, the model loads, the last part is written."""

    fingerprint: str
    """Of the model."""

    settings: str
    """Digest of what else these depend on: see `settings_digest`."""

    @property
    def model_s(self) -> float:
        """Time of one image, decoded or not, on one model worker."""
        return self.captioned_share * (self.encode_s + self.generate_s)

    @property
    def decoder_s(self) -> float:
        """Time of one image on one decode worker, which fetches while it decodes."""
        return max(self.fetch_s, self.decode_s)


@dataclass(frozen=True)
class Prices:
    """Hourly rates, in any currency; None where nobody gave one."""

    gpu: float | None = None
    cpu: float | None = None


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What a job will do."""

    images_per_s: float
    """Once it runs."""

    tokens_per_s: float
    bottleneck: str
    """`model`, `decode`, `fetch`, `read`, or `cpus` where all of them share too few."""

    seconds: float | None
    """From start to end, with the start of Ray; None while nobody knows how many images there are."""

    price_per_million: float | None


_NO_PRICES = Prices()


def predict(
    costs: Costs,
    allocation: Allocation,
    num_images: int | None,
    *,
    shared_cpus: float | None,
    prices: Prices = _NO_PRICES,
) -> Prediction:
    """Return what a job with this allocation will do, at the largest that so many images make of it.

    shared_cpus: the CPUs that decoders and Ray (and the model, without a GPU) share; None if there are always enough.
    """
    fewest, most = allocation.workers
    workers = max(fewest, useful_workers(num_images, most))
    rates = {
        "model": _rate(workers, costs.model_s),
        "fetch" if costs.fetch_s > costs.decode_s else "decode": _rate(allocation.decoders[1], costs.decoder_s),
        "read": _rate(allocation.num_readers, costs.read_s),
        "cpus": math.inf if shared_cpus is None else shared_cpus / _cpu_s(costs, allocation),
    }
    bottleneck = min(rates, key=lambda name: rates[name])
    rate = rates[bottleneck]
    return Prediction(
        images_per_s=rate,
        tokens_per_s=rate * costs.captioned_share * costs.tokens_per_image,
        bottleneck=bottleneck,
        seconds=None if num_images is None else costs.start_s + num_images / rate,
        price_per_million=_price(allocation, workers, shared_cpus, rate, prices),
    )


def _rate(num_workers: int, seconds: float) -> float:
    return num_workers / seconds if seconds else math.inf


def recommended_flags(costs: Costs, here: Allocation, num_images: int | None) -> Mapping[str, str]:
    """Return the flags of a job like the sample: for GPUs those of a cluster, for CPUs what this machine can hold."""
    if costs.device == "cpu":
        return {"workers": _range(here.workers), "cpu_workers": _range(here.decoders), "slots": str(costs.slots)}
    workers = useful_workers(num_images, _MOST_WORKERS)
    decoders = recommended_decoders(costs, workers)
    return {
        "workers": _range((1, workers)),
        "cpu_workers": _range((1, decoders)),
        "gpus_per_worker": f"{here.worker_gpus:g}",
        "slots": str(costs.slots),
    }


def _range(pool: tuple[int, int]) -> str:
    fewest, most = pool
    return str(most) if fewest == most else f"{fewest}:{most}"


def recommended_decoders(costs: Costs, num_workers: int) -> int:
    """Return how many decode workers keep the model workers busy."""
    return max(1, math.ceil(_SPARE * num_workers * costs.decoder_s / costs.model_s)) if costs.model_s else 1


def cpus_per_worker(costs: Costs) -> float:
    """Return the CPU cores that must read, fetch, decode and carry images for one model worker."""
    return _beside_model_s(costs) / costs.model_s if costs.model_s else 0.0


def keep(costs: Costs, store: Store, output: str) -> None:
    """Write the costs beside the table that a job is going to make, so that its summary can compare."""
    store.write_atomic(_file(output), (json.dumps(asdict(costs), indent=2) + "\n").encode())


def kept(store: Store, output: str) -> Costs | None:
    """Return the costs that `keep` wrote, or None where nobody did or they cannot be read.

    What a finished job would have compared itself with is no reason to fail."""
    try:
        if store.info(_file(output)) is None:
            return None
        costs = Costs(**json.loads(store.read_bytes(_file(output))))
        if all(_is_well(field.type, getattr(costs, field.name)) for field in fields(costs)):
            return costs
        reason = "a value of another type"
    except (ValueError, TypeError, StoreError) as error:
        reason = f"{type(error).__name__}: {error}"
    log.info("plan_json=ignored reason=%s", reason)
    return None


def settings_digest(job: CaptionJobConfig) -> str:
    """Return a digest of what decides, beside the model and the machine, what an image costs."""
    settings = [asdict(job.decoding), asdict(job.scoring), asdict(job.image), job.model.dtype, job.resources.slots]
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def _is_well(kind: Any, value: object) -> bool:
    if kind is str:
        return isinstance(value, str)
    return isinstance(value, int | float) and not isinstance(value, bool) and value >= 0 and math.isfinite(value)


def _file(output: str) -> str:
    return join(output, "_run", "plan.json")


def _cpu_s(costs: Costs, allocation: Allocation) -> float:
    on_cpu = 0.0 if allocation.worker_gpus else costs.model_s * costs.model_threads
    return _beside_model_s(costs) + on_cpu


def _beside_model_s(costs: Costs) -> float:
    """Return the CPU seconds of one image that no model takes."""
    return costs.read_cpu_s + costs.fetch_cpu_s + costs.decode_s + _RAY_CPU_S


def _price(
    allocation: Allocation, workers: int, shared_cpus: float | None, rate: float, prices: Prices
) -> float | None:
    if prices.gpu is None and prices.cpu is None:
        return None
    gpus = workers * allocation.worker_gpus
    pools = allocation.decoders[1] * allocation.decoder_cpus + workers * allocation.worker_cpus
    cpus = pools if shared_cpus is None else shared_cpus
    hourly = gpus * (prices.gpu or 0.0) + cpus * (prices.cpu or 0.0)
    return hourly * 1_000_000 / rate / 3600
