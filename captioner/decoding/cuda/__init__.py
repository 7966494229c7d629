"""Faster decoding on a CUDA device: joined matrix products, our own Triton kernels, recorded steps.

The results are those of transformers' layers run eagerly. Nothing here is needed on a CPU; the engine chooses.
"""

from captioner.decoding.cuda.fused_llama import FusedLlama
from captioner.decoding.cuda.operations import operations_for
from captioner.decoding.cuda.recorded_steps import RecordedSteps
from captioner.decoding.cuda.unfused_llama import UnfusedLlama

__all__ = ["FusedLlama", "RecordedSteps", "UnfusedLlama", "operations_for"]
