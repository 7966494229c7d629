"""What a user may set for jobs/evaluate.py."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from tyro.conf import Positional, UseAppendAction, arg

from captioner.config.checks import check
from captioner.config.image_access import ImageAccessConfig

__all__ = ["EvaluateConfig", "MatchRule"]

MatchRule = Literal["auto", "id", "name", "number"]


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """How good captions are: BLEU, ROUGE-L and CIDEr-D against references; exit 1 below a --min."""

    captions: Annotated[Positional[str], arg(metavar="CAPTIONS")] = "captions-demo"
    """The OUTPUT of a caption job, or a file of one of the formats above with image_id and caption."""

    references: Annotated[Positional[str], arg(metavar="REFERENCES")] = ""
    """A file of one of the formats above, with image_id and a caption or a list of them, or a caption table.
    `demo` is the embedded images, and the default for `captions-demo`."""

    caption_column: str = ""
    """Column of CAPTIONS with the texts that are measured, of a caption table the name of any prompt. By default
    `caption`, `captions` or `text`. A column `clip_score` is of `caption` alone."""

    reference_column: str = ""
    """The same of REFERENCES."""

    where: str = ""
    """Of a caption table as CAPTIONS: measure those for which this condition in SQL holds, over the columns of its view
    captions, as `kind = 'photo'`."""

    storage_options: dict[str, object] = field(default_factory=dict)
    """fsspec options of their stores, as JSON. By default the usual environment variables."""

    match_by: MatchRule = "auto"
    """When two names mean the same image: equal as they stand (`id`), equal without folder and suffix (`name`), or
    ending in the same number (`number`: COCO_val2014_000000000400.jpg is 400). A shared name matches neither.
    `auto`: the rule that matches the most captions; of equals, the strictest."""

    min: Annotated[list[str], UseAppendAction, arg(metavar="NAME=VALUE")] = field(default_factory=list)
    """Lowest value of a metric that passes, by its name in the summary: --min cider_d=0.9 --min rouge_l=0.5."""

    min_bleu_4: float | None = None
    """Lowest BLEU-4 (0 to 1) that passes."""

    min_rouge_l: float | None = None
    """Lowest ROUGE-L (0 to 1) that passes."""

    min_cider: float | None = None
    """Lowest CIDEr-D (0 to 10; 1.0 is what papers print as 100) that passes."""

    min_clip_score: float | None = None
    """Lowest CLIPScore (0 to 2.5) that passes."""

    min_matched: float | None = None
    """Lowest share of the captions that has references, 0 to 1, that passes."""

    model: str = ""
    """A bundle whose CLIP has a text tower, for RefCLIPScore, and for CLIPScore where a table lacks it: its images are
    read again. Without a model, CLIPScore is what the column `clip_score` says."""

    clip_score_model: str = ""
    """In place of --model: a whole CLIP alone, as openai/clip-vit-large-patch14, by folder, URL or hub id. For captions
    of a model that reads another tower, as SigLIP, or a CLIP without its text tower."""

    model_storage_options: dict[str, object] | None = None
    """fsspec options of the model's store, as JSON.
    By default those of the captions, when both are on the same server (kind of store and host) or the captions are
    local."""

    allow_remote_parts: bool = False
    """Follow a bundle to a CLIP or LLaMA at a URL on another server than its own."""

    device: str = "auto"
    """Device of that CLIP: auto, cpu, cuda or cuda:N."""

    image_access: ImageAccessConfig = field(default_factory=ImageAccessConfig)

    num_resamples: int = 1000
    """Bootstrap samples for each confidence interval."""

    seed: int = 0
    """Seed of the bootstrap."""

    def __post_init__(self) -> None:
        if not self.references:
            is_demo = self.captions == "captions-demo"
            check(is_demo, "REFERENCES", "missing", f"what {self.captions} is to be measured against")
            object.__setattr__(self, "references", "demo")
        sides = [(self.captions, self.caption_column, "--caption-column")]
        sides += [(self.references, self.reference_column, "--reference-column")]
        for path, column, flag in sides:
            check(path != "demo" or not column, flag, column, "none with `demo`, whose captions have no columns")
        is_one = not (self.model and self.clip_score_model)
        check(
            is_one,
            "--clip-score-model",
            self.clip_score_model,
            f"no CLIP beside --model {self.model}, which has its own",
        )
        check(self.num_resamples >= 1, "--num-resamples", self.num_resamples, "at least 1")
