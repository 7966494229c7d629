"""The workers of a fit, one process a GPU, as Ray Train starts them, loses them and starts them again.

What each of them computes is in `training.fit`; what they tell the driver in `fit_reports`.
"""

import logging
import math
import os
import socket
import time
from dataclasses import dataclass
from typing import Any

import ray
import ray.train
from ray.train.torch import TorchConfig, TorchTrainer, get_device

from captioner.captioning.resources import CORES_PER_DECODER, DECODER_CPUS, DECODERS_PER_WORKER, Cluster
from captioner.cluster.ray_private import light_trainer
from captioner.cluster.supervision import report_to
from captioner.cluster.worker_errors import WorkerError, reporting_errors
from captioner.config import FitResourceConfig, worker_range
from captioner.errors import CaptionerError, ResourceError
from captioner.training.fit.fit_worker import FitTask, run_fit_worker
from captioner.training.fit.row import Row

__all__ = ["TRAIN", "TrainingGroup", "training_group"]

log = logging.getLogger("captioner")

TRAIN: Any = ray.train
"""Ray Train: version 1 for a type checker, version 2 at run time."""

_POLL_S = 0.5
_AGREE_S = 5.0  # within which all workers meet an error that all of them meet


@dataclass(frozen=True)
class TrainingGroup:
    """How many workers there are, and what each of them reserves."""

    fewest: int
    most: int
    cpus: float
    gpus: float
    decoders: int = 0
    """Decode workers of each, where its steps read pixels."""

    decoder_cpus: float = 0.0
    """CPUs of each of these."""

    @property
    def reserved_cpus(self) -> float:
        """CPUs that each worker reserves on its node: without GPUs those of its decode workers, too, which are beside
        it. Else Ray would put as many workers on the nodes that are left as fit there without any."""
        return self.cpus if self.gpus else round(self.cpus + self.decoders * self.decoder_cpus, 4)

    @property
    def num_threads(self) -> int:
        """Threads of torch in each worker."""
        return max(1, int(self.cpus))

    def scaling(self) -> Any:
        """Return Ray Train's own form of this."""
        return TRAIN.ScalingConfig(
            num_workers=self.fewest if self.fewest == self.most else (self.fewest, self.most),
            use_gpu=self.gpus > 0,
            resources_per_worker={"CPU": self.reserved_cpus, **({"GPU": self.gpus} if self.gpus else {})},
        )

    def trainer(self, task: FitTask, reports: Any, max_failures: int, scratch: str) -> TorchTrainer:
        """Return what runs the task to its end. scratch: a folder for Ray's own notes, which are not needed later."""
        shares_card = 0 < self.gpus < 1  # NCCL cannot have two workers on one card
        shared = ray.put(task)  # Ray's controller opens what it is given, and needs no torch
        trainer: TorchTrainer = light_trainer(TorchTrainer)(
            fit_worker,
            train_loop_config={"task": shared, "reports": reports},
            torch_config=TorchConfig(backend="gloo") if shares_card else None,
            scaling_config=self.scaling(),
            run_config=TRAIN.RunConfig(
                name="fit",
                storage_path=scratch,
                failure_config=TRAIN.FailureConfig(max_failures=max_failures),
                logging_config=TRAIN.LoggingConfig(log_level="WARNING"),
            ),
        )
        return trainer


def training_group(config: FitResourceConfig, cluster: Cluster, *, streams_pixels: bool = False) -> TrainingGroup:
    """Return the workers of a fit on a cluster. streams_pixels: each has decode workers beside it.

    Raises ResourceError for more than there is."""
    gpus = config.gpus_per_worker
    gpus = (1.0 if cluster.gpus else 0.0) if gpus is None else gpus
    every = max(1, int(cluster.gpus / gpus)) if gpus else 1
    fewest, most = worker_range(config.workers, "--workers") or (every, every)
    share = cluster.cpus / most
    if not gpus:  # no worker spans two nodes
        share = min(share, max(cluster.node_cpus, default=share))
    cpus = min(1.0, share) if gpus else max(1.0, share // 1)
    decoders, decoder_cpus = 0, 0.0
    if streams_pixels:
        cpus, decoders, decoder_cpus = _beside_decoders(config, share, most, has_gpu=gpus > 0)
    short = [f"{fewest * gpus:g} GPUs; there are {cluster.gpus:g}"] if fewest * gpus > cluster.gpus else []
    wanted = fewest * (cpus + decoders * decoder_cpus)
    short += [f"{wanted:g} CPUs; there are {cluster.cpus:g}"] if wanted > cluster.cpus + 1e-6 else []
    if short and not cluster.can_grow:
        raise ResourceError(f"--workers {config.workers} needs {short[0]}. Lower --workers or --gpus-per-worker")
    log.info("fit workers=%d:%d worker_gpus=%g worker_cpus=%g decoders=%d", fewest, most, gpus, cpus, decoders)
    return TrainingGroup(fewest, most, cpus, gpus, decoders, decoder_cpus)


def _beside_decoders(config: FitResourceConfig, share: float, most: int, *, has_gpu: bool) -> tuple[float, int, float]:
    """Return the CPUs of a worker, its decode workers and the CPUs of each, which take half of its share at most on
    CPUs, and all but one CPU beside a GPU. share: CPUs of the cluster for each worker."""
    asked = worker_range(config.cpu_workers, "--cpu-workers")
    own = min(1.0, share / 2) if has_gpu else share / 2
    room = int((share - own) / DECODER_CPUS + 1e-9) if has_gpu else int(share / CORES_PER_DECODER)
    decoders = max(1, asked[1] // most if asked else min(room, DECODERS_PER_WORKER))
    decoder_cpus = min(DECODER_CPUS, math.floor((share - own) / decoders * 100) / 100)
    cpus = share - decoders * decoder_cpus
    cpus = min(1.0, cpus) if has_gpu else float(math.floor(cpus)) if cpus >= 1 else math.floor(cpus * 100) / 100
    return cpus, decoders, decoder_cpus


def fit_worker(config: dict[str, Any]) -> None:
    """Take one worker's part in the fit.

    An error of ours that every worker meets would come again, so it ends the fit; after any other Ray Train restarts
    the group.
    """
    reports = config["reports"]

    def on_row(row: Row) -> None:
        reports.add_row.remote(row)

    def on_start(line: str) -> None:
        reports.add_start.remote(worker, line)

    worker = f"rank {TRAIN.get_context().get_world_rank()}"
    reports.add_start.remote(worker, _description())
    with reporting_errors(report_to(reports, worker)):
        try:
            run_fit_worker(ray.get(config["task"]), str(get_device()), on_row, on_start)
        except CaptionerError as error:
            if not _is_shared(WorkerError.of(error), reports):
                raise


def _description() -> str:
    """Return which worker this is and where: each start is a line of the log, and a lost worker is found by its pid."""
    context = TRAIN.get_context()
    rank, size = context.get_world_rank(), context.get_world_size()
    return f"fit worker={rank} of={size} pid={os.getpid()} node={socket.gethostname()}"


def _is_shared(error: WorkerError, reports: Any) -> bool:
    """Return whether all workers have met the same error; those that have not wait for this one in an exchange."""
    context = TRAIN.get_context()
    ray.get(reports.note_shared_error.remote(error, context.get_world_rank(), context.get_world_size()))
    give_up = time.monotonic() + _AGREE_S
    while not ray.get(reports.shared_error.remote()) and time.monotonic() < give_up:
        time.sleep(_POLL_S)
    return bool(ray.get(reports.shared_error.remote()))
