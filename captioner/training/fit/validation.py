"""Evaluation of a projector on the validation split: loss, and captions against their references."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from captioner.config import DecodingConfig
from captioner.decoding import Engine, Request
from captioner.evaluation.metrics import score_captions
from captioner.training.fit.batches import TokenizedSplit
from captioner.training.fit.projector import ProjectorFit

__all__ = ["Evaluation", "Validation"]

_ENCODE_ROWS = 256


@dataclass(frozen=True)
class Evaluation:
    """Figures of one evaluation; the same on every worker."""

    figures: dict[str, float]
    """`val_loss`, and the metrics where captions were scored."""

    captions: list[str]
    """Of the scored images, in their order."""


@dataclass(frozen=True)
class Validation:
    """A split to evaluate on: all of its examples for the loss, its first images for captions."""

    examples: TokenizedSplit
    references: Sequence[Sequence[str]]
    """Captions of the images that are scored: the first ones of the split."""

    def measure(self, fit: ProjectorFit) -> Evaluation:
        """Return loss and metrics of the current weights; each worker computes a share."""
        figures = {"val_loss": self._loss(fit)}
        captions = self._captions(fit) if self.references else []
        if captions:
            scores = score_captions(captions, self.references).figures()
            figures |= {name: float(scores[name]) for name in ("bleu_4", "rouge_l", "cider_d")}
        return Evaluation(figures, captions)

    @torch.no_grad()
    def _loss(self, fit: ProjectorFit) -> float:
        order = np.argsort(self.examples.lengths, kind="stable")[fit.group.rank :: fit.group.size]
        batch_size = max(1, fit.config.batch_size // fit.config.gradient_accumulation_steps)
        totals = torch.zeros(2, dtype=torch.float64)
        for start in range(0, len(order), batch_size):
            batch = self.examples.batch(order[start : start + batch_size])
            totals += torch.tensor([fit.loss_sum(batch).item(), len(batch.loss_positions)], dtype=torch.float64)
        totals = fit.group.sum(totals.to(fit.model.device)).cpu()
        return float(totals[0] / totals[1])

    @torch.no_grad()
    def _captions(self, fit: ProjectorFit) -> list[str]:
        """Return greedy captions of the first images, as the caption job would write them."""
        mine = range(fit.group.rank, len(self.references), fit.group.size)
        written = dict(fit.group.gather(list(self._write(fit, mine).items())))
        return [written[image] for image in range(len(self.references))]

    def _write(self, fit: ProjectorFit, images: Sequence[int]) -> dict[int, str]:
        model, prompt = fit.model, fit.model.prompt_embeddings()
        engine = Engine(
            model.llama,
            decodings=[DecodingConfig(max_new_tokens=fit.config.max_caption_tokens)],
            eos_token_ids=model.eos_token_ids,
            shared_prefix=prompt,
            max_prefix_len=model.num_prompt_tokens - len(prompt),
            context_length=model.context_length,
        )
        requests = (
            Request(image, prefix)
            for start in range(0, len(images), _ENCODE_ROWS)
            for image, prefix in self._prefixes(fit, images[start : start + _ENCODE_ROWS])
        )
        return {int(str(done.id)): model.text(list(done.best.token_ids)) for done in engine.generate(requests)}

    def _prefixes(self, fit: ProjectorFit, images: Sequence[int]) -> list[tuple[int, torch.Tensor]]:
        found = torch.from_numpy(np.ascontiguousarray(self.examples.images[list(images)]))
        request = fit.model.request_embeddings(fit.embed(found.to(fit.model.device)))
        return list(zip(images, request, strict=True))
