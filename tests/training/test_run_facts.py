"""run.json says what a run was, and a resumed run goes on in it."""

import json
from datetime import datetime

import pytest
import torch
from composer.utils import dist

from convert import convert_llava
from runs import run, start
from tiny import write_pairs


def facts_of(folder):
    return json.loads((folder / "run" / "run.json").read_text())


def test_what_a_run_was(tiny_config, tmp_path):
    config = tiny_config(eval_interval="2ba")
    trainer, vlm, _ = run(config)
    facts = facts_of(tmp_path)
    assert facts["run_name"] == "tiny"
    assert facts["config"] == json.loads(json.dumps(config.recorded()))
    assert facts["seeds"] == {"seed": 17, "shuffle_seed": 17}
    assert torch.__version__.startswith(facts["versions"]["torch"].partition("+")[0])
    assert {"python", "mosaicml", "mosaicml-streaming", "transformers"} <= facts["versions"].keys()
    assert facts["hardware"]["device_kind"] == "cpu"
    assert facts["hardware"]["ranks"] == facts["hardware"]["nodes"] == 1
    assert facts["hardware"]["cpu"]
    assert facts["hardware"]["memory_bytes"] > 1e8
    assert len(facts["towers"]["vision_tower"]["weights_hash"]) == 32
    projector = facts["parameters"]["projector"]
    assert projector == {
        "parameters": sum(p.numel() for p in vlm.connector.projector.parameters()),
        "trained": True,
        "dtype": "float32",
    }
    assert facts["parameters"]["llm"]["trained"] is False
    assert facts["data"]["train"]["samples"] == 40
    assert facts["data"]["train"]["kind"] == "images"
    assert facts["data"]["train"] | {"kind": 0, "place": 0} == (
        trainer.state.train_dataloader.dataset.fingerprint | {"kind": 0, "place": 0}
    )
    assert facts["data"]["eval"]["samples"] == 7
    assert facts["data"]["summary"]["train"] == 40  # what the conversion left beside the shards
    assert datetime.fromisoformat(facts["started"]) <= datetime.fromisoformat(facts["ended"])
    assert (facts["batches"], facts["samples"]) == (4, 32)
    assert facts["resumed_at"] == []
    (leg,) = facts["legs"]
    assert (leg["batch"], leg["last_batch"]) == (0, 4)
    assert leg["seconds"] == facts["wall_seconds"] > 0


class Killed(Exception):
    """Ends a run as a signal would: nothing is completed."""


def test_a_resumed_run_appends(tiny_config, tmp_path):
    saving = {"save_folder": "{run_folder}/checkpoints", "save_interval": "2ba", "autoresume": True}
    config = tiny_config(eval_interval="1ba", **saving)
    trainer, _, watch = start(config)

    def kill(state, logger):
        if state.timestamp.batch == 3:
            raise Killed

    watch.batch_start = kill
    with pytest.raises(Killed):
        trainer.fit()
    trainer.close()
    killed = facts_of(tmp_path)
    assert killed["ended"] is None
    assert (killed["batches"], killed["legs"][0]["last_batch"]) == (3, 3)

    run(config)
    facts = facts_of(tmp_path)
    assert facts["started"] == killed["started"]
    assert facts["ended"] is not None
    assert facts["resumed_at"] == [2]
    assert [(leg["batch"], leg["last_batch"]) for leg in facts["legs"]] == [(0, 3), (2, 4)]
    assert facts["legs"][0] == killed["legs"][0]
    assert facts["wall_seconds"] == pytest.approx(sum(leg["seconds"] for leg in facts["legs"]))


@pytest.mark.parametrize("text", [None, "{"])
def test_a_resumed_run_without_its_file_begins_one(tiny_config, tmp_path, text):
    saving = {"save_folder": "{run_folder}/checkpoints", "save_interval": "2ba"}
    run(tiny_config(max_duration="2ba", **saving))
    path = tmp_path / "run" / "run.json"
    path.unlink() if text is None else path.write_text(text)
    run(tiny_config(load_path="{run_folder}/checkpoints"))
    assert facts_of(tmp_path)["resumed_at"] == [2]
    assert len(facts_of(tmp_path)["legs"]) == 1


def test_data_without_a_summary(tiny_config, tmp_path):
    json_path, images = write_pairs(tmp_path / "pairs", 47)
    convert_llava(json_path, images, tmp_path / "mds", eval_ratio=0.15, show_progress=False)
    (tmp_path / "mds" / "summary.json").unlink()
    config = tiny_config(max_duration="1ba", eval_loader=None)
    config.train_loader.dataset.local = str(tmp_path / "mds" / "train")
    run(config)
    facts = facts_of(tmp_path)
    assert facts["data"]["summary"] is None
    assert "eval" not in facts["data"]


@pytest.mark.world_size(2)
def test_one_rank_writes_the_parts_whole(tiny_config, shared_path):
    trainer, _, _ = run(tiny_config(parallelism="shard", device_train_microbatch_size=2))
    dist.barrier()
    facts = facts_of(shared_path)
    assert facts["hardware"]["ranks"] == 2
    assert facts["batches"] == trainer.state.timestamp.batch.value
    assert facts["parameters"]["llm"]["parameters"] > 100_000
