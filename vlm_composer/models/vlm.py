"""The vision-language model: images and packed token rows in, the answers' loss out.

Shape suffixes: N tokens of all samples, K tokens an image, I images, M image tokens, D LLM width, A
answer tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor, nn

from vlm_composer.models.connector import Connector
from vlm_composer.models.language_model import LanguageModel
from vlm_composer.models.packing import PackedRows
from vlm_composer.models.vision_tower import VisionTower


class AnswerLoss(NamedTuple):
    """Loss of the answer tokens of a batch.

    Attributes:
        total: Sum of their cross-entropies, in fp32.
        num_tokens: How many there are (A).
    """

    total: Tensor
    num_tokens: int


class AnswerLogits(NamedTuple):
    """Logits and targets of the answer tokens of a batch, in the order of the rows.

    Attributes:
        logits: (A, vocabulary).
        targets: (A,) token ids.
    """

    logits: Tensor
    targets: Tensor


class VisionLanguageModel(nn.Module):
    """Frozen vision tower, trainable connector, frozen language model.

    Args:
        vision_tower: Maps pixels (B, 3, S, S) to patches.
        connector: Maps patches to K tokens an image.
        language_model: Reads token embeddings.
        image_token_id: Id of the `<image_patch>` token, K of which stand for an image.

    Raises:
        ValueError: The id is not a row of the embedding table.
    """

    def __init__(
        self,
        vision_tower: VisionTower,
        connector: Connector,
        language_model: LanguageModel,
        image_token_id: int,
    ) -> None:
        super().__init__()
        if not 0 <= image_token_id < language_model.vocab_size:
            raise ValueError(
                f"image_token_id {image_token_id} is not a row of an embedding table of "
                f"{language_model.vocab_size} rows"
            )
        self.vision_tower = vision_tower
        self.connector = connector
        self.language_model = language_model
        self.image_token_id = image_token_id

    def forward(
        self, images: Tensor, rows: PackedRows, *, return_logits: bool = False
    ) -> AnswerLoss | AnswerLogits:
        """Predict the answers.

        Args:
            images: uint8 RGB (I, 3, S, S), one a sample, in the samples' order; or what the vision
                tower made of them before, (I, patches, vision width).
            rows: The samples' tokens and answers.
            return_logits: Return the logits, for metrics, in place of the loss.

        Returns:
            The loss, or logits and targets, of the A answer tokens. A may be 0.
        """
        image_tokens_IKD = self.image_tokens(images)
        inputs_embeds_ND = self.build_inputs_embeds(rows, image_tokens_IKD)
        hidden_AD = self.language_model.decode(inputs_embeds_ND, rows)
        if return_logits:
            return AnswerLogits(self.language_model.head(hidden_AD), rows.targets)
        total = self.language_model.head(hidden_AD, rows.targets)
        return AnswerLoss(total, len(rows.targets))

    def image_tokens(self, images: Tensor) -> Tensor:
        """Return the tokens (I, K, D) of images as `forward` takes them."""
        return self.connector(self.patches_of(images))

    def answer_losses(self, image_tokens_IKD: Tensor, rows: PackedRows) -> Tensor:
        """Return the cross-entropy of every answer token: (A,) in fp32, without a gradient.

        Args:
            image_tokens_IKD: What stands for the image of each sample, as `image_tokens` gives it.
            rows: The samples' tokens and answers.
        """
        inputs_embeds_ND = self.build_inputs_embeds(rows, image_tokens_IKD)
        hidden_AD = self.language_model.decode(inputs_embeds_ND, rows)
        return self.language_model.head(hidden_AD, rows.targets, each=True)

    def patches_of(self, images: Tensor) -> Tensor:
        """Return the vision tower's patches of pixels (I, 3, S, S); patches stay as they are.

        Patches that the tower made before (see `data.features`) need no second pass.

        Raises:
            ValueError: They are not as many or as wide as the tower's.
        """
        tower = self.vision_tower
        if images.ndim == 4:
            return tower(images)
        if images.shape[1:] != (tower.num_patches, tower.hidden_size):
            raise ValueError(
                f"patches of shape {tuple(images.shape)}: this vision tower makes "
                f"(images, {tower.num_patches}, {tower.hidden_size})"
            )
        return images

    def build_inputs_embeds(
        self,
        rows: PackedRows,
        image_tokens_IKD: Tensor,
        num_images: Sequence[int] | None = None,
    ) -> Tensor:
        """Embed the token ids and put image tokens where `<image_patch>` stands.

        Row k of an image's tokens goes to its k-th `<image_patch>` position.

        Args:
            rows: N tokens.
            image_tokens_IKD: (I, K, D), the images of sample 0 first.
            num_images: Images of each sample; one each when None.

        Returns:
            (N, D) in the dtype of the embedding table, differentiable in `image_tokens_IKD`.

        Raises:
            ValueError: A sample's number of `<image_patch>` tokens is not K times its images, or
                the samples' images are not I.
        """
        tokens_per_image = image_tokens_IKD.shape[1]
        images = [1] * len(rows.lengths) if num_images is None else list(num_images)
        for name, found, expected in zip(
            rows.sample_ids, rows.num_image_tokens, images, strict=True
        ):
            if found != tokens_per_image * expected:
                raise ValueError(
                    f"sample {name}: {found} <image_patch> tokens for {expected} image(s) of "
                    f"{tokens_per_image} tokens each; expected {tokens_per_image * expected}. Was "
                    "it tokenized for another num_latents, or cut by max_seq_len?"
                )
        if sum(images) != image_tokens_IKD.shape[0]:
            raise ValueError(
                f"{image_tokens_IKD.shape[0]} images were given for samples that name {sum(images)}"
            )
        inputs_embeds_ND = self.language_model.embed(rows.input_ids)
        image_tokens_MD = image_tokens_IKD.flatten(0, 1).to(inputs_embeds_ND.dtype)
        return inputs_embeds_ND.index_copy(0, rows.image_rows, image_tokens_MD)
