"""Work on a device, recorded once and replayed: what takes Python out of a loop.

One step of a 32-layer LLaMA costs the host some 9 ms of dispatch and an H100 about 5 ms of work, so that only recorded
work keeps the card busy. What is recorded reads and writes tensors whose places never change, and never looks at their
values on the host. Knows neither images nor tokens.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

__all__ = ["CudaGraphs", "Recorder", "Recording", "on_device", "recorder_for"]

Result = TypeVar("Result")

_ATTENTION = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
"""Not cuDNN's, which makes a plan for each new shape while it runs."""


class Recording(NamedTuple, Generic[Result]):
    """Work that can be done again: `replay` refills `result`, tensors whose place never changes."""

    replay: Callable[[], None]
    result: Result


class Recorder(Protocol):
    """Records work; all that one recorder has recorded may share memory, and is replayed one after another only."""

    def __call__(self, work: Callable[[], Result]) -> Recording[Result]:
        """Return the recording of `work`, which has then been done once."""


def recorder_for(device: torch.device) -> Recorder | None:
    """Return a new recorder where recording pays, on a CUDA device; none elsewhere. Each engine takes its own."""
    return CudaGraphs(device) if device.type == "cuda" else None


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """Make a CUDA device the calling thread's own inside the block: a thread starts with the first."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


class CudaGraphs:
    """Records work on one CUDA device as graphs that share their memory: they never run at the same time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        with on_device(device):
            self._pool = torch.cuda.graph_pool_handle()
            self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]

    def __call__(self, work: Callable[[], Result]) -> Recording[Result]:
        """Return the recording of `work`, run once before: what libraries set up at first use cannot be recorded."""
        with on_device(self._device), sdpa_kernel(_ATTENTION):
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                work()
            torch.cuda.current_stream().wait_stream(self._stream)
            graph = torch.cuda.CUDAGraph()
            # Other threads may use the device meanwhile; what they ask of it must not end the recording.
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                result = work()
        return Recording(graph.replay, result)
