"""Whether the language model sees: what the right image is worth to it, and which caption it takes
for an image's own.

Shape suffixes: I images, K tokens an image, D LLM width, A answer tokens, Q questions.
"""

from __future__ import annotations

import itertools
import logging
import math
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple, TypeVar

import torch
from composer.core import State
from composer.loggers import Logger
from composer.utils import dist
from torch import Tensor

from vlm_composer.data.by_index import CaptionsByIndex
from vlm_composer.data.encoder import BatchEncoder
from vlm_composer.evaluation.at_evaluation import AtEvaluation, evenly_chosen, my_share
from vlm_composer.evaluation.connector_output import describe, mean_embedding_norm
from vlm_composer.models.composer_model import ComposerVLM
from vlm_composer.models.packing import IGNORE_INDEX, pack
from vlm_composer.models.vision_tower import VisionTower
from vlm_composer.ranks import on_every_rank

log = logging.getLogger(__name__)

T = TypeVar("T")


class Text(NamedTuple):
    """Token ids of a sample, before and from its answer."""

    prompt: Tensor
    answer: Tensor


class Question(NamedTuple):
    """How likely is this answer to the prompt of `sample`, with this image? All are places in the
    subset; the image behind the last one is the blank."""

    image: int
    sample: int
    answer: int


class Evidence(AtEvaluation):
    """Log what images are worth, on a fixed subset of the evaluation set, at each evaluation.

    The subset is chosen evenly over the set: it is the same at every evaluation, on any number of
    ranks, after every restart. For each sample its answer's loss is taken with its own image, with
    that of the sample half the subset away, and with a blank one; and its caption is compared with
    those of others for the same image and prompt. Everything comes from one pass of each image
    through vision tower and connector.

    - `evidence/loss_right`, `…_wrong`, `…_blank`: nats an answer token; `evidence/perplexity_…`.
      The blank image is grey: each channel at the mean that the tower normalises with. Where the
      data hold patches in place of images, those of the blank are made by the tower.
    - `evidence/gap_wrong`, `evidence/gap_blank`: what is lost without the right image.
    - `evidence/retrieval_accuracy`: share of images whose own caption is the likeliest of
      `num_choices` different ones, by log-likelihood a token; a tie counts as right.
      `evidence/retrieval_chance` is that of guessing: 1 / `num_choices`, or more where the subset
      has not so many captions.
    - `evidence/output_…`, `evidence/latent_spread`: see `connector_output`.
    - `evidence/seconds`: what all this took.

    The ranks share the work, and what they find is added up: the figures are those of one process.

    Args:
        data: The evaluation set.
        encoder: What makes batches of it.
        batch_size: Samples a forward pass sees on one rank.
        num_samples: Of the subset; all where there are fewer.
        num_choices: Captions to choose from.

    Raises:
        ValueError: The evaluation set has fewer than two samples.
    """

    def __init__(
        self,
        data: CaptionsByIndex,
        encoder: BatchEncoder,
        *,
        batch_size: int,
        num_samples: int,
        num_choices: int,
    ) -> None:
        if len(data) < 2:
            raise ValueError(
                f"callbacks.evidence: the evaluation set has {len(data)} sample(s), and no other "
                "one's image to compare with; set callbacks.evidence: null"
            )
        self._data = data
        self._encoder = encoder
        self._batch_size = batch_size
        self._num_choices = num_choices
        self._indices = evenly_chosen(num_samples, len(data))
        self._share = my_share(len(self._indices))
        self._texts: list[Text] = []
        self._images: list[Tensor] = []
        self._choices: list[list[int]] = []
        self._embedding_norm: float | None = None

    def look(self, state: State, logger: Logger, model: ComposerVLM) -> None:
        """Compute and log the figures."""
        start = time.perf_counter()
        if not self._texts:
            self._texts, self._images = on_every_rank(self._read)
            self._choices = choose_captions([t.answer for t in self._texts], self._num_choices)
        if self._embedding_norm is None:
            self._embedding_norm = mean_embedding_norm(model.model.language_model)
        own_IKD = self._own_image_tokens(state, model)
        counts_I = torch.tensor([counts for _, counts in self._share], device=own_IKD.device)
        figures = describe(own_IKD[counts_I], len(self._texts), self._embedding_norm)
        tokens_IKD = self._all_image_tokens(own_IKD, state, model)
        figures = self._compare(tokens_IKD, state, model) | figures
        figures["seconds"] = time.perf_counter() - start
        logger.log_metrics({f"evidence/{name}": value for name, value in figures.items()})
        log.info(
            "Evidence: loss %.3f with the right image, %.3f with another's, %.3f with a blank one; "
            "the own caption is the likeliest for %.0f %% of %d images (chance %.0f %%). %.1f s.",
            figures["loss_right"],
            figures["loss_wrong"],
            figures["loss_blank"],
            100 * figures["retrieval_accuracy"],
            len(self._texts),
            100 * figures["retrieval_chance"],
            figures["seconds"],
        )

    def _read(self) -> tuple[list[Text], list[Tensor]]:
        """Read every text of the subset, and the images of this rank's share."""
        mine = [place for place, _ in self._share]
        texts, images = [], {}
        for place, index in enumerate(self._indices):
            record = self._data[index]
            (text,) = self._encoder.texts([record])
            start = text.labels.count(IGNORE_INDEX)  # all of the prompt, none of the answer
            input_ids = torch.tensor(text.input_ids)
            texts.append(Text(input_ids[:start], input_ids[start:]))
            if place in mine:
                images[place] = self._encoder.image(record)
        return texts, [images[place] for place in mine]

    def _own_image_tokens(self, state: State, model: ComposerVLM) -> Tensor:
        batches = [
            model.model.image_tokens(state.device.tensor_to_device(torch.stack(list(images))))
            for images in _batched(self._images, self._batch_size)
        ]
        return torch.cat(batches)

    def _all_image_tokens(self, own_IKD: Tensor, state: State, model: ComposerVLM) -> Tensor:
        """Gather the ranks' image tokens, as the language model reads them; the blank is last."""
        vlm = model.model
        blank_1KD = vlm.image_tokens(state.device.tensor_to_device(blank_image(vlm.vision_tower)))
        dtype = vlm.language_model.model.get_input_embeddings().weight.dtype
        # As bytes, which every backend can send.
        gathered = dist.all_gather(own_IKD.to(dtype).contiguous().view(torch.uint8))
        ranks = [part.view(dtype) for part in gathered]
        all_IKD = torch.stack(ranks, dim=1).flatten(0, 1)[: len(self._texts)]
        return torch.cat([all_IKD, blank_1KD.to(dtype)])

    def _compare(self, tokens_IKD: Tensor, state: State, model: ComposerVLM) -> dict[str, float]:
        """Ask every question and compare the answers' losses."""
        count = len(self._texts)
        asked = {
            "right": [Question(i, i, i) for i in range(count)],
            "wrong": [Question((i + count // 2) % count, i, i) for i in range(count)],
            "blank": [Question(count, i, i) for i in range(count)],
            "other": [Question(i, i, c) for i, others in enumerate(self._choices) for c in others],
        }
        losses_Q = self._losses(list(itertools.chain(*asked.values())), tokens_IKD, state, model)
        losses = dict(zip(asked, losses_Q.split([len(q) for q in asked.values()]), strict=True))
        num_tokens = sum(len(text.answer) for text in self._texts)
        figures = {}
        for kind in ("right", "wrong", "blank"):
            figures[f"loss_{kind}"] = losses[kind].sum().item() / num_tokens
            figures[f"perplexity_{kind}"] = math.exp(min(figures[f"loss_{kind}"], 700))
        for kind in ("wrong", "blank"):
            figures[f"gap_{kind}"] = figures[f"loss_{kind}"] - figures["loss_right"]
        others = iter(losses["other"].tolist())
        found, chance = 0, 0.0
        for text, loss, choices in zip(
            self._texts, losses["right"].tolist(), self._choices, strict=True
        ):
            best = min(
                (next(others) / len(self._texts[c].answer) for c in choices), default=math.inf
            )
            found += loss / len(text.answer) <= best
            chance += 1 / (1 + len(choices))
        return figures | {
            "retrieval_accuracy": found / count,
            "retrieval_chance": chance / count,
        }

    def _losses(
        self, questions: Sequence[Question], tokens_IKD: Tensor, state: State, model: ComposerVLM
    ) -> Tensor:
        """Return the summed loss of each question's answer (Q,), on every rank."""
        total_Q = torch.zeros(len(questions), dtype=torch.float64)
        for batch in _batched(my_share(len(questions)), self._batch_size):
            asked = [questions[place] for place, _ in batch]
            prompts = [self._texts[question.sample].prompt for question in asked]
            answers = [self._texts[question.answer].answer for question in asked]
            unasked = [torch.full_like(prompt, IGNORE_INDEX) for prompt in prompts]
            rows = pack(
                [torch.cat(pair) for pair in zip(prompts, answers, strict=True)],
                [torch.cat(pair) for pair in zip(unasked, answers, strict=True)],
                image_token_id=model.model.image_token_id,
                device=tokens_IKD.device,
                split_prompts=model.cache_prompts,
            )
            images_I = torch.tensor([q.image for q in asked], device=tokens_IKD.device)
            losses_A = model.model.answer_losses(tokens_IKD[images_I], rows).double().cpu()
            by_answer = losses_A.split([len(answer) for answer in answers])
            for (place, counts), losses in zip(batch, by_answer, strict=True):
                if counts:
                    total_Q[place] = losses.sum()
        total_Q = state.device.tensor_to_device(total_Q)
        dist.all_reduce(total_Q, reduce_operation="SUM")
        return total_Q.cpu()


def blank_image(tower: VisionTower) -> Tensor:
    """Pixels (1, 3, S, S) that the tower's normalisation makes 0, to the nearest grey level."""
    grey = (tower.image_mean.cpu() * 255).round().to(torch.uint8)
    return grey.expand(1, 3, tower.image_size, tower.image_size).contiguous()


def choose_captions(answers: Sequence[Tensor], num_choices: int) -> list[list[int]]:
    """Choose for each sample whose captions stand beside its own.

    Args:
        answers: Token ids of each sample's caption.
        num_choices: Captions to choose from, the own one among them.

    Returns:
        For each sample the places of up to `num_choices` - 1 others, spread over the set, whose
        captions differ from its own and from each other.
    """
    texts = [tuple(answer.tolist()) for answer in answers]
    count = len(texts)
    # Multiples of count / num_choices first: near samples of a data set are often alike.
    steps = sorted(range(1, count), key=lambda step: (step * num_choices % count, step))
    chosen = []
    for place, text in enumerate(texts):
        different = {text: place}
        for step in steps:
            if len(different) == num_choices:
                break
            different.setdefault(texts[(place + step) % count], (place + step) % count)
        chosen.append([other for other in different.values() if other != place])
    return chosen


def _batched(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    return (items[start : start + size] for start in range(0, len(items), size))
