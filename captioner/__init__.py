"""Caption millions of images into a Parquet table: CLIP ViT -> projection -> LLaMA-3, on Ray.

Importing this package loads neither torch nor ray; each room brings what it needs.
"""

__version__ = "0.1.0"
