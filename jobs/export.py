"""Write the captions of a table as trainers and lakes read them: python jobs/export.py TABLE OUT --format FORMAT."""

import sys

from captioner.commands import main

if __name__ == "__main__":
    sys.exit(main("export"))
