"""From shards to batches and micro-batches."""

import numpy as np
import pytest
import torch
from composer.devices import DeviceCPU
from PIL import Image

from tiny import byte_tokenizer
from vlm_composer.data.batches import num_samples, num_tokens, split_batch
from vlm_composer.data.by_index import CaptionsByIndex
from vlm_composer.data.dataset import StreamingCaptions
from vlm_composer.data.encoder import BatchEncoder, Pixels
from vlm_composer.data.images import decode_image
from vlm_composer.data.stream import CheckedStream
from vlm_composer.data.template import IGNORE_INDEX, Template


@pytest.fixture
def encoder():
    return BatchEncoder(
        Template(byte_tokenizer(), num_image_tokens=4, max_seq_len=64),
        Pixels(16, Image.Resampling.BICUBIC, "torchvision"),
    )


@pytest.fixture
def captions(shards):
    return StreamingCaptions(
        [CheckedStream(local=str(shards / "train"), store_timeout=0)], batch_size=4
    )


@pytest.fixture
def batch_of(captions, encoder):
    return lambda indices: encoder([captions[index] for index in indices])


def test_a_batch_holds_its_samples_and_no_padding(captions, encoder, batch_of):
    batch = batch_of(range(6))
    assert batch.keys() == {"ids", "pixel_values", "input_ids", "labels", "num_cut"}
    assert batch["pixel_values"].shape == (6, 3, 16, 16)
    for row, index in enumerate(range(6)):
        record = captions[index]
        expected = encoder.template.encode(record["prompt"], record["answer"])
        assert batch["ids"][row] == record["id"]
        assert torch.equal(batch["pixel_values"][row], decode_image(record["image"], 16))
        assert torch.equal(batch["pixel_values"][row], encoder.image(record))
        assert batch["input_ids"][row].tolist() == expected.input_ids
        assert batch["labels"][row].tolist() == expected.labels
        assert batch["input_ids"][row].dtype == batch["labels"][row].dtype == np.int64


def test_an_error_names_the_sample(captions):
    short = Template(byte_tokenizer(), num_image_tokens=4, max_seq_len=6)
    with pytest.raises(ValueError, match=r"sample s\d+: the prompt is"):
        BatchEncoder(short, Pixels(16, Image.Resampling.BICUBIC, "torchvision"))([captions[0]])


def test_an_image_that_cannot_be_read_names_the_sample(captions, encoder):
    broken = {"id": "x9", "image": b"abc", "prompt": "<image>", "answer": "y"}
    with pytest.raises(ValueError, match="sample x9: 3 bytes that are not"):
        encoder([captions[0], broken])


def test_only_pixels_move_with_the_batch(batch_of):
    moved = DeviceCPU().batch_to_device(batch_of(range(2)) | {"probe": torch.ones(1)})
    assert isinstance(moved["input_ids"][1], np.ndarray)
    assert isinstance(moved["labels"][1], np.ndarray)
    assert isinstance(moved["pixel_values"], torch.Tensor)


@pytest.mark.parametrize("size", [1, 2, 4, 6, 9])
def test_microbatches_hold_the_batch(batch_of, size):
    batch = batch_of(range(6))
    parts = split_batch(batch, size)
    assert [name for part in parts for name in part["ids"]] == batch["ids"]
    assert max(len(part["ids"]) for part in parts) <= size
    assert torch.equal(torch.cat([part["pixel_values"] for part in parts]), batch["pixel_values"])
    for key in ("input_ids", "labels"):
        assert [x.tolist() for part in parts for x in part[key]] == [x.tolist() for x in batch[key]]
    for key in ("total", "loss_generating"):
        assert sum(num_tokens(part)[key] for part in parts) == num_tokens(batch)[key]
    assert sum(map(num_samples, parts)) == 6


def test_loss_tokens_are_counted_as_the_model_takes_them(batch_of):
    batch = batch_of([0, 1])
    assert num_tokens(batch) == {
        "total": sum(map(len, batch["input_ids"])),
        "loss_generating": sum(int((row != IGNORE_INDEX).sum()) for row in batch["labels"]),
    }


def test_mismatched_images_are_those_of_another_sample(captions):
    right, wrong = CaptionsByIndex(captions), CaptionsByIndex(captions, image_shift=1)
    assert len(right) == len(wrong) == captions.num_samples
    for index in (0, 3, len(right) - 1):
        other = right[(index + 1) % len(right)]
        assert wrong[index] == right[index] | {"image": other["image"]}


@pytest.mark.parametrize("turns", [1, 2])
def test_a_shift_that_changes_nothing_is_refused(captions, turns):
    with pytest.raises(ValueError, match="gives each its own image"):
        CaptionsByIndex(captions, image_shift=turns * captions.num_samples)
