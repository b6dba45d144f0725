"""The vision-language model: images and token rows in, logits at the answer's positions out.

Shape suffixes: B rows, S image side, T text length, K tokens an image, I images, D LLM width,
A answer tokens in the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor, nn

from vlm_composer.models.connector import Connector
from vlm_composer.models.towers import LanguageModel, VisionTower

IGNORE_INDEX = -100
"""Label of a position that takes no loss, as everywhere in Hugging Face and torch."""


class AnswerLogits(NamedTuple):
    """Logits and targets of the answer tokens of a batch, in row order.

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
        self,
        pixel_values_I3SS: Tensor,
        input_ids_BT: Tensor,
        labels_BT: Tensor,
        sample_ids: Sequence[str] | None = None,
    ) -> AnswerLogits:
        """Predict the answers.

        Args:
            pixel_values_I3SS: uint8 RGB images (I, 3, S, S), one a row, in the order of the rows.
            input_ids_BT: Token ids (B, T), padded on the right.
            labels_BT: (B, T): the token id where a position belongs to an answer, -100 elsewhere.
            sample_ids: Names of the rows, for error messages.

        Returns:
            Logits and targets of the A answer tokens. A may be 0.
        """
        image_tokens_IKD = self.connector(self.vision_tower(pixel_values_I3SS))
        inputs_embeds_BTD = self.build_inputs_embeds(input_ids_BT, image_tokens_IKD, sample_ids)
        hidden_BTD = self.language_model.decode(inputs_embeds_BTD)
        # Position t predicts token t + 1. Only those hidden states that predict an answer token
        # meet the head: a (B, T, vocabulary) tensor is never made.
        predicts_answer_BT = nn.functional.pad(labels_BT[:, 1:], (0, 1), value=IGNORE_INDEX)
        rows_A = (predicts_answer_BT.flatten() != IGNORE_INDEX).nonzero().squeeze(1)
        hidden_AD = hidden_BTD.flatten(0, 1).index_select(0, rows_A)
        targets_A = predicts_answer_BT.flatten().index_select(0, rows_A)
        return AnswerLogits(self.language_model.head(hidden_AD), targets_A)

    def build_inputs_embeds(
        self,
        input_ids_BT: Tensor,
        image_tokens_IKD: Tensor,
        sample_ids: Sequence[str] | None = None,
        num_images: Sequence[int] | None = None,
    ) -> Tensor:
        """Embed the token ids and put image tokens where `<image_patch>` stands.

        Row k of an image's tokens goes to its k-th `<image_patch>` position.

        Args:
            input_ids_BT: Token ids (B, T).
            image_tokens_IKD: (I, K, D), the images of row 0 first.
            sample_ids: Names of the rows, for error messages; their indices when None.
            num_images: Images of each row; one each when None.

        Returns:
            (B, T, D) in the dtype of the embedding table, differentiable in `image_tokens_IKD`.

        Raises:
            ValueError: A row's number of `<image_patch>` tokens is not K times its images, or the
                rows' images are not I.
        """
        num_rows, tokens_per_image = input_ids_BT.shape[0], image_tokens_IKD.shape[1]
        images = [1] * num_rows if num_images is None else list(num_images)
        is_image_BT = input_ids_BT == self.image_token_id
        for row, (found, expected) in enumerate(
            zip(is_image_BT.sum(dim=1).tolist(), images, strict=True)
        ):
            if found != tokens_per_image * expected:
                name = sample_ids[row] if sample_ids is not None else f"row {row}"
                raise ValueError(
                    f"sample {name}: {found} <image_patch> tokens for {expected} image(s) of "
                    f"{tokens_per_image} tokens each; expected {tokens_per_image * expected}. Was "
                    "it tokenized for another num_latents, or cut by max_seq_len?"
                )
        if sum(images) != image_tokens_IKD.shape[0]:
            raise ValueError(
                f"{image_tokens_IKD.shape[0]} images were given for rows that name {sum(images)}"
            )
        inputs_embeds_BTD = self.language_model.embed(input_ids_BT)
        return inputs_embeds_BTD.masked_scatter(
            is_image_BT.unsqueeze(-1), image_tokens_IKD.to(inputs_embeds_BTD.dtype)
        )
