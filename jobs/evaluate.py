"""Measure captions against references: python jobs/evaluate.py CAPTIONS REFERENCES."""

import sys

from captioner.command_line import run
from captioner.config import EvaluateConfig
from captioner.evaluation import evaluate

if __name__ == "__main__":
    sys.exit(run(EvaluateConfig, evaluate))
