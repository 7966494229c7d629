"""Layouts of published captioners: a layout is one file here and one entry in `table`.

Knows names of configs and tensors; every layout gives the same `Parts`. Nothing here knows a tower or a language model
but by its entry in their tables.
"""
