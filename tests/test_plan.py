"""The plan of the full recipe, as a user asks for it."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from mixtures import SHARES, mixed
from vlm_composer import plan
from vlm_composer.config import TrainConfig
from vlm_composer.planning.activations import ActivationBytes
from vlm_composer.planning.devices import DEVICES
from vlm_composer.planning.estimate import Cluster, Room, Weights, recommend
from vlm_composer.planning.on_gpus import _epoch

STAGE1 = Path(__file__).parent.parent / "yamls" / "stage1.yaml"


def test_the_json_of_stage_1_holds_the_specified_parameters():
    done = subprocess.run(
        [sys.executable, "-m", "vlm_composer.plan", STAGE1, "--json"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    planned = json.loads(done.stdout)
    expected = {
        "resampler": 6927872,
        "projector": 75517952,
        "connector": 82445824,
        "vision_tower": 412987248,
        "llm": 8190735360,
    }
    assert expected.items() <= planned["parameters"].items()
    assert planned["parameters"]["trainable"] == 82445824
    assert planned["parameters"]["frozen"] == 412987248 + 8190735360
    assert planned["trained"] == ["resampler", "projector"]
    assert planned["checkpoint_bytes"] == 12 * 82445824
    assert planned["training_flops_per_sample"]["total"] == pytest.approx(3.47e12, rel=0.01)


def test_the_table_names_every_part(capsys):
    assert plan.main([str(STAGE1), "connector.vision_ln=true"]) == 0
    out = capsys.readouterr().out
    for text in ("vision_ln", "2,304  trained", "8,190,735,360  frozen", "0.99 GB", "total"):
        assert text in out


def test_mistakes_are_told_without_a_traceback(capsys):
    assert plan.main([str(STAGE1), "seeds=3"]) == 1
    assert "seeds: unknown key; did you mean 'seed'?" in capsys.readouterr().err


@pytest.fixture(scope="module")
def stage1():
    """The plan of the full recipe for 8 H100s: seconds, for nothing has contents."""
    return plan.plan(TrainConfig.read(STAGE1), gpus=8, device="h100")


def test_stage_1_on_8_h100s_holds_the_arithmetic_of_the_specification(stage1):
    memory = stage1["memory_bytes"]["replicate"]
    assert memory["towers"] == 2 * (412987248 + 8190735360)  # 17.2 GB
    assert memory["connector"] == memory["gradients"] == 4 * 82445824
    assert memory["adamw_moments"] == 8 * 82445824
    assert memory["total"] == sum(v for k, v in memory.items() if k != "total")
    assert stage1["memory_bytes"]["shard"]["towers"] == memory["towers"] / 8
    assert stage1["recommended"] == "replicate"
    speed = stage1["speed"]["replicate"]
    # 114 samples/s at 40 % MFU and 143 at 50 %, and an all-reduce of some 2 ms.
    assert speed["images_per_second_per_gpu"] == pytest.approx(128, rel=0.02)
    assert speed["communication"]["seconds"] == pytest.approx(1.3e-3, rel=0.05)
    assert speed["hours_per_epoch"] == pytest.approx(546965 / speed["samples_per_second"] / 3600)
    # 30 GB a micro-batch, of which there are two.
    assert stage1["speed"]["shard"]["communication"]["bytes"] / 2 == pytest.approx(30e9, rel=0.05)
    assert [row["gpus"] for row in stage1["scaling"]] == [1, 8, 64, 512]
    assert [row["global_batch"] for row in stage1["scaling"]] == [256, 256, 256, 512]


def test_activations_of_stage_1_are_about_what_its_layers_keep(stage1):
    kept = stage1["activation_bytes"]["kept"]
    # Of a token and layer at least the input of both norms in bf16, q, k, v, the attention's
    # output, gate, up and their product's inputs; eager norms keep fp32 copies on top of it.
    tokens, layers = 16 * (9 + 64 + 24), 36
    least = 2 * (2 * 4096 + (32 + 2 * 8) * 128 + 32 * 128 + 2 * 12288)
    assert least < kept / (tokens * layers) < 2.5 * least
    assert stage1["activation_bytes"]["peak"] >= kept


def test_the_recommendation_changes_with_the_device(stage1):
    weights = Weights(
        towers=17_207_445_216, backward=15_136_000_000, connector=329_783_296,
        largest_units=2_489_319_424,
    )  # fmt: skip
    activations = ActivationBytes(**stage1["activation_bytes"])

    def choose(device, gpus):
        return recommend(weights, activations, Room.of(Cluster(DEVICES[device], gpus, 8, 0.45)))

    assert choose("h100", 8)[0] == choose("l40s", 8)[0] == choose("h100", 512)[0] == "replicate"
    chosen, reason = choose("l4", 8)
    assert chosen == "shard"
    assert "more than the 20.1 GiB of l4 memory" in reason
    chosen, reason = choose("l4", 16)
    assert chosen == "hybrid"
    assert "a shard of the 8 ranks of a node takes 12.7" in reason
    huge = replace(weights, towers=20 * weights.towers, backward=20 * weights.backward)
    chosen, reason = recommend(huge, activations, Room.of(Cluster(DEVICES["h100"], 64, 8, 0.45)))
    assert chosen == "hybrid"
    chosen, reason = recommend(huge, activations, Room.of(Cluster(DEVICES["l40s"], 64, 8, 0.45)))
    assert chosen == "shard", reason
    alone, reason = choose("l4", 1)
    assert alone is None
    assert "smaller micro-batch or more ranks" in reason


def test_hybrid_gathers_within_the_node_and_sends_a_part_between_nodes():
    planned = plan.plan(
        TrainConfig.read(STAGE1, ["device_train_microbatch_size=8"]), gpus=32, device="l4"
    )
    sent = {kind: speed["communication"] for kind, speed in planned["speed"].items()}
    assert sent.keys() == {"replicate", "hybrid", "shard"}
    # An all-reduce of an eighth of the connector's gradients with three other nodes.
    assert sent["hybrid"]["bytes_between_nodes"] == 2 * 4 * 82445824 / 8 * 3 / 4
    assert sent["hybrid"]["bytes"] > 20e9 > 100 * sent["hybrid"]["bytes_between_nodes"]
    memory = planned["memory_bytes"]
    assert memory["hybrid"]["towers"] == memory["replicate"]["towers"] / 8
    assert memory["shard"]["towers"] == memory["replicate"]["towers"] / 32
    assert "hybrid" in plan.describe(planned)


def test_a_sharded_plan_names_what_it_cannot_be_run_with():
    planned = plan.plan(TrainConfig.read(STAGE1), gpus=8, device="l4")
    assert planned["recommended"] == "shard"
    assert "cache_prompts: false" in planned["reason"]


def test_what_was_computed_says_so(stage1):
    text = plan.describe(stage1)
    assert text.count("computed, not run on a GPU") == 3
    assert "measured on fake tensors" in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--device", "v100"], "--device v100: unknown; choose from b200, h200, h100"),
        (["--gpus", "64"], "256 does not divide over 64 GPUs × 16"),
        (["--gpus", "64"], "global_train_batch_size=1024 or device_train_microbatch_size=4"),
        (["--gpus", "512"], "512 GPUs × 16 (device_train_microbatch_size) = 8192"),
        (["--gpus", "12"], "12 is not a number of whole nodes of 8"),
        (["--gpus", "0"], "--gpus 0"),
        (["--mfu", "45"], "--mfu 45.0: must be more than 0 and at most 1"),
    ],
)
def test_what_cannot_be_is_refused_with_both_values(options, message, capsys):
    assert plan.main([str(STAGE1), *options]) == 1
    assert message in capsys.readouterr().err


def test_the_cache_and_the_epoch_are_those_of_shards_on_this_machine(tiny_config, shards):
    planned = plan.plan(tiny_config(), gpus=1)
    assert planned["epoch_samples"] == 40
    size = sum(path.stat().st_size for path in (shards / "train").glob("*.mds"))
    assert planned["cache_bytes"] == size


@pytest.mark.parametrize(
    ("weights", "dataset", "samples"),
    [
        (SHARES, {}, 60),
        (SHARES, {"epoch_size": 30}, 30),
        ({"emoji": {"repeat": 3}, "llava": {}}, {}, 100),
    ],
)
def test_an_epoch_of_streams_is_planned(tiny_config, two_sets, weights, dataset, samples):
    config = tiny_config(train_loader=mixed(two_sets, weights, **dataset))
    size = sum(path.stat().st_size for path in two_sets.glob("*/train/*.mds"))
    assert _epoch(config) == (samples, "of the shards' index", size)
    elsewhere = mixed(two_sets / "elsewhere", SHARES, epoch_size=30)
    assert _epoch(tiny_config(train_loader=elsewhere)) == (30, "epoch_size", None)
