"""What leaves the connector: its size beside the language model's own embeddings, and whether it
differs from image to image.

Shape suffixes: I images of this rank, K tokens an image, D LLM width.
"""

from __future__ import annotations

from typing import Any

import torch
from composer.utils import dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from vlm_composer.models.language_model import LanguageModel

DEAD_BELOW = 0.01
"""A latent is dead where its output for an image lies closer to its mean over all images than this
share of its norm."""


def mean_embedding_norm(model: LanguageModel) -> float:
    """Mean norm of the rows of the embedding table; all ranks must call this."""
    weight: Any = model.model.get_input_embeddings().weight
    rows = weight.to_local() if isinstance(weight, DTensor) else weight.detach()
    norms = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float32).double()
    # Copies of a shard, or of the table, count as often on both sides.
    total, count = _over_ranks(norms.sum(), norms.new_tensor(len(norms)))
    return (total / count).item()


def describe(tokens_IKD: Tensor, num_images: int, embedding_norm: float) -> dict[str, float]:
    """Describe what the connector makes of some images; all ranks must call this.

    Args:
        tokens_IKD: Those of this rank's images, of which there may be none.
        num_images: Images of all ranks.
        embedding_norm: As `mean_embedding_norm` gives it.

    Returns:
        - `output_norm_ratio`: mean norm of a token / `embedding_norm`.
        - `output_spread`: mean distance of the images' mean tokens from their common mean / mean
          norm of the images' mean tokens; 0 where every image is the same.
        - `latent_spread`: share of the latents whose output differs between images, see
          `DEAD_BELOW`.
    """
    tokens_IKD = tokens_IKD.float()
    sum_KD, norms_K = _over_ranks(tokens_IKD.sum(0), tokens_IKD.norm(dim=2).sum(0))
    mean_KD = sum_KD / num_images
    images_ID = tokens_IKD.mean(1)
    distances_K, distance, norm = _over_ranks(
        (tokens_IKD - mean_KD).norm(dim=2).sum(0),
        (images_ID - mean_KD.mean(0)).norm(dim=1).sum(),
        images_ID.norm(dim=1).sum(),
    )
    differs_K = distances_K > DEAD_BELOW * norms_K
    return {
        "output_norm_ratio": norms_K.mean().item() / num_images / embedding_norm,
        "output_spread": (distance / norm).item() if norm > 0 else 0.0,
        "latent_spread": differs_K.float().mean().item(),
    }


def _over_ranks(*sums: Tensor) -> list[Tensor]:
    """Add tensors up over the ranks, in one exchange."""
    flat = torch.cat([part.double().flatten() for part in sums])
    dist.all_reduce(flat, reduce_operation="SUM")
    parts = flat.split([part.numel() for part in sums])
    return [part.view(like.shape) for part, like in zip(parts, sums, strict=True)]
