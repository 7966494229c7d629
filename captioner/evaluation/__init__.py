"""How good captions are against references: `jobs/evaluate.py`.

matching.py     captions of each side by image, and which belong together
clip.py         CLIPScore and RefCLIPScore of those that do
report.py       the figures, the table for people, the gates
"""

from captioner.evaluation.matching import RULES, Captions, Matching, match
from captioner.evaluation.report import evaluate

__all__ = ["RULES", "Captions", "Matching", "evaluate", "match"]
