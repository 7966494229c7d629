"""The decoding engine (`engine`): continuous batching over slots; `engine_thread` runs it for calls of many threads.

Knows token ids and embeddings of a `LlamaForCausalLM`; no text, images, files or Ray. `cuda/`: faster on a CUDA device.
"""

from captioner.decoding.engine import Engine
from captioner.decoding.engine_thread import EngineThread
from captioner.decoding.request import AllowedTokens, Fork, Generation, Hypothesis, IsStopped, Redraw, Request
from captioner.decoding.strategy import engine_key

__all__ = [
    "AllowedTokens",
    "Engine",
    "EngineThread",
    "Fork",
    "Generation",
    "Hypothesis",
    "IsStopped",
    "Redraw",
    "Request",
    "engine_key",
]
