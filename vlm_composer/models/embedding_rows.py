"""Rows of an embedding table for tokens that it has none for.

An export holds a copy of this file: it imports torch and transformers alone.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel


def add_rows(model: PreTrainedModel, num_tokens: int) -> bool:
    """Make the table and the head of a language model large enough for `num_tokens` token ids.

    Returns:
        Whether rows had to be added. They hold the mean of the others.
    """
    table: Any = model.get_input_embeddings()
    old: int = table.weight.shape[0]
    if num_tokens <= old:
        return False
    model.resize_token_embeddings(num_tokens, mean_resizing=False)
    module: Any
    with torch.no_grad():
        for module in {model.get_input_embeddings(), model.get_output_embeddings()}:
            module.weight[old:] = module.weight[:old].float().mean(dim=0).to(module.weight.dtype)
    return True
