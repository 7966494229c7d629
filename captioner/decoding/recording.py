"""Steps recorded once and replayed: what takes Python out of the decode loop.

One step of a 32-layer model costs the host some 9 ms of dispatch and an H100 about 5 ms of work, so that only a
recorded step keeps the card busy. A step reads and writes fixed buffers and its work depends on its shape alone, so one
recording a shape suffices; all are made before the first request, when no slot holds anything that a trial run could
spoil. Knows no requests and no strategy.
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from captioner.decoding.step import StepShape

Step = Callable[[StepShape], Tensor]


class Recording(NamedTuple):
    """Work that can be done again: `replay` refills `result`, a tensor whose place never changes."""

    replay: Callable[[], None]
    result: Tensor


Recorder = Callable[[Callable[[], Tensor]], Recording]


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


class CudaGraphs:
    """Records work on one CUDA device as graphs that share their memory: they never run at the same time."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]

    def __call__(self, work: Callable[[], Tensor]) -> Recording:
        """Return the recording of `work`, run once before: what libraries set up at first use cannot be recorded."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            work()
        torch.cuda.current_stream().wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        # Other threads encode images meanwhile; what they ask of the device must not end the recording.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            result = work()
        return Recording(graph.replay, result)
