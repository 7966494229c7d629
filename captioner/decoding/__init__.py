"""The decoding engine: see `captioner.decoding.engine`."""

from captioner.decoding.engine import Engine
from captioner.decoding.request import Generation, Hypothesis, Request

__all__ = ["Engine", "Generation", "Hypothesis", "Request"]
