"""Perceiver resampler: a fixed number of learned latents read a grid of image patches.

Shape suffixes: B images, N patches, K latents, V vision width, D latent width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ResamplerLayer(nn.Module):
    """One pre-norm block: the latents attend to the patches, then a feed-forward of width 4 D.

    Args:
        latent_dim: Width D of latents and of projected patches.
        num_heads: Attention heads; D is divided among them.
    """

    def __init__(self, latent_dim: int, num_heads: int) -> None:
        super().__init__()
        self.ln1 = nn.LayerNorm(latent_dim)
        self.attn = nn.MultiheadAttention(latent_dim, num_heads, batch_first=True)
        self.ln2 = nn.LayerNorm(latent_dim)
        self.ff = nn.Sequential(
            nn.Linear(latent_dim, 4 * latent_dim),
            nn.GELU(),
            nn.Linear(4 * latent_dim, latent_dim),
        )

    def forward(self, latents_BKD: Tensor, patches_BND: Tensor) -> Tensor:
        """Return the latents (B, K, D) after reading `patches_BND` (B, N, D)."""
        attended_BKD, _ = self.attn(
            self.ln1(latents_BKD), patches_BND, patches_BND, need_weights=False
        )
        latents_BKD = latents_BKD + attended_BKD
        return latents_BKD + self.ff(self.ln2(latents_BKD))


class PerceiverResampler(nn.Module):
    """Compress any number of patches into `num_latents` tokens.

    After the Perceiver Resampler of Flamingo (Alayrac et al., 2022), with the layout of the stage-1
    specification: one projection of the patches, shared by all layers, whose keys and values are
        the
    patches alone.

    Args:
        vision_dim: Width V of the incoming patches.
        num_latents: Number K of learned latents, that is of tokens an image.
        depth: Number of layers.
        num_heads: Attention heads a layer.
        head_dim: Width of a head; the latent width D is `num_heads * head_dim`.
    """

    def __init__(
        self,
        vision_dim: int,
        *,
        num_latents: int,
        depth: int,
        num_heads: int,
        head_dim: int,
    ) -> None:
        super().__init__()
        self.latent_dim = num_heads * head_dim
        self.proj_in = nn.Linear(vision_dim, self.latent_dim)
        self.latents = nn.Parameter(torch.randn(num_latents, self.latent_dim) * 0.02)
        self.layers = nn.ModuleList(
            ResamplerLayer(self.latent_dim, num_heads) for _ in range(depth)
        )

    def forward(self, patches_BNV: Tensor) -> Tensor:
        """Map patches (B, N, V) to latents (B, K, D)."""
        patches_BND = self.proj_in(patches_BNV)
        latents_BKD = self.latents.expand(patches_BND.shape[0], -1, -1)
        for layer in self.layers:
            latents_BKD = layer(latents_BKD, patches_BND)
        return latents_BKD
