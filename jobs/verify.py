"""Prove that every image of a caption table came out exactly once: python jobs/verify.py OUTPUT."""

import sys

from captioner.commands import main

if __name__ == "__main__":
    sys.exit(main("verify"))
