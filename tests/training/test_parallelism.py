"""One rank reads the towers; ranks are arranged and `auto` decided as yaml and plan say."""

import logging
import shutil

import pytest
import torch
from composer.core import State
from composer.utils import FSDP2Config, ParallelismConfig, dist, get_device
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh

from runs import run, start
from vlm_composer.assembly import assemble_model
from vlm_composer.config import TrainConfig
from vlm_composer.models.language_model import LanguageModel
from vlm_composer.models.tower_loading import load_language_model
from vlm_composer.planning.choose import choose_parallelism
from vlm_composer.training import hardware
from vlm_composer.training.parallelism import assemble_on_first_rank
from vlm_composer.training.trained_weights import trained_weights, whole

HYBRID = {"parallelism": "hybrid", "fsdp_config": {"data_parallel_shard_degree": 2}}
CLIPPED = {"algorithms": {"gradient_clipping": {"clipping_threshold": 0.01}}}
WAYS = {
    "replicate": {},
    "shard": {"parallelism": "shard"},
    "two copies": {"parallelism": "hybrid", "fsdp_config": {"data_parallel_shard_degree": 1}},
}


@pytest.fixture
def without_weights(towers, tmp_path):
    """On rank 0 the towers; on the others folders that have all but their weights."""
    if dist.get_global_rank() == 0:
        return towers
    for name in ("siglip", "qwen3"):
        ignore = shutil.ignore_patterns("*.safetensors")
        shutil.copytree(towers / name, tmp_path / name, ignore=ignore)
    return tmp_path


def with_towers(folder, tiny_yaml, **changes):
    path = tiny_yaml(**changes)
    names = [f"vision_tower.name={folder}/siglip", f"language_model.name={folder}/qwen3"]
    return TrainConfig.read(path, names)


@pytest.mark.world_size(2)
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())
def test_ranks_that_read_no_weights_have_those_of_rank_zero(
    tiny_yaml, without_weights, towers, way
):
    trainer, vlm, _ = start(with_towers(without_weights, tiny_yaml, **way))
    for module, folder in ((vlm.vision_tower, "siglip"), (vlm.language_model, "qwen3")):
        saved = load_file(towers / folder / "model.safetensors")
        for name, parameter in module.named_parameters():
            assert torch.equal(whole(parameter), saved[name.removeprefix("model.")]), name
    rotary = vlm.language_model.model.model.rotary_emb
    assert torch.equal(rotary.inv_freq, rotary.original_inv_freq)
    assert vlm.vision_tower.image_std.flatten().tolist() == [0.5, 0.5, 0.5]
    trainer.close()


@pytest.mark.world_size(2)
def test_sharded_towers_are_never_whole_but_on_rank_zero(tiny_config):
    config = tiny_config()
    vlm = assemble_on_first_rank(
        lambda empty: assemble_model(config, "cpu", 299, empty_towers=empty), "shard", "cpu"
    )
    towers = [*vlm.vision_tower.parameters(), *vlm.language_model.parameters()]
    assert {p.is_meta for p in towers} == {dist.get_global_rank() > 0}
    assert not any(p.is_meta for p in vlm.connector.parameters())
    assert not any(b.is_meta for b in vlm.buffers())


@pytest.mark.world_size(2)
def test_a_tower_that_one_rank_cannot_read_ends_both(tiny_yaml, towers, tmp_path):
    ours = towers if dist.get_global_rank() == 0 else tmp_path / "nothing"
    with pytest.raises((OSError, ValueError), match="nothing"):
        start(with_towers(ours, tiny_yaml))


def test_empty_towers_differ_from_read_ones_in_their_parameters_alone(towers):
    options = {"pretrained": True, "dtype": torch.float32}
    full = load_language_model(str(towers / "llama"), **options)
    empty = load_language_model(str(towers / "llama"), **options, empty=True)
    assert all(p.is_meta for p in empty.parameters())
    assert [n for n, _ in empty.named_parameters()] == [n for n, _ in full.named_parameters()]
    assert empty.lm_head.weight is empty.model.embed_tokens.weight
    for (name, ours), (_, theirs) in zip(empty.named_buffers(), full.named_buffers(), strict=True):
        assert torch.equal(ours, theirs), name
    after = load_language_model(str(towers / "llama"), **options)
    assert not any(p.is_meta for p in after.parameters())
    assert LanguageModel(empty).ensure_rows(310)


@pytest.mark.world_size(2)
def test_tied_towers_stay_tied_on_every_rank(tiny_yaml, towers):
    config = TrainConfig.read(tiny_yaml(), [f"language_model.name={towers}/llama"])
    trainer, vlm, _ = start(config)
    llm = vlm.language_model.model
    assert llm.lm_head.weight is llm.model.embed_tokens.weight
    trainer.close()


@pytest.mark.world_size(2)
def test_composer_still_replaces_the_mesh_it_is_given():
    """Why there is `FSDP2OnMesh`; when this fails, upstream has mended it: remove it."""
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard"))["shard"]
    state = State(
        model=torch.nn.Linear(1, 1),
        device=get_device("cpu"),
        rank_zero_seed=0,
        run_name="mesh",
        parallelism_config=ParallelismConfig(fsdp2=FSDP2Config(device_mesh=mesh)),
    )
    assert state.fsdp_config.device_mesh.size() == 2


def trained(trainer):
    return {name: whole(p).clone() for name, p in trained_weights(trainer.state.model)}


@pytest.mark.world_size(4)
def test_two_by_two_ranks_train_clip_save_and_go_on_as_four_copies_do(tiny_config):
    base = {
        **CLIPPED,
        "device_train_microbatch_size": 1,
        "save_folder": "{run_folder}/checkpoints",
        "save_interval": "2ba",
        "optimizer": {"lr": 1e-3, "eps": 1e-3},  # AdamW without it makes noise of zero gradients
    }
    config = tiny_config(**base)
    replicated, _, reference = run(config)
    hybrid, _, watch = run(tiny_config(**base, **HYBRID, run_folder=config.run_folder + "-2"))
    assert watch.losses == pytest.approx(reference.losses, rel=1e-5)
    expected = trained(replicated)
    for name, weight in trained(hybrid).items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-4, atol=1e-6)
    # Every batch was clipped, so that a norm of half the ranks would show.
    norm = sum(float(g.square().sum()) for g in watch.gradients[0].values()) ** 0.5
    assert norm == pytest.approx(0.01, rel=1e-3)

    folder = config.run_folder + "-2/checkpoints"
    resumed = {**base, **HYBRID, "run_folder": config.run_folder + "-3"}
    trainer, _, rest = start(tiny_config(**resumed, load_path=f"{folder}/ep0-ba2.safetensors"))
    assert trainer.state.timestamp.batch == 2
    trainer.fit()
    assert rest.losses == watch.losses[2:]
    finished = trained(trainer)
    for name, weight in trained(hybrid).items():
        assert torch.equal(weight, finished[name]), name
    trainer.close()


@pytest.mark.world_size(4)
def test_four_copies_go_on_to_the_same_bits(tiny_config):
    """With more than two ranks the order of a sum shows, and DDP must keep its buckets."""
    base = {"save_folder": "{run_folder}/checkpoints", "save_interval": "2ba"}
    base |= {"device_train_microbatch_size": 1}
    config = tiny_config(**base)
    undisturbed, _, watch = run(config)
    path = f"{config.run_folder}/checkpoints/ep0-ba2.safetensors"
    resumed, _, rest = run(tiny_config(**base, load_path=path, run_folder=config.run_folder + "-2"))
    for name, gradient in watch.gradients[2].items():
        assert torch.equal(gradient, rest.gradients[0][name]), name
    assert rest.losses == watch.losses[2:]
    finished = trained(undisturbed)
    for name, weight in trained(resumed).items():
        assert torch.equal(weight, finished[name]), name


def plan_for(monkeypatch, gib):
    """Give every rank a device of so many GiB."""
    monkeypatch.setattr(
        "vlm_composer.planning.choose.device_memory", lambda device: (gib * 2**30, "a tiny")
    )


def test_auto_takes_copies_where_they_fit(tiny_config, caplog):
    caplog.set_level(logging.INFO, "vlm_composer")
    config = tiny_config(parallelism="auto", cache_prompts=True)
    chosen = choose_parallelism(config, "cpu")
    assert (chosen.parallelism, chosen.cache_prompts) == ("replicate", True)
    assert "parallelism: auto is replicate: a rank's 0.0 GiB fit into the" in caplog.text
    assert choose_parallelism(chosen, "cpu") is chosen


def test_auto_refuses_what_does_not_fit(tiny_config, monkeypatch):
    plan_for(monkeypatch, 1e-4)
    with pytest.raises(ValueError, match=r"parallelism: auto: a whole copy .* does not fit"):
        choose_parallelism(tiny_config(parallelism="auto"), "cpu")


@pytest.mark.world_size(2)
def test_auto_shards_what_fits_no_rank(tiny_config, monkeypatch, caplog):
    caplog.set_level(logging.INFO, "vlm_composer")
    config = tiny_config(parallelism="auto", cache_prompts=True, device_train_microbatch_size=1)
    sizes = sizes_of(config, monkeypatch)
    plan_for(monkeypatch, (sizes["replicate"] + sizes["shard"]) / 2 / 0.9 / 2**30)
    assert choose_parallelism(config, "cpu").parallelism == "shard"
    assert "cache_prompts: does not work with parallelism: shard; it is off" in caplog.text
    trainer, _, watch = run(config)
    assert hasattr(next(trainer.state.model.parameters()), "full_tensor")
    assert len(watch.losses) == 4


def sizes_of(config, monkeypatch):
    from vlm_composer.planning.choose import weights_and_activations
    from vlm_composer.planning.estimate import memory_of_a_rank

    counted = weights_and_activations(config, "cpu")
    return {
        kind: memory_of_a_rank(*counted, shards=shards, world_size=2)["total"]
        for kind, shards in (("replicate", 1), ("shard", 2))
    }


def test_the_memory_of_a_cpu_is_what_the_machine_has():
    memory, name = hardware.device_memory("cpu")
    assert 2**29 < memory < 2**45
    assert name == "this machine's"


@pytest.mark.world_size(4)
def test_a_shard_degree_that_does_not_divide_is_refused(tiny_yaml):
    settings = {"parallelism": "hybrid", "fsdp_config": {"data_parallel_shard_degree": 3}}
    with pytest.raises(ValueError, match="data_parallel_shard_degree: 3 does not divide the 4"):
        TrainConfig.read(tiny_yaml(**settings))
