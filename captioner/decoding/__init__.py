"""The decoding engine: see `captioner.decoding.engine`, and `engine_thread` for its front to many threads."""

from captioner.decoding.engine import Engine
from captioner.decoding.engine_thread import EngineThread
from captioner.decoding.request import Generation, Hypothesis, Request

__all__ = ["Engine", "EngineThread", "Generation", "Hypothesis", "Request"]
