"""Images with captions, read from any of the formats that people keep them in, in splits disjoint by image.

A format is one reader and one entry of LABEL_FORMATS. Knows no pixels, no model and no Ray.
"""

from captioner.training.labels.formats import describe_label_formats
from captioner.training.labels.labels import LABELS, Count, Labels, read_labels

__all__ = ["LABELS", "Count", "Labels", "describe_label_formats", "read_labels"]
