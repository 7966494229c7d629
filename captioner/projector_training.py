"""The fit on Ray: features once by Ray Data, then steps by Ray Train's TorchTrainer, then the bundle.

    labels -> compute_features -> FitWorker group (one process a GPU) -> bundle

Knows how workers are started, lost and started again, and who writes what; what they compute is in `fitting`, what
there is to do in `fit_plan`. A fit goes on from its own checkpoint, one object that is replaced whole, rather than from
Ray's: that one counts only once the controller has seen it, and lies where fsspec's options do not reach.
"""

import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from tempfile import TemporaryDirectory
from typing import Any

import ray
import ray.train
from ray.train.torch import TorchConfig, TorchTrainer, get_device
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from captioner.caption_pipeline import job_errors, joined_cluster
from captioner.caption_tokens import tokenize_examples
from captioner.config import FitConfig, FitResourceConfig, worker_range
from captioner.errors import CaptionerError, ResourceError
from captioner.examples import FeatureSet
from captioner.feature_pipeline import compute_features
from captioner.fit_plan import FitPlan, llama_of, open_output, plan_fit, save_start
from captioner.fit_report import farewell, planned, save_result, summarize
from captioner.fit_worker import FitTask, take_part
from captioner.fitting.output import FitOutput
from captioner.fitting.progress import FitProgress
from captioner.fitting.state import FitState, Row
from captioner.resources import Cluster
from captioner.sources.faults import output_errors
from captioner.tracebacks import error_in

__all__ = ["fit_projector"]

log = logging.getLogger("captioner")

_POLL_S = 0.5
_VOTE_S = 5.0  # within which all workers meet what all of them meet
_TRAIN: Any = ray.train  # for a type checker it is version 1, at run time it is version 2


def fit_projector(config: FitConfig) -> Mapping[str, Any]:
    """Fit a projector, or for a dry run print the plan; return the summary.

    Raises UsageError before anything is started for what cannot run, JobError when the job itself fails.
    """
    with output_errors(config.target.output), _run_folder(config) as (output, run_folder):
        plan = plan_fit(config, output, run_folder)
        for line in plan.lines():
            print(line, file=sys.stderr if not config.dry_run else sys.stdout)
        if config.dry_run:
            return planned(plan)
        with redirect_stdout(sys.stderr):  # Ray prints what happens to workers on stdout
            summary = summarize(plan) if output.has_bundle else _run(plan)
        for line in farewell(plan, summary):
            print(line, file=sys.stderr)
    return summary


@contextmanager
def _run_folder(config: FitConfig) -> Iterator[tuple[FitOutput, str]]:
    """Yield the output, and where to keep what is found out about the labels: a dry run leaves nothing."""
    output = open_output(config)
    if not config.dry_run:
        yield output, output.run_folder
        return
    with TemporaryDirectory() as folder:
        yield output, folder


def _run(plan: FitPlan) -> dict[str, Any]:
    """Do what is left of a fit and return its summary."""
    start = time.monotonic()
    plan.output.claim(plan.identity)
    save_start(plan.config, plan.output.start_url, plan.model_options)
    with joined_cluster() as cluster:
        workers = _workers(plan.config.resources, cluster)
        plan = plan.on(has_gpus=workers.gpus > 0)
        features = compute_features(plan.features, plan.start, plan.config.resources.of_features(), cluster)
        _train(plan, features, workers)
    data = plan.output.read("checkpoint.pt")
    assert data is not None, "the workers have ended without a checkpoint"
    save_result(plan, features, FitState.result(data))
    return {**summarize(plan), "seconds": round(time.monotonic() - start, 2)}


@dataclass(frozen=True)
class _Workers:
    """How many workers there are, and what each of them takes."""

    fewest: int
    most: int
    cpus: float
    gpus: float

    def scaling(self) -> Any:
        """Return this as Ray has it."""
        return _TRAIN.ScalingConfig(
            num_workers=self.fewest if self.fewest == self.most else (self.fewest, self.most),
            use_gpu=self.gpus > 0,
            resources_per_worker={"CPU": self.cpus, **({"GPU": self.gpus} if self.gpus else {})},
        )


def _train(plan: FitPlan, features: FeatureSet, workers: _Workers) -> None:
    """Run the workers until the last step; those that are lost are started again from the checkpoint."""
    model, num_threads = plan.config.model, max(1, int(workers.cpus))
    options, training = plan.model_options, plan.config.training
    tokens = tokenize_examples(features, llama_of(plan), plan.start.template, training, plan.output)
    task = FitTask(plan.output, features, tokens, training, model.dtype, model.device, num_threads, options)
    rows = _told_here()
    is_shared = 0 < workers.gpus < 1  # NCCL cannot have two workers on one card
    with TemporaryDirectory(prefix="captioner-fit-") as scratch:
        trainer = _Trainer(
            fit_worker,
            train_loop_config={"task": task, "rows": rows},
            torch_config=TorchConfig(backend="gloo") if is_shared else None,
            scaling_config=workers.scaling(),
            run_config=_TRAIN.RunConfig(
                name="fit",
                storage_path=scratch,  # of Ray's own notes on this run, of which nothing is needed
                failure_config=_TRAIN.FailureConfig(max_failures=plan.config.resources.max_failures),
                logging_config=_TRAIN.LoggingConfig(log_level="WARNING"),
            ),
        )
        _watch(plan, trainer, rows)


class _Trainer(TorchTrainer):
    """A TorchTrainer that leaves no actor behind to tidy up after it: on a cluster without a dashboard that one cannot
    ask whether the run is still there, and says so once a second. The job's end takes its workers with it."""

    def _create_default_callbacks(self) -> list[Any]:
        callbacks: list[Any] = super()._create_default_callbacks()  # type: ignore[misc]  # of version 2
        return [callback for callback in callbacks if type(callback).__name__ != "PlacementGroupCleanerCallback"]


def _watch(plan: FitPlan, trainer: TorchTrainer, rows: Any) -> None:
    """Show the workers' rows until the trainer has ended; raise what ended it."""
    ended: list[BaseException | None] = []

    def run() -> None:  # not in the main thread, where Ray takes Ctrl-C for itself and the job would end as done
        try:
            trainer.fit()
            ended.append(None)
        except (_TRAIN.TrainingFailedError, ray.exceptions.RayError) as error:
            ended.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    with FitProgress(plan.num_steps, plan.tensorboard_folder) as progress, job_errors():
        while thread.is_alive():
            thread.join(_POLL_S)
            for line in ray.get(rows.take_workers.remote()):
                log.info(line)
            for row in ray.get(rows.take.remote()):
                progress.show(row)
        problem = ray.get(rows.problem.remote())
    if problem:
        raise error_in(problem)
    if not ended or ended[0] is not None:
        raise error_in(str(ended[0] if ended else "the trainer has ended without a word")) from (ended or [None])[0]


def fit_worker(config: dict[str, Any]) -> None:
    """Take one worker's part in the fit.

    An error of ours that every worker meets would come again, so it ends the fit; after any other it is tried again.
    """
    rows = config["rows"]

    def on_row(row: Row) -> None:
        rows.add.remote(row)

    rows.join.remote(_who())
    try:
        take_part(config["task"], str(get_device()), on_row)
    except CaptionerError as error:
        if not _is_everyones(f"captioner.errors.{type(error).__name__}: {error}", rows):
            raise


def _who() -> str:
    """Say which worker this is and where: every start is a line of the log, and a lost worker is found by its pid."""
    context = _TRAIN.get_context()
    rank, size = context.get_world_rank(), context.get_world_size()
    return f"fit worker={rank} of={size} pid={os.getpid()} node={socket.gethostname()}"


def _is_everyones(problem: str, rows: Any) -> bool:
    """Say whether all workers have met the same problem; those that have not wait for this one in an exchange."""
    context = _TRAIN.get_context()
    ray.get(rows.fail.remote(problem, context.get_world_rank(), context.get_world_size()))
    give_up = time.monotonic() + _VOTE_S
    while not ray.get(rows.problem.remote()) and time.monotonic() < give_up:
        time.sleep(_POLL_S)
    return bool(ray.get(rows.problem.remote()))


class _Rows:
    """What the workers tell the driver."""

    def __init__(self) -> None:
        self._rows: list[Row] = []
        self._workers: list[str] = []
        self._ranks: dict[str, set[int]] = {}
        self._problem = ""

    def join(self, line: str) -> None:
        """Note that a worker has started."""
        self._workers.append(line)

    def take_workers(self) -> list[str]:
        """Return a line for each worker that has started since the last call."""
        lines, self._workers = self._workers, []
        return lines

    def add(self, row: Row) -> None:
        self._rows.append(row)

    def take(self) -> list[Row]:
        """Return the rows since the last call."""
        rows, self._rows = self._rows, []
        return rows

    def fail(self, problem: str, rank: int, num_workers: int) -> None:
        """Note what one worker has met."""
        ranks = self._ranks.setdefault(problem, set())
        ranks.add(rank)
        if len(ranks) == num_workers:
            self._problem = problem

    def problem(self) -> str:
        """Return what all workers have met; empty for nothing."""
        return self._problem


def _told_here() -> Any:
    """Return the actor that workers tell, on the driver's own node: the loss of any other takes nothing with it."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(_Rows).options(num_cpus=0, scheduling_strategy=here).remote()


def _workers(config: FitResourceConfig, cluster: Cluster) -> _Workers:
    """Return what the fit takes. Raises ResourceError for more than there is."""
    gpus = config.gpus_per_worker
    gpus = (1.0 if cluster.gpus else 0.0) if gpus is None else gpus
    every = max(1, int(cluster.gpus / gpus)) if gpus else 1
    fewest, most = worker_range(config.workers, "--workers") or (every, every)
    cpus = min(1.0, cluster.cpus / most) if gpus else max(1.0, cluster.cpus // most)
    short = [f"{fewest * gpus:g} GPUs; there are {cluster.gpus:g}"] if fewest * gpus > cluster.gpus else []
    short += [f"{fewest * cpus:g} CPUs; there are {cluster.cpus:g}"] if fewest * cpus > cluster.cpus else []
    if short and not cluster.can_grow:
        raise ResourceError(f"--workers {config.workers} needs {short[0]}. Lower --workers or --gpus-per-worker")
    log.info("fit workers=%d:%d worker_gpus=%g worker_cpus=%g", fewest, most, gpus, cpus)
    return _Workers(fewest, most, cpus, gpus)
