"""The frozen towers: any Hugging Face vision model and causal language model.

`VisionTower` and `LanguageModel` give them two small interfaces that the rest of the project uses,
and keep them frozen, in eval mode and free of what is never run (pooling heads, layers above the
chosen one). `tower_loading` makes the models that they take.

Shape suffixes: B images, S image side, N patches or, in the language model, tokens of all samples,
V vision width, D LLM width, A answer tokens.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from vlm_composer.models.answer_head import AnswerHead
from vlm_composer.models.answer_layer import cut_last_layer
from vlm_composer.models.packed_attention import PACKED_ATTENTION, can_pack
from vlm_composer.models.packing import PackedRows, take_rows
from vlm_composer.models.prompt_cache import Layers, PromptCache


class _Frozen(nn.Module):
    """A module without gradients that stays in eval mode whatever its parent does."""

    def freeze(self) -> None:
        self.requires_grad_(False)
        self.train(False)

    def train(self, mode: bool = True) -> _Frozen:
        del mode
        super().train(False)
        return self


def _in_own_dtype(weight: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Switch autocast off where the weights are stored in low precision already.

    Autocast would run the norms of a bf16 tower in fp32 and hand fp32 activations from layer to
    layer.
    """
    if weight.dtype == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(weight.device.type, enabled=False)


class VisionTower(_Frozen):
    """Patches of one layer of a frozen vision transformer.

    Args:
        model: A Hugging Face vision model whose forward takes `pixel_values` (B, 3, S, S).
        layer: Whose output to take. -1 is the model's last hidden state, after its final norm. Any
            other index is that of Hugging Face's `hidden_states` (0 the embeddings, k the output of
            the k-th layer, negative from the end, so -2 is the last layer but one), before the
            final norm, as LLaVA's `vision_feature_layer`. Layers above it are removed.
        image_size: Side S in pixels; None takes the model's own.
        image_mean: Mean of each channel, for pixels in [0, 1].
        image_std: Standard deviation of each channel, for pixels in [0, 1].

    Raises:
        ValueError: The layer does not exist, or the model has no stack of layers or final norm that
            could be cut.
    """

    image_mean: Tensor
    image_std: Tensor

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        layer: int = -1,
        image_size: int | None = None,
        image_mean: Sequence[float] = (0.5, 0.5, 0.5),
        image_std: Sequence[float] = (0.5, 0.5, 0.5),
    ) -> None:
        super().__init__()
        self.model: Any = model  # torch types every attribute of a module as a tensor or a module
        config = model.config
        self.image_size: int = image_size or config.image_size
        if self.image_size < config.patch_size:
            raise ValueError(
                f"image_size {self.image_size} is less than one patch of {config.patch_size} pixels"
            )
        self.num_patches: int = (self.image_size // config.patch_size) ** 2
        self.hidden_size: int = config.hidden_size
        self._resized = self.image_size != config.image_size
        _drop_pooling(model)
        if layer != -1:
            _keep_layers(model, layer)
        # fp32 whatever the tower's dtype: pixels are normalised before they are cast.
        self.register_buffer("image_mean", torch.tensor(image_mean).view(3, 1, 1), persistent=False)
        self.register_buffer("image_std", torch.tensor(image_std).view(3, 1, 1), persistent=False)
        self.freeze()

    def forward(self, pixel_values_B3SS: Tensor) -> Tensor:
        """Return patches (B, N, V) of uint8 RGB pixels (B, 3, S, S), in the tower's dtype.

        Raises:
            ValueError: The images are not of the tower's size, or the model gives fewer tokens than
                the image has patches.
        """
        if pixel_values_B3SS.shape[1:] != (3, self.image_size, self.image_size):
            raise ValueError(
                f"pixel_values of shape {tuple(pixel_values_B3SS.shape)}: this tower takes "
                f"(B, 3, {self.image_size}, {self.image_size})"
            )
        with torch.inference_mode():
            patches_BNV = self._patches(pixel_values_B3SS)
        return patches_BNV.clone()  # autograd takes no tensor of inference mode

    def _patches(self, pixel_values_B3SS: Tensor) -> Tensor:
        weight = next(self.model.parameters())
        normalised = (pixel_values_B3SS.float() / 255 - self.image_mean) / self.image_std
        # DINOv2 always interpolates its positions to the image; SigLIP, CLIP and ViT must be asked
        # to.
        resize = {"interpolate_pos_encoding": True} if self._resized and self._must_ask() else {}
        with _in_own_dtype(weight):
            hidden = self.model(normalised.to(weight.dtype), **resize).last_hidden_state
        num_prefix = hidden.shape[1] - self.num_patches  # class and register tokens come first
        if num_prefix < 0:
            raise ValueError(
                f"{type(self.model).__name__} gave {hidden.shape[1]} tokens for {self.num_patches} "
                "patches: a model that pools its patches cannot be used"
            )
        return hidden[:, num_prefix:]

    def _must_ask(self) -> bool:
        return not self.model.config.model_type.startswith("dinov2")


def _drop_pooling(model: nn.Module) -> None:
    """Remove the head of SigLIP or the pooler of ViT, which make one vector of the patches."""
    module: Any
    for module in list(model.modules()):
        if getattr(module, "use_head", False):
            module.use_head = False
            del module.head
        if isinstance(getattr(module, "pooler", None), nn.Module):
            module.pooler = None


def _keep_layers(model: PreTrainedModel, layer: int) -> None:
    """Cut the stack so that `last_hidden_state` is `hidden_states[layer]` of the whole model."""
    depth: int = model.config.num_hidden_layers
    keep = layer if layer >= 0 else depth + 1 + layer
    if not 0 <= keep <= depth:
        raise ValueError(
            f"layer {layer}: a model of {depth} layers has hidden states {-depth - 1} to {depth}"
        )
    stacks = [
        (module, name)
        for module in model.modules()
        for name, child in module.named_children()
        if isinstance(child, nn.ModuleList) and len(child) == depth
    ]
    norms = [
        (module, name)
        for module in model.modules()
        for name, child in module.named_children()
        if name in ("post_layernorm", "layernorm")
        and any(n == "encoder" for n, _ in module.named_children())
    ]
    if len(stacks) != 1 or len(norms) != 1:
        raise ValueError(
            f"layer {layer}: cannot cut {type(model).__name__}: found {len(stacks)} stacks of "
            f"{depth} layers and {len(norms)} final norms, need one of each; use layer -1"
        )
    (parent, name), (norm_parent, norm_name) = stacks[0], norms[0]
    setattr(parent, name, getattr(parent, name)[:keep])
    setattr(norm_parent, norm_name, nn.Identity())
    model.config.num_hidden_layers = keep


class LanguageModel(_Frozen):
    """A frozen causal language model, split into embedding table, decoder and head.

    Args:
        model: A Hugging Face causal language model.

    Raises:
        ValueError: The model scales or caps its logits after the head, which would be left out.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        for attribute in ("final_logit_softcapping", "logit_scale", "logits_scaling"):
            if (value := getattr(model.config, attribute, None)) not in (None, 1, 1.0):
                raise ValueError(
                    f"{type(model).__name__} changes its logits after the head "
                    f"({attribute} = {value}); such a language model is not supported"
                )
        self.model: Any = model  # as above
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
        with _in_own_dtype(inputs_embeds_ND):
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
        return self.model.base_model(
            inputs_embeds=inputs_embeds, use_cache=False, **options
        ).last_hidden_state

    def head(self, hidden_AD: Tensor, targets_A: Tensor | None = None) -> Tensor:
        """Map hidden states (A, D) to logits (A, vocabulary), or, given targets, to their loss.

        Two dimensions only: a bf16 linear over a 3-D slice is a hundred times slower on a CPU.
        """
        with _in_own_dtype(hidden_AD):
            return self.model.get_output_embeddings()(hidden_AD, targets_A)

    def generate(self, **options: Any) -> Tensor:
        """Call the Hugging Face model's `generate`, with torch's own attention."""
        with self._attention("sdpa"):
            return self.model.generate(**options)

    def ensure_rows(self, num_tokens: int) -> bool:
        """Make the table large enough for `num_tokens` token ids.

        Args:
            num_tokens: Size of the tokenizer with its added tokens.

        Returns:
            Whether rows had to be added. New rows are frozen and hold the mean of the others.
        """
        old = self.vocab_size
        if num_tokens <= old:
            return False
        self.model.resize_token_embeddings(num_tokens, mean_resizing=False)
        with torch.no_grad():
            for module in {self.model.get_input_embeddings(), self.model.get_output_embeddings()}:
                module.weight[old:] = (
                    module.weight[:old].float().mean(dim=0).to(module.weight.dtype)
                )
        self._install()
        return True

    def _install(self) -> None:
        if self.packs:
            self.model.config._attn_implementation = PACKED_ATTENTION
        self.model.set_output_embeddings(AnswerHead.of(self.model.get_output_embeddings()))
        self.freeze()

    def _read_prompt(self, prompt: tuple[int, ...]) -> Layers:
        with self._attention("sdpa"):
            device = self.model.get_input_embeddings().weight.device
            ids = torch.tensor([prompt], device=device)
            cache = self.model.base_model(input_ids=ids, use_cache=True).past_key_values
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
