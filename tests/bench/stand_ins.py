"""What the benchmarks of the job put where the model is: the rest of `caption_images` runs as it is.

The seam is `Captioner.caption_pixels`. Ray's workers import these classes by name.
"""

import json
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch

from captioner.caption_columns import Caption
from captioner.captioning.caption_worker import CaptionWorker
from captioner.captioning.telemetry import EngineMonitor, Recorder
from captioner.cluster.caption_pipeline import caption_images
from captioner.config import CaptionJobConfig
from captioner.model.bundle import describe

SECONDS_AN_IMAGE, LOG = "BENCH_SECONDS_AN_IMAGE", "BENCH_LOG"
_CAPTION = Caption(
    caption="nothing was looked at", num_tokens=5, finish_reason="stop", mean_logprob=-1.0, min_logprob=-2.0
)


class NullCaptioner:
    """Gives every image the same caption at once."""

    num_slots = 256

    def __init__(self, image_size: int) -> None:
        self.model = SimpleNamespace(image_size=image_size)

    def monitor(self, recorder: Recorder, num_failed: Callable[[], int] = int) -> EngineMonitor:
        return EngineMonitor(recorder, num_busy=lambda: 0, idle_s=lambda: 0.0)

    def caption_pixels(
        self, pixels: torch.Tensor, image_ids: Sequence[str], sizes: Sequence[tuple[int, int]] = ()
    ) -> list[Caption]:
        return [_CAPTION] * len(pixels)


class SleepingCaptioner(NullCaptioner):
    """A simulated accelerator: one batch at a time, a fixed time an image, no processor time. Notes when each ended."""

    def __init__(self, image_size: int) -> None:
        super().__init__(image_size)
        self._device = threading.Lock()
        self._seconds = float(os.environ[SECONDS_AN_IMAGE])
        self._log = Path(os.environ[LOG])

    def caption_pixels(
        self, pixels: torch.Tensor, image_ids: Sequence[str], sizes: Sequence[tuple[int, int]] = ()
    ) -> list[Caption]:
        with self._device:
            time.sleep(self._seconds * len(pixels))
            with self._log.open("a") as log:
                print(json.dumps([time.time(), len(pixels)]), file=log)
        return super().caption_pixels(pixels, image_ids, sizes)


class NullWorker(CaptionWorker):
    """The job's own worker around a NullCaptioner."""

    stand_in: type[NullCaptioner] = NullCaptioner

    def __init__(self, config: CaptionJobConfig, *args: Any, **options: Any) -> None:
        captioner = self.stand_in(describe(config.model.model).image_size)
        with patch("captioner.captioning.caption_worker.Captioner.from_bundle", lambda *_, **__: captioner):
            super().__init__(config, *args, **options)


class SleepingWorker(NullWorker):
    """The job's own worker around a SleepingCaptioner."""

    stand_in = SleepingCaptioner


def run_job(config: CaptionJobConfig, worker: type[NullWorker]) -> Mapping[str, Any]:
    """Return the summary of a job that has this worker in place of the real one."""
    with patch("captioner.cluster.caption_stream.MODEL_WORKER", f"{worker.__module__}:{worker.__name__}"):
        return caption_images(config)
