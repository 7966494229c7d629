"""How good captions are against references: `jobs/evaluate.py`.

metrics/           one file and one entry of METRICS each
caption_files/     captions of any file: a format is one reader and one entry of CAPTION_FORMATS
side.py            what is read of captions and of references
matching.py        captions of each side by image, and which belong together
clip.py            CLIPScore and RefCLIPScore of those that do
gates.py           figures that must not be too low
report.py          the figures, and the table for people

Knows no Ray, and no caption job but its table.
"""

from captioner.evaluation.caption_files import describe_caption_formats
from captioner.evaluation.gates import describe_metrics
from captioner.evaluation.matching import RULES, Captions, Matching, match
from captioner.evaluation.report import BatchSizes, evaluate

__all__ = [
    "RULES",
    "BatchSizes",
    "Captions",
    "Matching",
    "describe_caption_formats",
    "describe_metrics",
    "evaluate",
    "match",
]
