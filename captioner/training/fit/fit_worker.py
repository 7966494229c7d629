"""One worker of a fit, without Ray: load the models, resume from the checkpoint, take every step, keep checkpoints.

Every worker computes; only the first one writes.
"""

from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from captioner.config import TrainingConfig
from captioner.model.bundle import load
from captioner.training.features.caption_tokens import CaptionTokens
from captioner.training.features.examples import Examples, FeatureSet
from captioner.training.fit.batches import Images, PixelStream
from captioner.training.fit.fit_loop import Listener, fit_projector
from captioner.training.fit.fit_output import FitOutput
from captioner.training.fit.fit_state import FitState
from captioner.training.fit.projector import describe_trained
from captioner.training.fit.row import Row
from captioner.training.fit.run_folder import RunFolderWriter
from captioner.training.fit.validation import Validation
from captioner.training.fit.worker_group import WorkerGroup

__all__ = ["FitTask", "run_fit_worker"]


@dataclass(frozen=True)
class FitTask:
    """Everything a worker needs to know; small, can be pickled."""

    output: FitOutput
    features: FeatureSet
    tokens: CaptionTokens
    training: TrainingConfig
    dtype: str
    device: str
    num_threads: int
    pixels: Mapping[str, PixelStream] = field(default_factory=dict)
    """The pixels of `train` and of the `validation` sample, where each step computes its features; else empty."""

    model_options: Mapping[str, Any] | None = None
    """Storage options of CLIP, LLaMA and the initial bundle; by default those of the output."""


def run_fit_worker(
    task: FitTask, device: str, on_row: Callable[[Row], None], on_start: Callable[[str], None] = lambda _line: None
) -> FitState:
    """Fit as one worker of this process's group and return the last state. The first worker calls `on_row`, and
    `on_start` with a line that says what has gradients."""
    torch.set_num_threads(task.num_threads)
    device = task.device if task.device != "auto" else device
    model = load(
        task.output.initial_bundle_url,
        dtype=_dtype(task.dtype, device),
        device=device,
        storage_options=dict(task.model_options or task.output.storage_options) or None,
        merges_adapter=task.training.lora_rank == 0,
        allow_remote_parts=True,  # this fit has written the bundle
    )
    group = WorkerGroup.of_torch()
    return fit_projector(
        model,
        task.tokens.load("train", task.features.features_of("train")),
        _validation(task),
        task.training,
        group=group,
        pixels=task.pixels.get("train"),
        examples=task.features.fingerprint,
        saved=task.output.read("checkpoint.pt"),
        listener=_listener(task, on_row, on_start) if group.rank == 0 else Listener(),
    )


def _listener(task: FitTask, on_row: Callable[[Row], None], on_start: Callable[[str], None]) -> Listener:
    """Return what the first worker's fit calls."""
    written = RunFolderWriter(task.output, on_row).listener
    return replace(written, on_start=lambda fit: on_start(f"fit gradients={describe_trained(fit.trained)}"))


def _validation(task: FitTask) -> Validation | None:
    """Return the split to evaluate on; None if there are no validation images."""
    examples = task.features.validation_sample(task.training)
    if not len(examples):
        return None
    scored = examples.captions[: task.training.num_scored_images]
    return Validation(task.tokens.load("validation", _validation_images(task, examples)), scored)


def _validation_images(task: FitTask, examples: Examples) -> Images:
    """Return what is read of the validation sample: kept features, or pixels, which stay in memory."""
    stream = task.pixels.get("validation")
    if stream is None:
        return examples.features
    with closing(stream(iter([np.arange(len(examples))]))) as pixels:
        return next(pixels)


def _dtype(name: str, device: str) -> str:
    """Return the dtype of the frozen weights. Never float16: its gradients vanish."""
    if name != "auto":
        return name
    has_bfloat16 = device.startswith("cuda") and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bfloat16" if has_bfloat16 else "float32"
