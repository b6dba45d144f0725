"""The evidence's figures are what a plain computation gives, on any number of ranks; a run with it
is the run without."""

import logging

import pytest
import torch
from composer.utils import reproducibility

from convert.feature_pass import make_features
from runs import last, metrics_of, run, start
from vlm_composer.assembly import assemble_model, assemble_template
from vlm_composer.data.opening import open_dataset
from vlm_composer.evaluation.evidence import choose_captions
from vlm_composer.loaders import assemble_encoder
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


def sample_of(batch):
    """The one sample of a batch, as tensors."""
    texts = {key: torch.from_numpy(batch[key][0]) for key in ("input_ids", "labels")}
    return texts | {"pixel_values": batch["pixel_values"][0]}


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
    captions = open_dataset(config.eval_loader, batch_size=1, store_timeout=config.store_timeout)
    wanted = config.callbacks.evidence
    total, count = captions.num_samples, min(wanted.num_samples, captions.num_samples)
    samples = [sample_of(encoder([captions[i * total // count]])) for i in range(count)]
    grey = torch.full_like(samples[0]["pixel_values"], 128)  # of a mean of 0.5

    @torch.no_grad()
    def loss(sample, pixels):
        batch = {key: [sample[key].numpy()] for key in ("input_ids", "labels")}
        logits, targets = model.eval_forward(batch | {"ids": ["x"], "pixel_values": pixels[None]})
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


def figures_of(trainer):
    names = (*LOSSES, *REST, *OUTPUT)
    return {name: last(trainer, f"evidence/{name}") for name in names}


def test_features_give_the_figures_of_their_images(tiny_config, shared_path):
    images = tiny_config(callbacks=evidence())
    features = tiny_config(callbacks=evidence())
    make_features(images, shared_path / "features", show_progress=False)
    features.eval_loader.dataset.local = str(shared_path / "features" / "eval")
    found = []
    for config in (images, features):
        trainer, _, _ = start(config)
        trainer.eval()
        found.append(figures_of(trainer))
        trainer.close()
    assert found[1] == pytest.approx(found[0], rel=1e-5, abs=1e-6)
    assert found[0]["gap_blank"] != 0


EVERYTHING = evidence() | {"captions": {"num_images": 3, "max_new_tokens": 4}}
OFTEN = {"max_duration": "4ba", "eval_interval": "2ba"}


def weights_of(vlm):
    return {name: p.detach().clone() for name, p in vlm.connector.named_parameters()}


def test_a_run_has_the_bits_of_one_that_is_not_looked_at(tiny_config, tmp_path):
    ends = []
    for callbacks in ({"warnings": None}, EVERYTHING):
        trainer, vlm, watch = run(tiny_config(callbacks=callbacks, **OFTEN))
        ends.append((weights_of(vlm), watch.losses, watch.ids, torch.get_rng_state()))
    (weights, losses, ids, generator), (other, *rest) = ends
    assert "evidence/gap_wrong" in metrics_of(trainer)
    assert all(torch.equal(weights[name], other[name]) for name in weights)
    assert rest[:2] == [losses, ids]
    assert torch.equal(rest[2], generator)


def test_it_looks_once_an_evaluation(tiny_config, shards, caplog):
    loader = {
        "dataset": {"local": str(shards / "eval")},
        "num_workers": 0,
        "mismatched_images": True,
    }
    with caplog.at_level(logging.INFO, logger="vlm_composer"):
        trainer, _, _ = start(tiny_config(callbacks=evidence(), eval_loader=loader, **OFTEN))
        trainer.eval()  # as with eval_first
        trainer.fit()
    assert len(metrics_of(trainer)["evidence/gap_wrong"]) == 3
    assert last(trainer, "evidence/seconds") > 0
    lines = [x.getMessage() for x in caplog.records if x.getMessage().startswith("Evidence: ")]
    assert len(lines) == 3
    assert "of 5 images (chance 33 %)" in lines[0]
    trainer.close()


def learning(tiny_config, shards, **callbacks):
    """A run that learns to tell colours, evaluated on the samples that it is trained on."""
    return tiny_config(
        max_duration="150ba",
        eval_interval="75ba",
        device_train_microbatch_size=8,
        device_eval_batch_size=32,
        eval_loader={"dataset": {"local": str(shards / "train")}, "num_workers": 0},
        optimizer={"lr": 3e-3},
        scheduler={"t_warmup": "15ba"},
        algorithms={"gradient_clipping": {"clipping_threshold": 1.0}},
        callbacks=evidence(40, 8) | callbacks,
    )


@pytest.mark.slow
def test_an_image_finds_its_caption_once_it_is_seen(tiny_config, shards, tmp_path):
    """And a run that goes well is warned of nothing."""
    trainer, _, _ = start(learning(tiny_config, shards))
    trainer.eval()
    chance = last(trainer, "evidence/retrieval_chance")
    assert chance == pytest.approx(1 / 8)  # four colours, each with and without "a … picture"
    untrained = last(trainer, "evidence/retrieval_accuracy")
    assert untrained < 0.3
    assert abs(last(trainer, "evidence/gap_wrong")) < 0.05
    trainer.fit()
    trainer.close()
    # Each caption has a twin of the same colour, so that about half is all that colours tell. For
    # 40 guesses the bound is four standard deviations above chance.
    assert last(trainer, "evidence/retrieval_accuracy") > max(untrained + 0.1, 0.33)
    assert last(trainer, "evidence/gap_wrong") > 0.3
    assert last(trainer, "evidence/loss_blank") > last(trainer, "evidence/loss_right")
    assert not (tmp_path / "run" / "warnings.jsonl").exists()


def test_captions_to_choose_from_differ_and_lie_apart():
    answers = [torch.tensor([place % 6]) for place in range(12)]
    chosen = choose_captions(answers, 4)
    assert chosen[0] == [3, 1, 4]
    for place, others in enumerate(chosen):
        texts = [int(answers[other]) for other in (place, *others)]
        assert len(set(texts)) == 4
    assert [len(others) for others in choose_captions(answers, 9)] == [5] * 12
    assert choose_captions([torch.tensor([1])] * 3, 4) == [[], [], []]


def test_a_caption_without_another_is_found(tiny_config, monkeypatch):
    """Ties count as right: there is nothing to tell apart."""
    trainer, _, _ = start(tiny_config(callbacks=evidence(4, 3)))
    monkeypatch.setattr(
        "vlm_composer.evaluation.evidence.choose_captions",
        lambda answers, count: [[place] for place in range(len(answers))],  # its own once more
    )
    trainer.eval()
    assert last(trainer, "evidence/retrieval_accuracy") == 1
    assert last(trainer, "evidence/retrieval_chance") == 0.5
    trainer.close()


def test_a_set_of_one_sample_is_refused(tiny_config, monkeypatch):
    monkeypatch.setattr("vlm_composer.data.by_index.CaptionsByIndex.__len__", lambda self: 1)
    with pytest.raises(ValueError, match=r"1 sample\(s\), and no other"):
        start(tiny_config(callbacks=evidence()))
