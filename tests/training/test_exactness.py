"""The gradient does not depend on how a batch is cut, nor over how many ranks."""

import itertools
from dataclasses import replace

import pytest
import torch
from composer.utils import dist, reproducibility

from mixtures import mixed
from runs import last, run
from vlm_composer.assembly import assemble_model, assemble_template
from vlm_composer.data.batches import num_tokens
from vlm_composer.models.composer_model import ComposerVLM


def merged(batches):
    """One batch of all the samples of several."""
    joined = {
        key: list(itertools.chain(*(batch[key] for batch in batches)))
        for key in ("ids", "input_ids", "labels", "num_cut")
    }
    return joined | {"pixel_values": torch.cat([batch["pixel_values"] for batch in batches])}


def expected_gradients(config, batches):
    """Of the mean over all answer tokens of the global batch, one forward, without the Trainer and
    what makes it fast."""
    config = replace(config, compile_blocks=False, cache_prompts=False)
    template = assemble_template(config)
    reproducibility.seed_all(config.seed)
    vlm = assemble_model(config, "cpu", template.image_token_id)
    logits, targets = ComposerVLM(vlm).eval_forward(merged(batches))
    loss = torch.nn.functional.cross_entropy(logits, targets)
    loss.backward()
    return loss.item(), {
        f"model.{name}": p.grad for name, p in vlm.named_parameters() if p.grad is not None
    }


def norm(tensors):
    return sum(float(t.double().square().sum()) for t in tensors) ** 0.5


def check_first_step(config):
    _, _, watch = run(config)
    batches = dist.all_gather_object(watch.batches[0])
    assert sum(len(b["ids"]) for b in batches) == config.global_train_batch_size
    lengths = {num_tokens(batch)["loss_generating"] for batch in batches}
    loss, expected = expected_gradients(config, batches)
    assert watch.gradients[0].keys() == expected.keys()
    error = norm(watch.gradients[0][name] - expected[name] for name in expected)
    assert error < 1e-5 * norm(expected.values())
    for name, gradient in watch.gradients[0].items():
        assert norm([gradient - expected[name]]) < 1e-4 * norm([expected[name]]), name
    total = torch.tensor(watch.losses[0])
    dist.all_reduce(total, reduce_operation="SUM")
    assert total.item() / dist.get_world_size() == pytest.approx(loss, rel=1e-5)
    return lengths


@pytest.mark.parametrize("microbatch", [8, 3, 2, 1])
def test_any_microbatch_gives_the_gradient_of_the_whole_batch(tiny_config, microbatch):
    check_first_step(tiny_config(max_duration="1ba", device_train_microbatch_size=microbatch))


@pytest.mark.world_size(2)
@pytest.mark.parametrize("parallelism", ["replicate", "shard", "hybrid"])
@pytest.mark.parametrize("microbatch", [4, 1])
def test_two_ranks_give_the_gradient_of_the_whole_batch(tiny_config, parallelism, microbatch):
    lengths = check_first_step(
        tiny_config(
            max_duration="1ba", device_train_microbatch_size=microbatch, parallelism=parallelism
        )
    )
    assert len(lengths) == 2, "the ranks must hold different numbers of answer tokens"


@pytest.mark.world_size(2)
def test_two_copies_of_one_rank_each_give_the_gradient_of_the_whole_batch(tiny_config):
    hybrid = {"parallelism": "hybrid", "fsdp_config": {"data_parallel_shard_degree": 1}}
    check_first_step(tiny_config(max_duration="1ba", **hybrid))


HYBRID = {"parallelism": "hybrid", "fsdp_config": {"data_parallel_shard_degree": 2}}


@pytest.mark.world_size(4)
@pytest.mark.parametrize("microbatch", [2, 1])
def test_two_by_two_ranks_give_the_gradient_of_the_whole_batch(tiny_config, microbatch):
    check_first_step(
        tiny_config(max_duration="1ba", device_train_microbatch_size=microbatch, **HYBRID)
    )


@pytest.mark.world_size(4)
def test_two_by_two_ranks_evaluate_every_sample_once(tiny_config, shards):
    check_evaluation(
        tiny_config(
            eval_loader=evaluation_settings(shards),
            device_eval_batch_size=3,
            device_train_microbatch_size=2,
            **HYBRID,
        )
    )


FAST = {
    "replicate": {"cache_prompts": True},
    "shard": {"parallelism": "shard"},
    "shard, recomputing": {
        "parallelism": "shard",
        "fsdp_config": {"activation_checkpointing": True},
    },
}


@pytest.mark.slow
@pytest.mark.world_size(2)
@pytest.mark.parametrize("changes", FAST.values(), ids=FAST.keys())
def test_compiled_blocks_give_the_same_gradient_on_two_ranks(tiny_config, changes):
    check_first_step(tiny_config(max_duration="1ba", compile_blocks=True, **changes))


def expected_metrics(config, mismatched=False):
    """Loss and accuracy over every sample of the evaluation set once, without the Trainer."""
    from vlm_composer.data.opening import open_dataset
    from vlm_composer.loaders import assemble_encoder

    template = assemble_template(config)
    reproducibility.seed_all(config.seed)
    vlm = assemble_model(config, "cpu", template.image_token_id)
    encoder = assemble_encoder(config, template)
    captions = open_dataset(config.eval_loader, batch_size=1, store_timeout=0)
    batch = encoder([captions[i] for i in range(captions.num_samples)])
    shift = captions.num_samples // 2 if mismatched else 0
    batch["pixel_values"] = batch["pixel_values"].roll(-shift, 0)
    with torch.no_grad():
        logits, targets = ComposerVLM(vlm).eval_forward(batch)
    loss = torch.nn.functional.cross_entropy(logits, targets).item()
    return loss, (logits.argmax(-1) == targets).float().mean().item()


def check_evaluation(config):
    from runs import start

    trainer, _, _ = start(config)
    trainer.eval()
    for label, mismatched in (("eval", False), ("eval_mismatched", True)):
        loss, accuracy = expected_metrics(config, mismatched)
        assert last(trainer, f"metrics/{label}/LanguageCrossEntropy") == pytest.approx(
            loss, rel=1e-5
        )
        perplexity = last(trainer, f"metrics/{label}/LanguagePerplexity")
        assert perplexity == pytest.approx(torch.tensor(loss).exp().item(), rel=1e-4)
        assert last(trainer, f"metrics/{label}/TokenAccuracy") == pytest.approx(accuracy, abs=1e-6)
    trainer.close()


def evaluation_settings(shards, workers=0):
    return {
        "dataset": {"local": str(shards / "eval")},
        "num_workers": workers,
        "mismatched_images": True,
    }


@pytest.mark.parametrize("batch_size", [1, 3, 7, 20])
def test_evaluation_counts_every_sample_once(tiny_config, shards, batch_size):
    check_evaluation(
        tiny_config(eval_loader=evaluation_settings(shards), device_eval_batch_size=batch_size)
    )


def mixed_evaluation(two_sets):
    return mixed(two_sets, {"llava": {}, "emoji": {}}, "eval") | {"mismatched_images": True}


def test_evaluation_of_several_data_sets_counts_every_sample_once(tiny_config, two_sets):
    check_evaluation(tiny_config(eval_loader=mixed_evaluation(two_sets), device_eval_batch_size=3))


@pytest.mark.world_size(2)
def test_two_ranks_count_every_sample_of_several_data_sets_once(tiny_config, two_sets):
    check_evaluation(tiny_config(eval_loader=mixed_evaluation(two_sets), device_eval_batch_size=3))


@pytest.mark.world_size(2)
@pytest.mark.parametrize("batch_size", [1, 3, 20])
def test_evaluation_on_two_ranks_counts_every_sample_once(tiny_config, shards, batch_size):
    """Seven samples do not divide by two ranks."""
    check_evaluation(
        tiny_config(eval_loader=evaluation_settings(shards), device_eval_batch_size=batch_size)
    )


@pytest.mark.world_size(2)
def test_gloo_still_sums_where_it_should_average():
    """Why `average_gradients` divides; when this fails, upstream has mended it: it need not."""
    output = torch.empty(1)
    torch.distributed.reduce_scatter_tensor(output, torch.ones(2), torch.distributed.ReduceOp.AVG)
    assert output.item() == 2.0
