"""The evidence's figures are what a plain computation gives, on any number of ranks; a run with it
is the run without."""

import logging

import pytest
import torch
from composer.utils import reproducibility

from convert.feature_pass import make_features
from runs import last, metrics_of, run, start
from vlm_composer.assembly import assemble_encoder, assemble_model, assemble_template
from vlm_composer.config.loader import ConfigError
from vlm_composer.data.collate import collate
from vlm_composer.data.opening import open_dataset
from vlm_composer.evaluation.evidence import choose_captions
from vlm_composer.models.composer_model import ComposerVLM
from vlm_composer.models.packing import IGNORE_INDEX

HYBRID = {"parallelism": "hybrid", "fsdp_config": {"data_parallel_shard_degree": 1}}
LOSSES = ("loss_right", "loss_wrong", "loss_blank", "gap_wrong", "gap_blank")
REST = ("retrieval_accuracy", "retrieval_chance")
OUTPUT = ("output_norm_ratio", "output_spread", "latent_spread")


def evidence(num_samples=5, num_choices=3):
    return {"evidence": {"num_samples": num_samples, "num_choices": num_choices}}


def answer_of(sample):
    return sample["labels"][sample["labels"] != IGNORE_INDEX]


def with_answer(sample, answer):
    """The sample with another's answer."""
    prompt = sample["input_ids"][: len(sample["input_ids"]) - len(answer_of(sample))]
    return sample | {
        "input_ids": torch.cat([prompt, answer]),
        "labels": torch.cat([torch.full_like(prompt, IGNORE_INDEX), answer]),
    }


def expected(config):
    """The figures of an untrained connector, a sample at a time through the model's own forward."""
    template = assemble_template(config)
    reproducibility.seed_all(config.seed)
    vlm = assemble_model(config, "cpu", template.image_token_id)
    model = ComposerVLM(vlm)
    encoder = assemble_encoder(config, template)
    captions = open_dataset(
        config.eval_loader.dataset, encoder, batch_size=1, store_timeout=config.store_timeout
    )
    wanted = config.callbacks.evidence
    total, count = captions.num_samples, min(wanted.num_samples, captions.num_samples)
    samples = [captions[i * total // count] for i in range(count)]
    grey = torch.full_like(samples[0]["pixel_values"], 128)  # of a mean of 0.5

    @torch.no_grad()
    def loss(sample, pixels):
        logits, targets = model.eval_forward(collate([sample | {"pixel_values": pixels}]))
        return torch.nn.functional.cross_entropy(logits, targets, reduction="sum").item()

    tokens = sum(len(answer_of(sample)) for sample in samples)
    images = {
        "right": [s["pixel_values"] for s in samples],
        "wrong": [samples[(i + count // 2) % count]["pixel_values"] for i in range(count)],
        "blank": [grey] * count,
    }
    figures = {
        f"loss_{kind}": sum(map(loss, samples, pixels)) / tokens for kind, pixels in images.items()
    }
    figures["gap_wrong"] = figures["loss_wrong"] - figures["loss_right"]
    figures["gap_blank"] = figures["loss_blank"] - figures["loss_right"]

    found = chance = 0
    chosen = choose_captions([answer_of(s) for s in samples], wanted.num_choices)
    for sample, others in zip(samples, chosen, strict=True):
        answers = [answer_of(sample), *(answer_of(samples[place]) for place in others)]
        likelihoods = [
            -loss(with_answer(sample, answer), sample["pixel_values"]) / len(answer)
            for answer in answers
        ]
        found += likelihoods[0] >= max(likelihoods)
        chance += 1 / len(answers)
    figures |= {"retrieval_accuracy": found / count, "retrieval_chance": chance / count}

    with torch.no_grad():
        out = vlm.connector(vlm.vision_tower(torch.stack(images["right"])))
    mean = out.mean(0)
    table = vlm.language_model.model.get_input_embeddings().weight
    figures["output_norm_ratio"] = (out.norm(dim=-1).mean() / table.norm(dim=-1).mean()).item()
    tokens_of = out.mean(1)
    figures["output_spread"] = (
        (tokens_of - tokens_of.mean(0)).norm(dim=-1).mean() / tokens_of.norm(dim=-1).mean()
    ).item()
    distances = (out - mean).norm(dim=-1).mean(0) / out.norm(dim=-1).mean(0)
    figures["latent_spread"] = (distances > 0.01).float().mean().item()
    return figures


def check(config):
    trainer, _, _ = start(config)
    trainer.eval()
    for name, value in expected(config).items():
        assert last(trainer, f"evidence/{name}") == pytest.approx(value, rel=1e-5, abs=1e-6), name
    perplexity = last(trainer, "evidence/perplexity_right")
    loss = last(trainer, "evidence/loss_right")
    assert perplexity == pytest.approx(torch.tensor(loss).exp().item(), rel=1e-5)
    trainer.close()
    return trainer


@pytest.mark.parametrize(
    ("batch_size", "num_samples", "changes"),
    [(1, 2, {}), (3, 5, {"cache_prompts": True}), (20, 64, {})],
)
def test_the_figures_are_those_of_a_plain_computation(
    tiny_config, batch_size, num_samples, changes
):
    check(
        tiny_config(device_eval_batch_size=batch_size, callbacks=evidence(num_samples), **changes)
    )


@pytest.mark.world_size(2)
@pytest.mark.parametrize(
    "changes",
    [{}, {"parallelism": "shard"}, HYBRID],
    ids=["replicate", "shard", "hybrid"],
)
@pytest.mark.parametrize(("batch_size", "num_samples"), [(2, 5), (4, 7)])
def test_two_ranks_give_the_figures_of_one(tiny_config, changes, batch_size, num_samples):
    """Neither five nor seven samples divide by two ranks, nor their questions by two batches."""
    check(
        tiny_config(
            device_eval_batch_size=batch_size,
            device_train_microbatch_size=2,
            callbacks=evidence(num_samples, 4),
            **changes,
        )
    )


@pytest.mark.world_size(2)
def test_more_ranks_than_samples(tiny_config):
    check(
        tiny_config(device_train_microbatch_size=2, callbacks=evidence(2, 2), parallelism="shard")
    )
