"""How many workers a cluster can hold, and what each reserves. Arithmetic only; knows no Ray.

The traps, measured on Ray 2.60: a fraction of a core reserved too much costs a whole decode worker; pools that reserve
everything leave nothing for the read tasks and the job hangs without an error. So the sum is done here, beforehand.

And: what a job does not ask for is left to it in whole CPUs only, and the write tasks come last. Without a whole one
left over, read tasks would count against them, and no part be written before everything is read.
"""

import math
from dataclasses import dataclass, replace

from captioner.config import ResourceConfig, worker_range
from captioner.errors import ResourceError

__all__ = ["Allocation", "Cluster", "allocate"]

_TASK_CPUS = 0.05  # a read or write task: it waits for a store
_MIN_READERS = 2
_CORES_PER_READER = 8
_SMALL_CPUS = 4  # below, a whole CPU is too much to leave over, and read tasks reserve nothing
_SPARE_CPUS = 1
_SMALLEST_NODE_CPUS = 2  # what a cluster without a node is taken to grow by
_DECODER_CPUS = 0.9  # so that one fits on each core beside the tasks
_CORES_PER_DECODER = 4  # without a GPU, one core in four decodes and the others run the model
_DECODERS_PER_WORKER = 16  # cores that one GPU may need at most, for photographs of 12 megapixels
_ROWS_PER_DECODER = 256  # one call
_ROWS_PER_WORKER = 1024  # four calls of 256: with fewer images each, another worker would have nothing in its hands


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """What there is."""

    cpus: float
    """CPUs now, of the nodes that may decode."""

    gpus: float
    """GPUs now."""

    can_grow: bool = False
    """Whether an autoscaler adds nodes. Nobody can say which: Ray does not tell a job the node types it has none of."""


@dataclass(frozen=True, kw_only=True)
class Allocation:
    """What the job takes. Pools are (asked for at once, max) workers; reservations are for each worker or task."""

    workers: tuple[int, int]
    worker_gpus: float
    worker_cpus: float
    decoders: tuple[int, int]
    decoder_cpus: float
    num_readers: int
    read_cpus: float = _TASK_CPUS
    write_cpus: float = _TASK_CPUS

    @property
    def num_writers(self) -> int:
        """Write tasks at a time: they reserve so little that a quick model would start dozens."""
        return self.num_readers

    @property
    def torch_threads(self) -> int:
        """Threads of one model worker on the CPU."""
        return max(1, round(self.worker_cpus))


def allocate(config: ResourceConfig, cluster: Cluster, num_images: int | None = None) -> Allocation:
    """Return an allocation whose smallest form fits the cluster, or may once it has grown.

    num_images: what is to be captioned, None if nobody knows. Raises ResourceError with the sum where nothing fits.
    """
    gpus_per_worker = config.gpus_per_worker
    if gpus_per_worker is None:
        _check_devices_are_known(cluster)
        gpus_per_worker = 1.0 if cluster.gpus else 0.0
    allocation = _with_gpus(config, cluster, gpus_per_worker) if gpus_per_worker else _with_cpus(config, cluster)
    if not cluster.can_grow:
        if config.cpu_workers == "auto":
            allocation = _with_all_decoders(allocation, num_images)
        _check_fits(allocation, cluster)
    return _asked_at_once(allocation, cluster, num_images) if gpus_per_worker else allocation


def _check_devices_are_known(cluster: Cluster) -> None:
    if cluster.can_grow and not cluster.gpus:
        raise ResourceError(
            "the cluster has no GPU now, and an autoscaler that may add some. Say --gpus-per-worker 1 to wait for"
            " GPUs (a fraction shares a card), or --gpus-per-worker 0 to caption on CPUs"
        )


def _asked_at_once(allocation: Allocation, cluster: Cluster, num_images: int | None) -> Allocation:
    """Return an allocation that asks for every worker that the work can keep busy.

    A pool that grows by what its workers have in hand would ask for the second node when the first is up. Workers that
    wait for a node cost nothing.
    """
    fewest, most = allocation.workers
    useful = most if num_images is None else math.ceil(num_images / _ROWS_PER_WORKER)
    if not cluster.can_grow:
        useful = min(useful, int(cluster.gpus / allocation.worker_gpus + 1e-9))
    return replace(allocation, workers=(max(fewest, min(most, useful)), most))


def _with_gpus(config: ResourceConfig, cluster: Cluster, gpus_per_worker: float) -> Allocation:
    most = max(1, int(cluster.gpus / gpus_per_worker))
    workers = worker_range(config.workers, "--workers") or (1, most)
    room = max(1, int((cluster.cpus - _task_cpus(cluster)) / _DECODER_CPUS + 1e-9))
    if cluster.can_grow:
        room = max(room, _DECODERS_PER_WORKER * workers[1])
    decoders = worker_range(config.cpu_workers, "--cpu-workers") or (1, room)
    return Allocation(
        workers=workers,
        worker_gpus=gpus_per_worker,
        worker_cpus=0.0,
        decoders=decoders,
        decoder_cpus=_decoder_cpus(cluster, decoders[1], 0.0),
        num_readers=_num_readers(cluster),
        read_cpus=_read_cpus(cluster),
    )


def _with_cpus(config: ResourceConfig, cluster: Cluster) -> Allocation:
    """Share the CPUs: the decoders take theirs first, the model workers what is left, in fractions if need be."""
    workers = worker_range(config.workers, "--workers") or (1, 1)
    decoders = worker_range(config.cpu_workers, "--cpu-workers") or (1, max(1, int(cluster.cpus / _CORES_PER_DECODER)))
    cpus = max(cluster.cpus, _SMALLEST_NODE_CPUS) if cluster.can_grow else cluster.cpus
    room = cpus - _task_cpus(cluster)
    decoder_cpus = min(_DECODER_CPUS, _floor(room / 2 / decoders[1]))
    worker_cpus = _floor((room - decoders[1] * decoder_cpus) / workers[1])
    whole = float(math.floor(worker_cpus)) if worker_cpus >= 1 else worker_cpus  # Ray takes whole CPUs above one
    if worker_cpus >= 1:
        decoder_cpus = min(decoder_cpus, _decoder_cpus(cluster, decoders[1], whole * workers[1]))
    return Allocation(
        workers=workers,
        worker_gpus=0.0,
        worker_cpus=whole,
        decoders=decoders,
        decoder_cpus=decoder_cpus,
        num_readers=_num_readers(cluster),
        read_cpus=_read_cpus(cluster),
    )


def _with_all_decoders(allocation: Allocation, num_images: int | None) -> Allocation:
    """Return an allocation whose decoders start at once and stay.

    Ray ends those that seem idle and starts them again, for seconds of CPU time each; what they reserve is free anyway.
    """
    useful = _DECODERS_PER_WORKER * allocation.workers[1]
    if num_images is not None:
        useful = min(useful, math.ceil(num_images / _ROWS_PER_DECODER))
    number = max(1, min(allocation.decoders[1], useful))
    return replace(allocation, decoders=(number, number))


def _decoder_cpus(cluster: Cluster, num_decoders: int, worker_cpus: float) -> float:
    """Return what each decoder reserves, less where a whole CPU would not be left over otherwise."""
    left = cluster.cpus - _task_cpus(cluster) - worker_cpus
    is_too_much = num_decoders * _DECODER_CPUS > left + 1e-9
    if cluster.can_grow or cluster.cpus < _SMALL_CPUS or is_too_much:
        return _DECODER_CPUS
    return min(_DECODER_CPUS, _floor((left - _SPARE_CPUS) / num_decoders))


def _num_readers(cluster: Cluster) -> int:
    return max(_MIN_READERS, int(cluster.cpus) // _CORES_PER_READER)


def _read_cpus(cluster: Cluster) -> float:
    return 0.0 if not cluster.can_grow and cluster.cpus < _SMALL_CPUS else _TASK_CPUS


def _task_cpus(cluster: Cluster) -> float:
    """Return the CPUs that all read and write tasks reserve together."""
    return _num_readers(cluster) * (_read_cpus(cluster) + _TASK_CPUS)


def _floor(cpus: float) -> float:
    """Round down to hundredths, so that a sum of shares never exceeds the whole."""
    return math.floor(cpus * 100 + 1e-9) / 100


def _check_fits(allocation: Allocation, cluster: Cluster) -> None:
    gpus = allocation.workers[0] * allocation.worker_gpus
    if gpus > cluster.gpus:
        raise ResourceError(
            f"--workers {allocation.workers[0]} with {allocation.worker_gpus:g} GPUs each need {gpus:g} GPUs; there are"
            f" {cluster.gpus:g}. Lower --workers or --gpus-per-worker (0 to run on CPUs)"
        )
    pools = allocation.workers[0] * allocation.worker_cpus + allocation.decoders[0] * allocation.decoder_cpus
    cpus = pools + _task_cpus(cluster)
    if min(allocation.decoder_cpus, cluster.cpus) < _TASK_CPUS or cpus > cluster.cpus + 1e-6:
        raise ResourceError(
            f"{allocation.workers[0]} model workers and {allocation.decoders[0]} decode workers need"
            f" {cpus:.2f} CPUs; there are {cluster.cpus:g}. Lower --workers or --cpu-workers"
        )
