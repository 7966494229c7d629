"""A whole fit: every step from a saved state to the end, with evaluations, checkpoints and an early stop.

Two fits of the same config, data and state take the same steps, however many workers share them and wherever an earlier
fit was interrupted.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, nullcontext
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from captioner.config import TrainingConfig
from captioner.errors import JobError, OutputError
from captioner.model.caption_model import CaptionModel
from captioner.training.fit.batches import IntArray, PixelStream, TokenizedSplit, epoch_batches, share
from captioner.training.fit.fit_state import Best, FitState
from captioner.training.fit.projector import ProjectorFit, StepResult
from captioner.training.fit.random_crops import random_boxes
from captioner.training.fit.row import Row
from captioner.training.fit.schedule import MIN_INTERVAL, Schedule, num_steps_of, steps_per_epoch
from captioner.training.fit.validation import Validation
from captioner.training.fit.worker_group import WorkerGroup

__all__ = ["Listener", "fit_projector"]


@dataclass(frozen=True)
class Listener:
    """Functions that a fit calls while it runs, on every worker."""

    on_start: Callable[[ProjectorFit], None] = lambda _fit: None
    """Called before the first step, with all that has a gradient."""

    on_row: Callable[[FitState], None] = lambda _state: None
    """Called when the history has another row."""

    on_checkpoint: Callable[[FitState, ProjectorFit], None] = lambda _state, _fit: None
    """Called with a state from which the fit can resume; the last one is the end."""


def fit_projector(
    model: CaptionModel,
    train: TokenizedSplit,
    validation: Validation | None,
    config: TrainingConfig,
    *,
    group: WorkerGroup | None = None,
    pixels: PixelStream | None = None,
    examples: str = "",
    saved: bytes | None = None,
    listener: Listener | None = None,
    min_interval: int = MIN_INTERVAL,
    checkpoint_after_s: float = 180.0,
) -> FitState:
    """Return the state after the last step; its `best` holds the weights to keep.

    pixels: gives the pixels of each batch to come, where `train` holds no features.
    examples: fingerprint of both splits. saved: the bytes of a state of this fit, to resume from. min_interval: see
    Schedule. checkpoint_after_s: seconds after which the next row comes with a checkpoint, whatever the schedule.
    Raises JobError when the loss is not finite, OutputError for a state of other examples.
    """
    group, listener = group or WorkerGroup(), listener or Listener()
    order = _Order(train, config)
    fit = ProjectorFit(model, config, num_steps=num_steps_of(config, order.num_examples), group=group)
    state = FitState.from_bytes(saved, fit) if saved else FitState(examples=examples)
    _check_examples(state, examples)
    listener.on_start(fit)
    window = _Window()
    schedule = Schedule(config, order.steps_per_epoch, fit.num_steps, min_interval)
    kept_at = time.monotonic()
    coming = _images(train, config, group, range(state.step, fit.num_steps))
    with nullcontext() if pixels is None else closing(pixels(coming)) as stream:
        while state.step < fit.num_steps and not state.is_stopped:
            parts = ((part, order.boxes(state.step, part)) for part in order.parts(state.step, group))
            batches = (train.batch(part, window.next_of(stream), boxes=boxes) for part, boxes in parts)
            window.add(fit.step(batches, step=state.step), len(order.rows(state.step)))
            state.step += 1
            if schedule.has_row(state.step):
                row = {"step": state.step, "epoch": state.step / order.steps_per_epoch} | window.take()
                row |= fit.learning_rates(state.step - 1)
                if schedule.has_evaluation(state.step):
                    row |= _evaluate(fit, validation, state)
                    window.restart()
                state.history.append(row)
                listener.on_row(state)
                is_overdue = time.monotonic() - kept_at >= checkpoint_after_s
                if is_overdue or schedule.has_checkpoint(state.step) or state.is_stopped:
                    listener.on_checkpoint(state, fit)
                    kept_at = time.monotonic()
    return state


def _images(
    train: TokenizedSplit, config: TrainingConfig, group: WorkerGroup, steps: Iterable[int]
) -> Iterator[IntArray]:
    """Yield the images of each batch that this worker is to compute in these steps."""
    order = _Order(train, config)  # of its own: what decodes is ahead of what computes
    for step in steps:
        yield from (train.image[part] for part in order.parts(step, group))


def _check_examples(state: FitState, examples: str) -> None:
    if state.examples != examples:
        raise OutputError(
            f"the checkpoint of step {state.step:,} is of other examples ({state.examples[:12]}) than there are now"
            f" ({examples[:12]}): images have changed, appeared or failed since the fit began. Restore them, remove"
            " _run/checkpoint.pt to start over, or choose another OUTPUT_BUNDLE; --features shares what is computed"
        )


def _evaluate(fit: ProjectorFit, validation: Validation | None, state: FitState) -> Row:
    """Measure the weights, keep them if they are the best, and return the figures."""
    start = time.monotonic()
    if validation is None:
        state.best = Best(state.step, {}, [], fit.weights())
        return {}
    measured = validation.measure(fit)
    if state.best is None or _score(fit.config, measured.figures) > _score(fit.config, state.best.figures):
        state.best = Best(state.step, measured.figures, measured.captions, fit.weights())
        state.evaluations_without_gain = 0
    else:
        state.evaluations_without_gain += 1
        state.is_stopped = 0 < fit.config.early_stop <= state.evaluations_without_gain
    return {**measured.figures, "eval_seconds": time.monotonic() - start}


def _score(config: TrainingConfig, figures: Row) -> float:
    return figures["cider_d"] if config.keep_best_by == "cider" else -figures["val_loss"]


class _Order:
    """The examples of each step."""

    def __init__(self, examples: TokenizedSplit, config: TrainingConfig) -> None:
        self._lengths, self._config = examples.lengths, config
        self._image = examples.image if config.captions_per_epoch == "one" else None
        self.num_examples = len(examples) if self._image is None else len(np.unique(self._image))
        self.steps_per_epoch = steps_per_epoch(self.num_examples, config.batch_size)
        self._epoch, self._batches = -1, list[IntArray]()

    def parts(self, step: int, group: WorkerGroup) -> list[IntArray]:
        """Return the examples of each batch of one worker in a step."""
        num_parts = self._config.gradient_accumulation_steps
        return share(self.rows(step), rank=group.rank, size=group.size, num_parts=num_parts)

    def boxes(self, step: int, part: IntArray) -> npt.NDArray[np.float32] | None:
        """Return the part of each image that a batch of this step shows, float32[B, 4]; None for whole images."""
        config = self._config
        if config.min_crop_area == 1:
            return None
        return random_boxes(part, min_area=config.min_crop_area, seed=config.seed, epoch=step // self.steps_per_epoch)

    def rows(self, step: int) -> IntArray:
        epoch, position = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            config = self._config
            place = {"seed": config.seed, "epoch": epoch}
            self._batches = epoch_batches(self._lengths, config.batch_size, **place, image=self._image)
            self._epoch = epoch
        return self._batches[position]


@dataclass
class _Window:
    """Results of the steps since the last row; they stay on the device until they are read."""

    results: list[StepResult] = field(default_factory=list)
    num_examples: int = 0
    start: float = field(default_factory=time.monotonic)
    waited_s: float | None = None
    """Seconds for which the steps had no pixels; None where none are streamed."""

    def next_of(self, stream: Iterator[npt.NDArray[np.uint8]] | None) -> npt.NDArray[np.uint8] | None:
        """Return the next pixels of a stream, once they are there; None without a stream."""
        if stream is None:
            return None
        start = time.monotonic()
        pixels = next(stream)
        self.waited_s = (self.waited_s or 0.0) + time.monotonic() - start
        return pixels

    def add(self, result: StepResult, num_examples: int) -> None:
        self.results.append(result)
        self.num_examples += num_examples

    def take(self) -> Row:
        """Return the means and rates, and start over. Raises JobError when the loss is not finite."""
        tokens = _total(self.results, "num_tokens")
        loss = _total(self.results, "loss_sum") / tokens
        if not math.isfinite(loss):
            raise JobError(f"the loss is {loss}: the fit has diverged. Lower --learning-rate, or raise --warmup-steps")
        seconds = time.monotonic() - self.start
        row = {
            "loss": loss,
            "grad_norm": float(self.results[-1].grad_norm),
            "tokens_per_s": tokens / seconds,
            "examples_per_s": self.num_examples / seconds,
        }
        if self.waited_s is not None:
            row["wait_seconds"] = self.waited_s
        self.restart()
        return row

    def restart(self) -> None:
        self.results, self.num_examples, self.start, self.waited_s = [], 0, time.monotonic(), None


def _total(results: list[StepResult], name: str) -> float:
    values: list[Tensor] = [getattr(result, name) for result in results]
    return float(torch.stack(values).double().sum())
