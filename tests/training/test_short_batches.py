"""Batches that do not divide into micro-batches, and an epoch's short last one, on two ranks."""

import pytest

from convert import convert_llava
from runs import run
from tiny import write_pairs


@pytest.mark.world_size(2)
@pytest.mark.parametrize("parallelism", ["replicate", "shard"])
def test_ranks_keep_in_step_at_a_batch_that_fills_no_micro_batch(
    tiny_config, tmp_path, shared_path, parallelism
):
    # Each rank's 6 samples are cut into 4 + 2; 45 samples leave it 5 in the last batch: 4 + 1, of
    # which streaming repeats one. FSDP2 hangs where ranks have different numbers of passes.
    if tmp_path == shared_path:
        json_path, images = write_pairs(shared_path / "pairs", 45)
        convert_llava(json_path, images, shared_path / "mds", eval_ratio=0, show_progress=False)
    config = tiny_config(
        train_loader={
            "dataset": {"local": str(shared_path / "mds" / "train")},
            "num_workers": 0,
            "drop_last": False,
        },
        global_train_batch_size=12,
        device_train_microbatch_size=4,
        max_duration="1ep",
        parallelism=parallelism,
        vision_tower={**_tower(tiny_config), "fuse_gelu": "auto"},
        dist_timeout=60,
    )
    _, _, watch = run(config)
    assert [len(ids) for ids in watch.ids] == [12, 12, 12, 10]
    assert len({name for ids in watch.ids for name in ids}) == 45


def _tower(tiny_config):
    tower = tiny_config().vision_tower
    return {"name": tower.name, "dtype": tower.dtype}
