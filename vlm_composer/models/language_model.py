"""The frozen language model: any causal one of Hugging Face, as table, decoder and head.

Shape suffixes: N tokens of all samples, D width, A tokens that predict an answer.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from vlm_composer.models.answer_head import AnswerHead
from vlm_composer.models.answer_layer import cut_last_layer
from vlm_composer.models.embedding_rows import add_rows
from vlm_composer.models.frozen import ArchitectureError, Frozen, decoder_of, in_own_dtype
from vlm_composer.models.frozen_blocks import compile_blocks
from vlm_composer.models.packed_attention import PACKED_ATTENTION, attention
from vlm_composer.models.packing import PackedRows, take_rows
from vlm_composer.models.prompt_cache import Layers, PromptCache, read_prompt
from vlm_composer.models.self_check import Levers, check_levers

log = logging.getLogger(__name__)


class LanguageModel(Frozen):
    """A frozen causal language model, split into embedding table, decoder and head.

    Args:
        model: A Hugging Face causal language model.
        install: Check the model and install its levers. Otherwise `install` must be called before
            it is run, with what was found for the same weights: on a rank that does not have them.

    Raises:
        ArchitectureError: The model scales or caps its logits, which would be left out.
        ValueError: It is not causal.
    """

    def __init__(self, model: PreTrainedModel, *, install: bool = True) -> None:
        super().__init__()
        for attribute in ("final_logit_softcapping", "logit_scale", "logits_scaling"):
            if (value := getattr(model.config, attribute, None)) not in (None, 1, 1.0):
                raise ArchitectureError(
                    f"it changes its logits after its head ({attribute} = {value})"
                )
        self.model: Any = model  # torch types every attribute of a module as a tensor or a module
        self.packs = self._cuts_last_layer = False
        self._attention: str = model.config._attn_implementation
        self._prompts = PromptCache(self._read_prompt)
        self.levers: Levers | None = None
        if install:
            self.install(check_levers(model))
        self.freeze()

    def install(self, levers: Levers) -> None:
        """Put in place what makes the model fast, once, before it is run.

        Args:
            levers: As `check_levers` found them for these weights.
        """
        self.levers = levers
        self._attention = levers.attention
        self.packs = levers.packs  # else the model reads a padded view, right and slower
        self._cuts_last_layer = levers.cuts_last_layer and cut_last_layer(self.model)
        chosen = PACKED_ATTENTION if self.packs else self._attention
        self.model.config._attn_implementation = chosen
        self._replace_head()
        blocks = compile_blocks(self.model) if levers.compiles_blocks else []
        log.info(
            "Language model: %s, %s, %s.",
            "packed rows" if self.packs else "padded rows",
            "last layer cut to answers" if self._cuts_last_layer else "last layer whole",
            f"compiled {', '.join(blocks)}" if blocks else "no block compiled",
        )
        for problem in levers.refused:
            log.warning("Not used for %s: %s.", type(self.model).__name__, problem)

    @property
    def hidden_size(self) -> int:
        """Width of the embeddings (D)."""
        return self.model.config.hidden_size

    @property
    def decoder(self) -> Any:
        """The model without its head."""
        return decoder_of(self.model)

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
        """Call the Hugging Face model's `generate`, with its own attention."""
        with attention(self.model.config, self._attention):
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
        if self.levers is not None:
            self._replace_head()
        self.freeze()
        return True

    def _replace_head(self) -> None:
        self.model.set_output_embeddings(AnswerHead(self.model.get_output_embeddings()))
        self.freeze()

    def _read_prompt(self, prompt: tuple[int, ...]) -> Layers:
        ids = torch.tensor(prompt, device=self.model.get_input_embeddings().weight.device)
        with attention(self.model.config, self._attention):
            return read_prompt(self.decoder, self.embed(ids))
