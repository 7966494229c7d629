"""The options of the demo bundle's training."""

from dataclasses import dataclass
from pathlib import Path

import tyro


@dataclass(frozen=True, kw_only=True)
class Training:
    """How the demo bundle is trained."""

    out: tyro.conf.Positional[Path]
    """Folder of the bundle."""
    seed: int = 0
    """Of the weights, the batches and the scenes."""
    num_images: int = 40_000
    """Training images; a description comes back about three times, drawn differently."""
    num_test_images: int = 1_500
    """Held-out images of the final measurement."""
    batch_size: int = 128
    clip_steps: int = 1_500
    """Optimizer steps of the two CLIP towers."""
    clip_learning_rate: float = 1e-3
    clip_width: int = 128
    clip_layers: int = 4
    patch_size: int = 16
    llama_steps: int = 2_500
    """Optimizer steps of LLaMA and the projector."""
    llama_learning_rate: float = 2e-3
    llama_width: int = 128
    llama_layers: int = 5
    num_threads: int = 1
    """Of torch; more help only where nothing else runs."""
    log_every: int = 100
    """Steps between two lines of progress on stderr."""
