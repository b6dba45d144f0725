"""The decoder's last layer, cut to the rows whose output is read.

Shape suffixes: N tokens of all samples, A tokens that predict an answer, D width.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from vlm_composer.models.packing import PackedRows, take_rows
from vlm_composer.models.replacing import same_code


class AnswerLayer(nn.Module):
    """A last decoder layer that runs its feed-forward at answers only, as `LlamaDecoderLayer`.

    Its attention reads all tokens; of what comes behind, the loss needs the answers' rows, about a
    quarter. Called without `packing`, as in generation, it gives every row.

    Args:
        layer: The layer whose parts it takes, under their names.
    """

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.self_attn, self.mlp = layer.self_attn, layer.mlp
        self.input_layernorm = layer.input_layernorm
        self.post_attention_layernorm = layer.post_attention_layernorm
        self.attention_type: str | None = getattr(layer, "attention_type", None)

    def forward(
        self, hidden_1ND: Tensor, packing: PackedRows | None = None, **options: Any
    ) -> tuple[Tensor]:
        """Return (1, A, D), or (1, N, D) without packing."""
        attended_1ND, _ = self.self_attn(
            hidden_states=self.input_layernorm(hidden_1ND), packing=packing, **options
        )
        hidden = hidden_1ND + attended_1ND
        if packing is not None:
            hidden = take_rows(hidden[0], packing.answer_rows)[None]
        return (hidden + self.mlp(self.post_attention_layernorm(hidden)),)


def cut_last_layer(model: PreTrainedModel) -> bool:
    """Replace a decoder's last layer by an `AnswerLayer` where its code is Llama's.

    Returns:
        Whether it is one now.
    """
    layers = getattr(model.base_model, "layers", None)
    if not isinstance(layers, nn.ModuleList) or not layers:
        return False
    if isinstance(layers[-1], AnswerLayer):
        return True
    if not same_code(type(layers[-1]).forward, LlamaDecoderLayer.forward):
        return False
    layers[-1] = AnswerLayer(layers[-1])
    return True
