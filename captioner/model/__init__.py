"""The model: CLIP, projector and LLaMA, what ties them into a bundle, and how they are found, checked and loaded.

Knows torch, transformers and any fsspec store; no Ray, no image decoding and no Parquet. The two doors are
`captioner.model.bundle.describe` (reads configs and headers only) and `captioner.model.bundle.load`.
"""
