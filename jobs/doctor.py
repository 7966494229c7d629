"""Look whether captions can be made here, and with what: python jobs/doctor.py [INPUT] [OUTPUT] [--model BUNDLE]."""

import sys

from captioner.commands import main

if __name__ == "__main__":
    sys.exit(main("doctor"))
