"""Steps that are recorded once for each shape and replayed. Knows no requests and no strategy.

All shapes are recorded before the first request, because recording runs a step, which would overwrite used slots.
"""

from collections.abc import Iterable
from functools import partial

from torch import Tensor

from captioner.decoding.layout import StepShape
from captioner.decoding.step import Step
from captioner.model.cuda_graphs import Recorder


class RecordedSteps:
    """A step function that replays recordings."""

    def __init__(self, step: Step, shapes: Iterable[StepShape], recorder: Recorder) -> None:
        """Record each shape, the largest first, so that the others reuse its memory."""
        largest_first = sorted(shapes, key=lambda shape: shape.num_prompt_rows, reverse=True)
        self._recordings = {shape: recorder(partial(step, shape)) for shape in largest_first}

    def __call__(self, shape: StepShape) -> Tensor:
        """Run the step of a recorded shape; the next step of that shape overwrites the result."""
        recording = self._recordings[shape]
        recording.replay()
        return recording.result
