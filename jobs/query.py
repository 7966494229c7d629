"""Query a caption table by SQL, or say what is in it: python jobs/query.py OUTPUT "SELECT ..."."""

import sys

from captioner.command_line import run
from captioner.config import QueryConfig
from captioner.query import query

if __name__ == "__main__":
    sys.exit(run(QueryConfig, query, continues=False))
