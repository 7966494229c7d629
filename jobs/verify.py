"""Prove that every image of a caption table came out exactly once: python jobs/verify.py OUTPUT."""

import sys

from captioner.command_line import run
from captioner.config import VerifyConfig
from captioner.verification import verify

if __name__ == "__main__":
    sys.exit(run(VerifyConfig, verify))
