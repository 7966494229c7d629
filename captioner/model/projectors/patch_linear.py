"""One linear map of each patch."""

from torch import nn

from captioner.model.projector_config import ProjectorConfig

__all__ = ["PatchLinearProjector"]


class PatchLinearProjector(nn.Linear):
    """One linear map, applied to each patch, as in the first LLaVA (arXiv:2304.08485): float[B, P, F] -> [B, P, D]."""

    def __init__(self, config: ProjectorConfig):
        super().__init__(config.num_features, config.width, bias=config.has_bias)
