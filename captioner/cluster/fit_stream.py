"""A planned fit on Ray: features once by Ray Data, then steps by Ray Train's TorchTrainer, then the bundle.

    labels -> compute_features -> FitWorker group (one process a GPU) -> bundle
                                    ^ pixel_streams, where the steps compute features

Knows in which order a fit takes its steps and who writes what; how workers are started is in `training_group`, what
they compute in `training`. A fit resumes from its own checkpoint, one object that is replaced whole, rather than from
Ray's: that one counts only once the controller has seen it, and lies where fsspec's options do not reach.
"""

import logging
import threading
import time
from tempfile import TemporaryDirectory
from typing import Any

import ray
from ray.train.torch import TorchTrainer

from captioner.cluster.feature_pipeline import compute_features
from captioner.cluster.fit_reports import FitReports
from captioner.cluster.pixel_stream import pixel_streams
from captioner.cluster.session import joined_cluster, start_beside_driver
from captioner.cluster.supervision import raising_worker_errors
from captioner.cluster.training_group import TRAIN, TrainingGroup, training_group
from captioner.errors import JobError
from captioner.gallery.fit_page import write_fit_page
from captioner.training.features.caption_tokens import tokenize_examples
from captioner.training.features.examples import FeatureSet
from captioner.training.fit.fit_plan import FitPlan
from captioner.training.fit.fit_report import save_fitted_bundle, summarize
from captioner.training.fit.fit_state import FitState, best_of
from captioner.training.fit.fit_worker import FitTask
from captioner.training.fit.initial_bundle import save_initial_bundle
from captioner.training.fit.progress import FitProgress

__all__ = ["run", "train"]

log = logging.getLogger("captioner")

_POLL_S = 0.5


def run(plan: FitPlan) -> dict[str, Any]:
    """Run the rest of a fit and return its summary."""
    start = time.monotonic()
    plan.output.claim(plan.identity)
    save_initial_bundle(plan.config, plan.output.initial_bundle_url, plan.model_options, plan.models)
    with joined_cluster() as cluster:
        group = training_group(plan.config.resources, cluster, streams_pixels=plan.start.projector.reads_patches)
        plan = plan.for_workers(has_gpus=group.gpus > 0)
        features = compute_features(plan.features, plan.start, plan.config.resources.for_features(), cluster)
        train(plan, features, group)
    data = plan.output.read("checkpoint.pt")
    assert data is not None, "the workers have ended without a checkpoint"
    state = FitState.read(data)
    write_fit_page(plan, features, best_of(state))
    save_fitted_bundle(plan, features, state)
    return {**summarize(plan), "seconds": round(time.monotonic() - start, 2)}


def train(plan: FitPlan, features: FeatureSet, group: TrainingGroup) -> None:
    """Run the workers until the last step; those that are lost start again from the checkpoint."""
    model, training = plan.config.model, plan.config.training
    tokens = tokenize_examples(features, plan.language, plan.start.template, training, plan.output)
    reports = start_beside_driver(FitReports)
    with TemporaryDirectory(prefix="captioner-fit-") as scratch, pixel_streams(plan, features, group) as pixels:
        task = FitTask(
            output=plan.output,
            features=features,
            tokens=tokens,
            training=training,
            dtype=model.dtype,
            device=model.device,
            num_threads=group.num_threads,
            pixels=pixels,
            model_options=plan.model_options,
        )
        trainer = group.trainer(task, reports, plan.config.resources.max_failures, scratch)
        _follow(plan, trainer, reports)


def _follow(plan: FitPlan, trainer: TorchTrainer, reports: Any) -> None:
    """Show what the workers report until the trainer has ended; raise what ended it."""
    ended: list[BaseException | None] = []

    def run() -> None:  # not in the main thread, where Ray takes Ctrl-C for itself and the job would end as done
        try:
            trainer.fit()
            ended.append(None)
        except (TRAIN.TrainingFailedError, ray.exceptions.RayError) as error:
            ended.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    with FitProgress(plan.num_steps, plan.tensorboard_folder) as progress, raising_worker_errors(reports):
        while thread.is_alive():
            thread.join(_POLL_S)
            for line in ray.get(reports.take_starts.remote()):
                log.info(line)
            for row in ray.get(reports.take_rows.remote()):
                progress.show(row)
        shared, last = ray.get([reports.shared_error.remote(), reports.error.remote()])
    if shared:
        raise shared.as_exception()
    if ended == [None]:
        return
    error = ended[0] if ended else None
    if last:
        raise last.as_exception() from error
    raise JobError(f"the job stopped: {error or 'the trainer has ended without an error'}") from error
