"""The frozen language model: any causal one of Hugging Face, as table, decoder and head.

Shape suffixes: N tokens of all samples, D width, A tokens that predict an answer.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from vlm_composer.models.answer_head import AnswerHead
from vlm_composer.models.answer_layer import cut_last_layer
from vlm_composer.models.embedding_rows import add_rows
from vlm_composer.models.frozen import ArchitectureError, Frozen, in_own_dtype
from vlm_composer.models.packed_attention import PACKED_ATTENTION, can_pack
from vlm_composer.models.packing import PackedRows, take_rows
from vlm_composer.models.prompt_cache import Layers, PromptCache


class LanguageModel(Frozen):
    """A frozen causal language model, split into embedding table, decoder and head.

    Args:
        model: A Hugging Face causal language model.

    Raises:
        ArchitectureError: The model scales or caps its logits, which would be left out.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        for attribute in ("final_logit_softcapping", "logit_scale", "logits_scaling"):
            if (value := getattr(model.config, attribute, None)) not in (None, 1, 1.0):
                raise ArchitectureError(
                    f"it changes its logits after its head ({attribute} = {value})"
                )
        self.model: Any = model  # torch types every attribute of a module as a tensor or a module
        self._own_attention: str = model.config._attn_implementation
        # A model whose attention cannot be replaced reads a padded view, right and slower.
        self.packs = can_pack(model)
        self._prompts = PromptCache(self._read_prompt)
        self._cuts_last_layer = self.packs and cut_last_layer(model)
        self._install()

    @property
    def hidden_size(self) -> int:
        """Width of the embeddings (D)."""
        return self.model.config.hidden_size

    @property
    def decoder(self) -> Any:
        """The model without its head."""
        base = self.model.base_model
        # Gemma 3's and Llama 4's have another name than their classes say.
        return self.model.get_decoder() if base is self.model else base

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding table."""
        return self.model.get_input_embeddings().weight.shape[0]

    def embed(self, input_ids: Tensor) -> Tensor:
        """Look up token ids (N,) in the model's own table: (N, D)."""
        return self.model.get_input_embeddings()(input_ids)

    def decode(self, inputs_embeds_ND: Tensor, rows: PackedRows) -> Tensor:
        """Run the decoder over packed rows (N, D).

        Each sample is read as if it stood alone.

        Returns:
            The last hidden states (A, D) of the rows that predict an answer.
        """
        with in_own_dtype(inputs_embeds_ND):
            if not self.packs:
                padded = self._decode(rows.pad(inputs_embeds_ND))
                return take_rows(rows.unpad(padded), rows.answer_rows)
            hidden = self._decode(
                inputs_embeds_ND[None],
                position_ids=rows.position_ids[None],
                packing=rows,
                prompts=self._prompts.rows(rows.prompts),
            )[0]
        # A last layer that is an AnswerLayer gives no other rows.
        return hidden if self._cuts_last_layer else take_rows(hidden, rows.answer_rows)

    def _decode(self, inputs_embeds: Tensor, **options: Any) -> Tensor:
        # With a cache, transformers 4.53 forgets where packed samples end.
        return self.decoder(
            inputs_embeds=inputs_embeds, use_cache=False, **options
        ).last_hidden_state

    def head(
        self, hidden_AD: Tensor, targets_A: Tensor | None = None, *, each: bool = False
    ) -> Tensor:
        """Map hidden states (A, D) to logits (A, vocabulary), or, given targets, to their loss.

        Two dimensions only: a bf16 linear over a 3-D slice is a hundred times slower on a CPU.
        `each` gives a loss for each row, without a gradient, see `AnswerHead`.
        """
        with in_own_dtype(hidden_AD):
            return self.model.get_output_embeddings()(hidden_AD, targets_A, each=each)

    def generate(self, **options: Any) -> Tensor:
        """Call the Hugging Face model's `generate`, with the attention that it was loaded with."""
        with self._attention(self._own_attention):
            return self.model.generate(**options)

    def ensure_rows(self, num_tokens: int) -> bool:
        """Make the table large enough for `num_tokens` token ids.

        Args:
            num_tokens: Size of the tokenizer with its added tokens.

        Returns:
            Whether rows had to be added. New rows are frozen and hold the mean of the others.
        """
        if not add_rows(self.model, num_tokens):
            return False
        self._install()
        return True

    def _install(self) -> None:
        if self.packs:
            self.model.config._attn_implementation = PACKED_ATTENTION
        self.model.set_output_embeddings(AnswerHead(self.model.get_output_embeddings()))
        self.freeze()

    def _read_prompt(self, prompt: tuple[int, ...]) -> Layers:
        with self._attention(self._own_attention):
            device = self.model.get_input_embeddings().weight.device
            ids = torch.tensor([prompt], device=device)
            cache = self.decoder(input_ids=ids, use_cache=True).past_key_values
        return [
            (keys[0].transpose(0, 1), values[0].transpose(0, 1))
            for keys, values in zip(cache.key_cache, cache.value_cache, strict=True)
        ]

    @contextlib.contextmanager
    def _attention(self, name: str) -> Iterator[None]:
        config = self.model.config
        before, config._attn_implementation = config._attn_implementation, name
        try:
            yield
        finally:
            config._attn_implementation = before
