"""Ranks that could never meet and batches that are cut badly are told by what they are."""

import pytest

from vlm_composer.preflight.ranks import Placement, check_batch, check_ranks


@pytest.mark.parametrize("values", [(1, 1, 0, 0, 0), (4, 2, 3, 1, 1), (8, 8, 5, 0, 5)])
def test_ranks_that_fit(values):
    (found,) = check_ranks(Placement(*values), None)
    assert found.level == "ok"


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ((3, 2, 0, 0, 0), "3 ranks (WORLD_SIZE) are not a number of whole nodes of 2"),
        ((1, 2, 0, 0, 0), "1 rank (WORLD_SIZE) are not a number of whole nodes of 2"),
        ((3, 1, 2, 1, 0), "rank 2 of 3 (RANK, WORLD_SIZE) is not number 0 (LOCAL_RANK) of node 1"),
        ((4, 2, 2, 0, 0), "it gives --base_rank 0 on --node_rank 0"),
    ],
)
def test_ranks_that_would_wait_for_ever(values, text):
    (found,) = check_ranks(Placement(*values), None)
    assert found.level == "failure"
    assert text in str(found)


@pytest.mark.parametrize(
    ("gpus", "level", "text"),
    [
        (1, "failure", "2 ranks on this machine and 1 GPU; start with composer -n 1"),
        (2, "ok", "2 ranks on 1 node"),
        (8, "warning", "2 ranks on this machine and 8 GPUs; start with composer -n 8, or hide"),
    ],
)
def test_ranks_and_gpus(gpus, level, text):
    (found,) = check_ranks(Placement(2, 2), gpus)
    assert found.level == level
    assert text in str(found)


@pytest.mark.parametrize(
    ("microbatch", "level", "text"),
    [
        (4, "ok", "8 a step = 1 rank × 2 passes × 4"),
        (
            3,
            "warning",
            "the last pass of a step has 2. The gradient is right, the pass is slow; set 2",
        ),
        (16, "warning", "16 is more than the 8 samples of a rank"),
    ],
)
def test_how_a_batch_is_cut(tiny_config, microbatch, level, text):
    (found,) = check_batch(tiny_config(device_train_microbatch_size=microbatch), Placement())
    assert found.level == level
    assert text in str(found)


@pytest.mark.parametrize(("canonical", "refused"), [(1, False), (2, False), (4, False), (3, True)])
def test_canonical_nodes_that_streaming_would_refuse(tiny_config, shards, canonical, refused):
    dataset = {"local": str(shards / "train"), "num_canonical_nodes": canonical}
    config = tiny_config(
        train_loader={"dataset": dataset, "num_workers": 0}, device_train_microbatch_size=2
    )
    found = check_batch(config, Placement(4, 2))
    assert (found[0].level == "failure") == refused
    if refused:
        assert "num_canonical_nodes: 3 does not divide the 2 nodes" in found[0].text
