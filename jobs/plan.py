"""Predict what a caption job will take, from a small sample: python jobs/plan.py INPUT --model BUNDLE."""

import sys

from captioner.command_line import run
from captioner.config import PlanConfig
from captioner.rehearsal import rehearse

if __name__ == "__main__":
    sys.exit(run(PlanConfig, rehearse))
