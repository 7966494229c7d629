"""The model: tower, projector and language model, what ties them, and how they are found, checked and loaded.

Knows torch, transformers and any fsspec store; no Ray, no image decoding and no Parquet. The two entry points are
`captioner.model.bundle.describe`, which reads configs and headers only and imports neither torch nor transformers, and
`captioner.model.bundle.load`. `towers/`, `language/` and `layouts/` hold one file and one entry for each family.
"""
