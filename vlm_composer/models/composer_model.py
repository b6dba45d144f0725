"""The model as Composer's Trainer sees it: loss, metrics, operations a batch."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import torch
from composer.metrics.nlp import LanguageCrossEntropy, LanguagePerplexity, MaskedAccuracy
from composer.models import ComposerModel
from torch import Tensor
from torchmetrics import Metric

from vlm_composer.models.flops import training_flops
from vlm_composer.models.packing import num_answer_tokens, pack
from vlm_composer.models.vlm import AnswerLogits, AnswerLoss, VisionLanguageModel

Batch = Mapping[str, Any]
"""As `data.collate.collate` makes it: `pixel_values` uint8 (B, 3, S, S), or the vision tower's
`patches` (B, N, V), on the device; `input_ids` and `labels`, B arrays (T_i,) on the host; `ids`, B
names."""


class ComposerVLM(ComposerModel):
    """A `VisionLanguageModel` for Composer.

    The whole model is one child: Composer makes every direct child of a ComposerModel an FSDP root,
    and the parts of this one call each other.

    Args:
        model: The model to train.
        cache_prompts: Leave prompts that precede an image out of the rows; see `PromptCache`.
        autocast_dtype: Run under autocast of this dtype. Only for CPU, where Composer refuses its
            own `amp_bf16`; on a GPU the Trainer's precision does it.

    Raises:
        ValueError: Prompts are to be cached for a language model for which that is not exact.
    """

    def __init__(
        self,
        model: VisionLanguageModel,
        *,
        cache_prompts: bool = False,
        autocast_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        levers = model.language_model.levers
        if cache_prompts and not (levers and levers.caches_prompts):
            reason = "; ".join(levers.refused if levers else ()) or "its attention is its own"
            raise ValueError(
                f"cache_prompts: true does not work with "
                f"{type(model.language_model.model).__name__} ({reason}); set it to false"
            )
        self.cache_prompts = cache_prompts
        self.model = model
        self.autocast_dtype = autocast_dtype

    def forward(self, batch: Batch) -> AnswerLoss:
        """Return the loss of the answer tokens of `batch`."""
        return self._run(batch)

    def loss(self, outputs: AnswerLoss, batch: Batch) -> Tensor:
        """Mean cross-entropy over the answer tokens of a micro-batch; 0 where it has none.

        The Trainer weighs micro-batches and ranks by their answer tokens
        (`accumulate_train_batch_on_tokens`), so that the gradient is that of the mean over all
        answer tokens of the global batch however it is cut.
        """
        del batch
        return outputs.total / max(outputs.num_tokens, 1)

    def eval_forward(self, batch: Batch, outputs: AnswerLogits | None = None) -> AnswerLogits:
        """Return logits and targets of the answer tokens of `batch`."""
        return self._run(batch, return_logits=True) if outputs is None else outputs

    def _run(self, batch: Batch, **options: Any) -> Any:
        images = batch["patches"] if "patches" in batch else batch["pixel_values"]
        rows = pack(
            [torch.from_numpy(ids) for ids in batch["input_ids"]],
            [torch.from_numpy(labels) for labels in batch["labels"]],
            image_token_id=self.model.image_token_id,
            device=images.device,
            sample_ids=batch["ids"],
            split_prompts=self.cache_prompts,
        )
        with self.autocast():
            return self.model(images, rows, **options)

    def get_metrics(self, is_train: bool) -> dict[str, Metric]:
        """Loss, perplexity and token accuracy over answer tokens, for evaluation only."""
        if is_train:
            return {}
        return {
            "LanguageCrossEntropy": LanguageCrossEntropy(),
            "LanguagePerplexity": LanguagePerplexity(),
            "TokenAccuracy": MaskedAccuracy(),
        }

    def update_metric(self, batch: Any, outputs: AnswerLogits, metric: Metric) -> None:
        """Add a batch to a metric; a batch without answer tokens adds nothing."""
        del batch
        if outputs.targets.numel():
            metric.update(outputs.logits.float(), outputs.targets)

    def flops_per_batch(self, batch: Batch) -> float:
        """Operations of a training step on `batch`, for Composer's SpeedMonitor."""
        lengths = [len(ids) for ids in batch["input_ids"]]
        flops = training_flops(self.model, lengths, num_answer_tokens(batch["labels"]))
        # A tower that is not run is not counted.
        return flops.total - (flops.vision_tower if "patches" in batch else 0)

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """The model's own autocast; nothing where the Trainer's precision does it."""
        if self.autocast_dtype is None:
            return contextlib.nullcontext()
        return torch.autocast("cpu", dtype=self.autocast_dtype)
