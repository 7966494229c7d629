"""Steps recorded once a shape and replayed. All are recorded before the first request, when no slot holds anything that
a trial run could spoil. Knows no requests and no strategy.
"""

from collections.abc import Callable, Iterable
from functools import partial

from torch import Tensor

from captioner.decoding.step import StepShape
from captioner.model.recording import Recorder

Step = Callable[[StepShape], Tensor]


class RecordedSteps:
    """A step function that replays what it did when it was recorded."""

    def __init__(self, step: Step, shapes: Iterable[StepShape], recorder: Recorder) -> None:
        """Record each shape, the largest first, so that the memory it takes serves the others too."""
        largest_first = sorted(shapes, key=lambda shape: (shape.num_prompts, shape.window), reverse=True)
        self._recordings = {shape: recorder(partial(step, shape)) for shape in largest_first}

    def __call__(self, shape: StepShape) -> Tensor:
        """Run the step of a recorded shape; its result is overwritten by the next step of that shape."""
        recording = self._recordings[shape]
        recording.replay()
        return recording.result
