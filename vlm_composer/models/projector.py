"""MLP projector: from the resampler's width to the language model's."""

from __future__ import annotations

from torch import Tensor, nn


class MLPProjector(nn.Module):
    """Linear, GELU, Linear, with a hidden width of `mlp_ratio` times the language model's.

    Args:
        latent_dim: Width of the incoming tokens.
        llm_dim: Width of the language model's embeddings.
        mlp_ratio: Hidden width as a multiple of `llm_dim`.
    """

    def __init__(self, latent_dim: int, llm_dim: int, *, mlp_ratio: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(latent_dim, mlp_ratio * llm_dim)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(mlp_ratio * llm_dim, llm_dim)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens (…, latent_dim) to (…, llm_dim)."""
        return self.fc2(self.act(self.fc1(tokens)))
