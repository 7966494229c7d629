"""When a fit evaluates, keeps a checkpoint and logs: a function of the step alone."""

from dataclasses import dataclass

from captioner.config import TrainingConfig

__all__ = ["MIN_INTERVAL", "Schedule", "examples_per_epoch", "num_steps_of", "steps_per_epoch"]

MIN_INTERVAL = 250
"""Fewest steps between evaluations by default; a short fit would spend its time on them."""

_EVALUATIONS = 20  # of a long fit, by default


@dataclass(frozen=True)
class Schedule:
    """After which steps a fit evaluates, keeps a checkpoint and adds a row."""

    config: TrainingConfig
    steps_per_epoch: int
    num_steps: int
    min_interval: int = MIN_INTERVAL

    @property
    def _default_interval(self) -> int:
        """Steps between evaluations if the config sets none: an epoch, or a twentieth of a long fit if that is less."""
        return min(self.steps_per_epoch, max(self.min_interval, self.num_steps // _EVALUATIONS))

    def has_evaluation(self, step: int) -> bool:
        """Return whether the weights are evaluated after this many steps."""
        return step % (self.config.eval_every or self._default_interval) == 0 or step == self.num_steps

    def has_checkpoint(self, step: int) -> bool:
        """Return whether a checkpoint is kept after this many steps, however quick they were."""
        return step % (self.config.checkpoint_every or self._default_interval) == 0 or step == self.num_steps

    def has_row(self, step: int) -> bool:
        """Return whether a row is due: at checkpoints too, so that a resumed fit has the rows of an unbroken one."""
        return step % self.config.log_every == 0 or self.has_evaluation(step) or self.has_checkpoint(step)


def steps_per_epoch(num_examples: int, batch_size: int) -> int:
    """Return the whole batches of one epoch, or 1 where there is none."""
    return max(1, num_examples // batch_size)


def examples_per_epoch(config: TrainingConfig, *, num_images: int, num_captions: int) -> int:
    """Return the examples that an epoch shows of images that all have a caption."""
    return num_captions if config.captions_per_epoch == "all" else num_images


def num_steps_of(config: TrainingConfig, num_examples: int) -> int:
    """Return the steps of a whole fit. num_examples: those of an epoch."""
    return config.max_steps or config.epochs * steps_per_epoch(num_examples, config.batch_size)
