"""How many workers a cluster can hold, and what each reserves. Arithmetic only; knows no Ray.

Measured on Ray 2.60: a fraction of a core reserved too much costs a whole decode worker, and pools that reserve all
CPUs leave none for the read tasks, so that the job hangs without an error. So the sum is done here, beforehand.

Ray Data shares unreserved CPUs in whole numbers only, and write tasks come last. Without a whole CPU to spare, read
tasks count against them, and no part is written before everything is read.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from captioner.config import ResourceConfig, worker_range
from captioner.errors import ResourceError

__all__ = [
    "CORES_PER_DECODER",
    "DECODERS_PER_WORKER",
    "DECODER_CPUS",
    "GPU_CALLS",
    "Allocation",
    "Cluster",
    "allocate",
    "describe_shortage",
    "readers_for",
    "useful_workers",
]

_TASK_CPUS = 0.05  # a read or write task: it waits for a store
_MIN_READERS = 2
_CORES_PER_READER = 8
_SMALL_CPUS = 4  # with fewer, a whole spare CPU is too much, and read tasks reserve nothing
_SPARE_CPUS = 1
_SMALLEST_NODE_CPUS = 2  # assumed of the first node of a cluster that has none yet
DECODER_CPUS = 0.9
"""CPUs of a decoder, so that one fits on each core beside the tasks."""
CORES_PER_DECODER = 4
"""Without a GPU, one core in so many decodes and the others run the model."""
DECODERS_PER_WORKER = 16
"""Cores that one GPU may need at most, for photographs of 12 megapixels."""
_ROWS_PER_DECODER = 256  # one call
_CPU_CALLS = 4
GPU_CALLS = 8
"""Calls of 256 images that a GPU worker serves at once. They share one engine, and each waits for its longest caption:
of 256 slots that wrote 8,192 captions of 14 tokens on average 4 calls kept 0.7 full, 8 0.89 (`tests.bench.host`)."""
_ROWS_PER_WORKER = 1024  # four calls of 256: with fewer images each, another worker is not worth its start


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """CPUs and GPUs of the machine or cluster."""

    cpus: float
    """CPUs now, of the nodes that may decode."""

    gpus: float
    """GPUs now."""

    can_grow: bool = False
    """Whether an autoscaler adds nodes. Of what kind is unknown: Ray lists no node type that has no node."""

    node_cpus: tuple[float, ...] = ()
    """CPUs of each node, since no worker spans two; empty if there is one node."""

    node_gpus: tuple[float, ...] = ()
    """GPUs of each node that has some; empty if there is one."""

    @property
    def largest_gpus(self) -> float:
        """GPUs of the node with the most."""
        return max(self.node_gpus, default=self.gpus)

    def max_gpu_workers(self, gpus_per_worker: float) -> int:
        """Return how many workers fit, each with its GPUs on one node."""
        return sum(int(gpus / gpus_per_worker + 1e-9) for gpus in self.node_gpus or (self.gpus,))


@dataclass(frozen=True, kw_only=True)
class Allocation:
    """What the job reserves. Pools are (requested at once, max) workers; reservations are for each worker or task."""

    workers: tuple[int, int]
    worker_gpus: float
    worker_cpus: float
    decoders: tuple[int, int]
    decoder_cpus: float
    num_readers: int
    read_cpus: float = _TASK_CPUS
    write_cpus: float = _TASK_CPUS

    @property
    def caption_calls(self) -> int:
        """Calls that a model worker serves at once, each with a block of images."""
        return GPU_CALLS if self.worker_gpus else _CPU_CALLS

    @property
    def num_writers(self) -> int:
        """Write tasks at a time: they reserve so little that Ray would start dozens behind a fast model."""
        return self.num_readers

    @property
    def torch_threads(self) -> int:
        """Threads of one model worker on the CPU."""
        return max(1, round(self.worker_cpus))


def allocate(config: ResourceConfig, cluster: Cluster, num_images: int | None = None) -> Allocation:
    """Return an allocation whose smallest form fits the cluster, or may once it has grown.

    num_images: images to caption, None if unknown. The end of a range is lowered to what a cluster that cannot grow can
    hold. Raises ResourceError, with the sum, where not even its beginning fits.
    """
    gpus_per_worker = config.gpus_per_worker
    if gpus_per_worker is None:
        _check_devices_are_known(cluster)
        gpus_per_worker = 1.0 if cluster.gpus else 0.0
    allocation = _with_gpus(config, cluster, gpus_per_worker) if gpus_per_worker else _with_cpus(config, cluster)
    if cluster.can_grow:
        cores = max(cluster.cpus, allocation.decoders[1])  # each decoder takes about one
        allocation = replace(allocation, num_readers=readers_for(cores))
    else:
        if config.cpu_workers == "auto":
            allocation = _with_all_decoders(allocation, num_images)
        _check_fits(allocation, cluster)
    return _asked_at_once(allocation, num_images) if gpus_per_worker else allocation


def describe_shortage(
    allocation: Allocation, total: Mapping[str, float], free: Mapping[str, float], *, has_begun: bool
) -> str:
    """Return what a job waits for as long as no model worker can run; empty if nothing.

    total, free: what the cluster has, by Ray's names. has_begun: whether a model worker has run already.
    """
    wanted = allocation.worker_gpus
    gpus, unused = total.get("GPU", 0.0), free.get("GPU", 0.0)
    if gpus < wanted:
        return f"waiting for GPUs: the cluster has {gpus:g}, a worker needs {wanted:g}"
    if total.get("CPU", 0.0) < allocation.decoder_cpus:
        return (
            f"waiting for CPUs: the cluster has {total.get('CPU', 0.0):g}, a decoder needs {allocation.decoder_cpus:g}"
        )
    if unused < wanted and not has_begun:
        return f"waiting for GPUs: {unused:g} of the cluster's {gpus:g} are free, a worker needs {wanted:g}"
    return ""


def useful_workers(num_images: int | None, most: int) -> int:
    """Return how many of `most` model workers so many images keep busy."""
    return most if num_images is None else max(1, min(most, math.ceil(num_images / _ROWS_PER_WORKER)))


def readers_for(cores: float) -> int:
    """Return how many read tasks feed so many decoding cores; as many write tasks serve them."""
    return max(_MIN_READERS, int(cores) // _CORES_PER_READER)


def _check_devices_are_known(cluster: Cluster) -> None:
    if cluster.can_grow and not cluster.gpus:
        raise ResourceError(
            "the cluster has no GPU now, and an autoscaler that may add some. Say --gpus-per-worker 1 to wait for"
            " GPUs (a fraction shares a card), or --gpus-per-worker 0 to caption on CPUs"
        )


def _asked_at_once(allocation: Allocation, num_images: int | None) -> Allocation:
    """Return an allocation that asks for every worker that the work can keep busy.

    Ray grows a pool by the work of its running workers, and would request a second node only once the first is up.
    Workers that wait for a node cost nothing.
    """
    fewest, most = allocation.workers
    return replace(allocation, workers=(max(fewest, useful_workers(num_images, most)), most))


def _with_gpus(config: ResourceConfig, cluster: Cluster, gpus_per_worker: float) -> Allocation:
    places = max(1, cluster.max_gpu_workers(gpus_per_worker))
    room = max(1, int((cluster.cpus - _task_cpus(cluster)) / DECODER_CPUS + 1e-9))
    workers = _limited(worker_range(config.workers, "--workers") or (1, places), places, cluster)
    if cluster.can_grow:
        room = max(room, DECODERS_PER_WORKER * workers[1])
    decoders = _limited(worker_range(config.cpu_workers, "--cpu-workers") or (1, room), room, cluster)
    return Allocation(
        workers=workers,
        worker_gpus=gpus_per_worker,
        worker_cpus=0.0,
        decoders=decoders,
        decoder_cpus=_decoder_cpus(cluster, decoders[1], 0.0),
        num_readers=readers_for(cluster.cpus),
        read_cpus=_read_cpus(cluster),
    )


def _with_cpus(config: ResourceConfig, cluster: Cluster) -> Allocation:
    """Share the CPUs: decoders take theirs first, model workers share the rest, in fractions if need be."""
    workers, decoders = _pools_on_cpus(config, cluster)
    cpus = max(cluster.cpus, _SMALLEST_NODE_CPUS) if cluster.can_grow else cluster.cpus
    num_workers, num_decoders = workers[1], decoders[1]
    if cluster.can_grow:  # today's CPUs are shared by the workers that start on them
        num_workers, num_decoders = workers[0], max(decoders[0], min(decoders[1], _decoders_among(cpus)))
    room = cpus - _task_cpus(cluster)
    decoder_cpus = min(DECODER_CPUS, _floor(room / 2 / num_decoders))
    worker_cpus = _on_one_node(_floor((room - num_decoders * decoder_cpus) / num_workers), cluster)
    if worker_cpus >= 1:
        decoder_cpus = min(decoder_cpus, _decoder_cpus(cluster, num_decoders, worker_cpus * num_workers))
    return Allocation(
        workers=workers,
        worker_gpus=0.0,
        worker_cpus=worker_cpus,
        decoders=decoders,
        decoder_cpus=decoder_cpus,
        num_readers=readers_for(cluster.cpus),
        read_cpus=_read_cpus(cluster),
    )


def _pools_on_cpus(config: ResourceConfig, cluster: Cluster) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return the ranges of model workers and decoders that share CPUs: at most half of them decode."""
    workers = worker_range(config.workers, "--workers") or (1, 1)
    share = max(_decoders_among(cluster.cpus), workers[1] if cluster.can_grow else 1)
    room = cluster.cpus - _task_cpus(cluster)
    decoders = worker_range(config.cpu_workers, "--cpu-workers") or (1, share)
    decoders = _limited(decoders, max(share, int(room / 2 / DECODER_CPUS)), cluster)
    return _limited(workers, int(room - decoders[1] * DECODER_CPUS), cluster), decoders


def _decoders_among(cpus: float) -> int:
    return max(1, int(cpus / CORES_PER_DECODER))


def _limited(wanted: tuple[int, int], room: int, cluster: Cluster) -> tuple[int, int]:
    """Return a range whose end fits a cluster that cannot grow; its beginning is what the user asked for."""
    fewest, most = wanted
    return wanted if cluster.can_grow else (fewest, max(fewest, min(most, room)))


def _on_one_node(worker_cpus: float, cluster: Cluster) -> float:
    """Return what a model worker reserves: whole CPUs above one, as Ray requires, and no more than one node has."""
    if worker_cpus < 1:
        return worker_cpus
    most = worker_cpus if len(cluster.node_cpus) < 2 else max(cluster.node_cpus) - _task_cpus(cluster)
    return float(max(1, math.floor(min(worker_cpus, most))))


def _with_all_decoders(allocation: Allocation, num_images: int | None) -> Allocation:
    """Return an allocation whose decoders start at once and stay.

    Ray ends idle ones and starts them again, which takes seconds of CPU time each; their CPUs would stay free anyway.
    """
    useful = DECODERS_PER_WORKER * allocation.workers[1]
    if num_images is not None:
        useful = min(useful, math.ceil(num_images / _ROWS_PER_DECODER))
    number = max(1, min(allocation.decoders[1], useful))
    return replace(allocation, decoders=(number, number))


def _decoder_cpus(cluster: Cluster, num_decoders: int, worker_cpus: float) -> float:
    """Return what each decoder reserves; less than usual where no whole CPU would be left otherwise."""
    left = cluster.cpus - _task_cpus(cluster) - worker_cpus
    is_too_much = num_decoders * DECODER_CPUS > left + 1e-9
    if cluster.can_grow or cluster.cpus < _SMALL_CPUS or is_too_much:
        return DECODER_CPUS
    return min(DECODER_CPUS, _floor((left - _SPARE_CPUS) / num_decoders))


def _read_cpus(cluster: Cluster) -> float:
    return 0.0 if not cluster.can_grow and cluster.cpus < _SMALL_CPUS else _TASK_CPUS


def _task_cpus(cluster: Cluster) -> float:
    """Return the CPUs that all read and write tasks reserve together."""
    return readers_for(cluster.cpus) * (_read_cpus(cluster) + _TASK_CPUS)


def _floor(cpus: float) -> float:
    """Round down to hundredths, so that a sum of shares never exceeds the whole."""
    return math.floor(cpus * 100 + 1e-9) / 100


def _check_fits(allocation: Allocation, cluster: Cluster) -> None:
    if allocation.worker_gpus and allocation.workers[0] > cluster.max_gpu_workers(allocation.worker_gpus):
        in_one = f", at most {cluster.largest_gpus:g} in one node" if len(cluster.node_gpus) > 1 else ""
        raise ResourceError(
            f"--workers {allocation.workers[0]} with {allocation.worker_gpus:g} GPUs each need"
            f" {allocation.workers[0] * allocation.worker_gpus:g} GPUs; there are {cluster.gpus:g}{in_one}. Lower"
            " --workers or --gpus-per-worker (0 to run on CPUs)"
        )
    pools = allocation.workers[0] * allocation.worker_cpus + allocation.decoders[0] * allocation.decoder_cpus
    cpus = pools + _task_cpus(cluster)
    if min(allocation.decoder_cpus, cluster.cpus) < _TASK_CPUS or cpus > cluster.cpus + 1e-6:
        raise ResourceError(
            f"{allocation.workers[0]} model workers and {allocation.decoders[0]} decode workers need"
            f" {cpus:.2f} CPUs; there are {cluster.cpus:g}. Lower --workers or --cpu-workers"
        )
