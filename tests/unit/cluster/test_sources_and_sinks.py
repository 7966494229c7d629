"""What arrives at a write task."""

import pyarrow as pa

from captioner.cluster.sources_and_sinks import concat_rows


def test_blocks_of_no_rows_have_no_columns_and_spoil_nothing() -> None:
    empty, rows = pa.table({}), pa.table({"key": [1]})
    assert concat_rows([empty, rows, empty, rows]) == pa.table({"key": [1, 1]})
    assert concat_rows([empty, empty]) is None
