"""A whole fit: every step from a saved state to the end, with evaluations, checkpoints and an early stop between.

Two fits of the same config, data and state take the same steps, however many workers share them and wherever an earlier
one was cut.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from captioner.config import TrainingConfig
from captioner.errors import JobError, OutputError
from captioner.fitting.batches import IntArray, TokenizedSplit, epoch_batches, share, steps_per_epoch
from captioner.fitting.projector import ProjectorFit, StepResult
from captioner.fitting.state import Best, FitState, Row, weights_of
from captioner.fitting.team import Team
from captioner.fitting.validation import Validation
from captioner.model.caption_model import CaptionModel

__all__ = ["Listener", "fit_projector", "num_steps_of"]

_LOOKS = 20  # evaluations and checkpoints of a long fit, if nothing else is said
_STEPS_APART = 250  # and not closer, or a short fit would spend its time on looking
_CHECKPOINT_S = 180.0  # seconds after which the next line of progress is a checkpoint, whatever the steps


def num_steps_of(config: TrainingConfig, num_examples: int) -> int:
    """Return the steps of a whole fit."""
    return config.max_steps or config.epochs * steps_per_epoch(num_examples, config.batch_size)


@dataclass(frozen=True)
class Listener:
    """Who is told of a fit while it runs; called on every worker."""

    on_row: Callable[[FitState], None] = lambda _state: None
    """Called when the history has another line."""

    on_checkpoint: Callable[[FitState, ProjectorFit], None] = lambda _state, _fit: None
    """Called with a state from which the same fit can go on; the last one is the end."""


def fit_projector(
    model: CaptionModel,
    train: TokenizedSplit,
    validation: Validation | None,
    config: TrainingConfig,
    *,
    team: Team | None = None,
    examples: str = "",
    saved: bytes | None = None,
    listener: Listener | None = None,
) -> FitState:
    """Return the state after the last step; its `best` holds the weights to keep.

    examples: fingerprint of both splits; saved: the bytes of a state of the same to go on from. Raises JobError when
    the loss is no number any more, OutputError for a state of other examples.
    """
    team, listener = team or Team(), listener or Listener()
    fit = ProjectorFit(model, config, num_steps=num_steps_of(config, len(train)), team=team)
    state = FitState.from_bytes(saved, fit) if saved else FitState(examples=examples)
    _check_examples(state, examples)
    window = _Window()
    order = _Order(train.lengths, config)
    pace = _Pace(config, order.steps_per_epoch, fit.num_steps)
    kept_at = time.monotonic()
    while state.step < fit.num_steps and not state.is_stopped:
        rows = order.rows(state.step)
        parts = share(rows, rank=team.rank, size=team.size, num_parts=config.gradient_accumulation_steps)
        window.add(fit.step((train.batch(part) for part in parts), step=state.step), len(rows))
        state.step += 1
        if pace.has_row(state.step):
            row = {"step": state.step, "epoch": state.step / order.steps_per_epoch} | window.take()
            row["learning_rate"] = fit.learning_rate(state.step - 1)
            if pace.has_evaluation(state.step):
                row |= _evaluate(fit, validation, state)
                window.restart()
            state.history.append(row)
            listener.on_row(state)
            is_late = time.monotonic() - kept_at >= _CHECKPOINT_S
            if is_late or pace.has_checkpoint(state.step) or state.is_stopped:
                listener.on_checkpoint(state, fit)
                kept_at = time.monotonic()
    return state


def _check_examples(state: FitState, examples: str) -> None:
    if state.examples != examples:
        raise OutputError(
            f"the checkpoint of step {state.step:,} is of other examples ({state.examples[:12]}) than there are now"
            f" ({examples[:12]}): images have changed, appeared or failed since the fit began. Restore them, remove"
            " _run/checkpoint.pt to begin anew, or choose another OUTPUT_BUNDLE; --features shares what is computed"
        )


def _evaluate(fit: ProjectorFit, validation: Validation | None, state: FitState) -> Row:
    """Measure the weights, keep them if they are the best, and return the figures."""
    start = time.monotonic()
    if validation is None:
        state.best = Best(state.step, {}, [], weights_of(fit))
        return {}
    measured = validation.measure(fit)
    if state.best is None or _score(fit.config, measured.figures) > _score(fit.config, state.best.figures):
        state.best = Best(state.step, measured.figures, measured.captions, weights_of(fit))
        state.evaluations_without_gain = 0
    else:
        state.evaluations_without_gain += 1
        state.is_stopped = 0 < fit.config.early_stop <= state.evaluations_without_gain
    return {**measured.figures, "eval_seconds": time.monotonic() - start}


def _score(config: TrainingConfig, figures: Row) -> float:
    return figures["cider_d"] if config.keep_best_by == "cider" else -figures["val_loss"]


class _Order:
    """Which examples each step learns."""

    def __init__(self, lengths: IntArray, config: TrainingConfig) -> None:
        self._lengths, self._config = lengths, config
        self.steps_per_epoch = steps_per_epoch(len(lengths), config.batch_size)
        self._epoch, self._batches = -1, list[IntArray]()

    def rows(self, step: int) -> IntArray:
        epoch, place = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            config = self._config
            self._batches = epoch_batches(self._lengths, config.batch_size, seed=config.seed, epoch=epoch)
            self._epoch = epoch
        return self._batches[place]


@dataclass(frozen=True)
class _Pace:
    """After which steps something happens."""

    config: TrainingConfig
    steps_per_epoch: int
    num_steps: int

    @property
    def _usual(self) -> int:
        """Steps between two looks where nobody says: an epoch, or the twentieth part of a long fit if that is less."""
        return min(self.steps_per_epoch, max(_STEPS_APART, self.num_steps // _LOOKS))

    def has_evaluation(self, step: int) -> bool:
        return step % (self.config.eval_every or self._usual) == 0 or step == self.num_steps

    def has_checkpoint(self, step: int) -> bool:
        return step % (self.config.checkpoint_every or self._usual) == 0 or step == self.num_steps

    def has_row(self, step: int) -> bool:
        """At each checkpoint too: a fit that goes on from there has the same rows as one that was never cut."""
        return step % self.config.log_every == 0 or self.has_evaluation(step) or self.has_checkpoint(step)


@dataclass
class _Window:
    """What was measured since the last row; stays on the device until it is read."""

    results: list[StepResult] = field(default_factory=list)
    num_examples: int = 0
    start: float = field(default_factory=time.monotonic)

    def add(self, result: StepResult, num_examples: int) -> None:
        self.results.append(result)
        self.num_examples += num_examples

    def take(self) -> Row:
        """Return the means and rates, and begin anew. Raises JobError when the loss is no number."""
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
        self.restart()
        return row

    def restart(self) -> None:
        self.results, self.num_examples, self.start = [], 0, time.monotonic()


def _total(results: list[StepResult], name: str) -> float:
    values: list[Tensor] = [getattr(result, name) for result in results]
    return float(torch.stack(values).double().sum())
