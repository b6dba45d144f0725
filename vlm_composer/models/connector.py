"""The trainable part: patches of a vision tower in, tokens of a language model out."""

from __future__ import annotations

from torch import Tensor, nn

from vlm_composer.models.projector import MLPProjector
from vlm_composer.models.resampler import PerceiverResampler


class Connector(nn.Module):
    """Optional LayerNorm, perceiver resampler, MLP projector.

    Args:
        resampler: Maps (B, N, V) to (B, K, D).
        projector: Maps (B, K, D) to (B, K, llm_dim).
        vision_ln: LayerNorm(V) on what enters the resampler; None leaves the patches as they are.
    """

    def __init__(
        self,
        resampler: PerceiverResampler,
        projector: MLPProjector,
        vision_ln: nn.LayerNorm | None = None,
    ) -> None:
        super().__init__()
        self.vision_ln = vision_ln
        self.resampler = resampler
        self.projector = projector

    @property
    def num_image_tokens(self) -> int:
        """Tokens an image becomes (K)."""
        return self.resampler.latents.shape[0]

    def forward(self, patches: Tensor) -> Tensor:
        """Map patches (B, N, V) to image tokens (B, K, llm_dim).

        The patches arrive in the tower's dtype and are read in the connector's own, fp32.
        """
        patches = patches.to(self.resampler.proj_in.weight.dtype)
        if self.vision_ln is not None:
            patches = self.vision_ln(patches)
        return self.projector(self.resampler(patches))
