"""Captions written as others read them: text files, JSON, WebDataset, data sets of the hub, tables of a lake.

    job.py        what jobs/export.py does: plan, write what is missing, record
    request.py    what was asked for, in the terms of the table; the contract of a format
    text.py       --text and --where as SQL
    rows.py       which rows are new, and their columns in the order of the input
    record.py     what OUT holds: _export.json, batches of keys, finished files
    prompts.py    what each run asked
    images.py     the images, read again; samples.py  with their texts
    tar_writer.py a tar, member by member
    hub.py        upload to the Hugging Face hub
    names.py      names of files from names of images
    formats/      one file a format, one entry in `formats.table`

The rows of one export are a batch: their keys are written down before any file is, so that each file follows from its
batch alone. Reads a table through `query`. Knows no Ray: `cluster.export_pipeline` runs what reads images.
"""

from captioner.export.job import Pending, RunShards, export_table, write_shard, write_shards

__all__ = ["Pending", "RunShards", "export_table", "write_shard", "write_shards"]
