"""Flags for the model that captions."""

import re
from dataclasses import dataclass, field
from typing import Literal

from captioner.config.checks import check, typed

__all__ = ["Dtype", "ModelConfig"]

Dtype = Literal["auto", "float32", "bfloat16", "float16"]


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which model captions, in which number format, on which device."""

    model: str = ""
    """A bundle: `demo`, a folder on any store; or a published LLaVA checkpoint by hub name or path.
    By default `demo`, but only where INPUT is `demo`: it knows drawn shapes and no photographs."""

    model_storage_options: dict[str, object] | None = field(default=None, repr=False)
    """fsspec options of the model's store, as JSON. By default those of the images, when both are on the same server
    (kind of store and host) or the images are local. Never saved."""

    allow_remote_parts: bool = False
    """Follow a bundle to a CLIP or LLaMA at a URL on another server than its own. Hub names are followed always."""

    prompt: str | None = None
    """What a LLaVA checkpoint is asked: a question, or a whole prompt with `{image}` where the image goes.
    `\\n` is a line break. By default it asks for one sentence."""

    system_prompt: str | None = None
    """System prompt of a LLaVA checkpoint, before its question."""

    tokenizer: str | None = None
    """Tokenizer of a LLaVA checkpoint that has none, by hub name or path."""

    vision_tower: str | None = None
    """Vision tower of a LLaVA checkpoint in the original layout, by hub name or path, in place of the one that its
    config names. Weights of a tower inside the checkpoint are used all the same."""

    dtype: Dtype = "auto"
    """Number format of the weights. `auto`: bfloat16 on a GPU, float32 on a CPU."""

    device: str = "auto"
    """`auto`: the worker's GPU, or the CPU when it has none."""

    def __post_init__(self) -> None:
        is_device = re.fullmatch(r"auto|cpu|cuda(:\d+)?", self.device) is not None
        for name in ("prompt", "system_prompt"):
            if (text := getattr(self, name)) is not None:
                object.__setattr__(self, name, typed(text))
        check(is_device, "--device", self.device, "auto, cpu, cuda or cuda:N")

    @property
    def checkpoint_options(self) -> dict[str, str | None]:
        """What is set for a published checkpoint, as `model.describe` and `model.load` take it."""
        names = ("prompt", "system_prompt", "tokenizer", "vision_tower")
        return {name: getattr(self, name) for name in names}
