"""Query a caption table with SQL, or summarize it: python jobs/query.py OUTPUT "SELECT ..."."""

import sys

from captioner.commands import main

if __name__ == "__main__":
    sys.exit(main("query"))
