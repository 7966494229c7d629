"""What a caption job will take: images and tokens a second, the bottleneck, hours and price. Arithmetic only.

An image is read, fetched, decoded, encoded and captioned by pools that work at the same time, so the slowest pool
decides. Where all of them share CPUs there is one more limit: the CPU seconds that an image takes in total.

    Costs of one image, Allocation of a job -> predict -> Prediction

Knows no model and no Ray.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from captioner.captioning.costs import Costs
from captioner.captioning.resources import Allocation, useful_workers

__all__ = ["Prediction", "Prices", "cpus_per_worker", "predict", "recommended_decoders", "recommended_flags"]

_RAY_CPU_S = 0.0012
"""CPU seconds that Ray itself takes for an image; an upper bound for arrays of 150 KB on 2 cores."""

_MOST_WORKERS = 64  # that are recommended
_SPARE = 1.25  # decoders beyond what the model needs, so that it never waits


@dataclass(frozen=True)
class Prices:
    """Hourly rates, in any currency; None if not given."""

    gpu: float | None = None
    cpu: float | None = None


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """Speed, time and price of a job."""

    images_per_s: float
    """Once it runs."""

    tokens_per_s: float
    bottleneck: str
    """`model`, `decode`, `fetch`, `read`, or `cpus` where all of them share too few."""

    seconds: float | None
    """From start to end, with the start of Ray; None while images are not counted."""

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
    """Return the prediction for a job with this allocation, its pools as large as so many images keep busy.

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
    """Return the flags for a job like the sample: with GPUs those for a cluster, without those for this machine."""
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
    """Return the CPU cores that read, fetch, decode and move images for one model worker."""
    return _beside_model_s(costs) / costs.model_s if costs.model_s else 0.0


def _cpu_s(costs: Costs, allocation: Allocation) -> float:
    on_cpu = 0.0 if allocation.worker_gpus else costs.model_s * costs.model_threads
    return _beside_model_s(costs) + on_cpu


def _beside_model_s(costs: Costs) -> float:
    """Return the CPU seconds of one image outside the model."""
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
