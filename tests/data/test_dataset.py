"""From shards to batches and micro-batches."""

import numpy as np
import pytest
import torch
from composer.devices import DeviceCPU

from tiny import byte_tokenizer
from vlm_composer.data.by_index import CaptionsByIndex
from vlm_composer.data.collate import collate, num_samples, num_tokens, split_batch
from vlm_composer.data.dataset import SampleEncoder, StreamingCaptions
from vlm_composer.data.stream import CheckedStream
from vlm_composer.data.template import IGNORE_INDEX, Template


@pytest.fixture
def encoder():
    return SampleEncoder(
        Template(byte_tokenizer(), num_image_tokens=4, max_seq_len=64), image_size=16
    )


@pytest.fixture
def captions(encoder, shards):
    return StreamingCaptions(encoder, [stream_of(shards)], batch_size=4)


def stream_of(shards):
    return CheckedStream(local=str(shards / "train"), store_timeout=0)


def test_a_sample_of_the_shards_is_encoded(captions, encoder):
    sample = captions[1]
    assert sample["pixel_values"].shape == (3, 16, 16)
    text = encoder.template.tokenizer.decode(sample["input_ids"])
    answer = [token for token in sample["labels"].tolist() if token != IGNORE_INDEX]
    assert text.count("<image_patch>") == 4
    assert text.endswith(encoder.template.tokenizer.decode(answer))
    assert set(sample) == {"id", "pixel_values", "input_ids", "labels", "num_cut"}


def test_an_error_names_the_sample(shards):
    short = Template(byte_tokenizer(), num_image_tokens=4, max_seq_len=6)
    captions = StreamingCaptions(
        SampleEncoder(short, image_size=16), [stream_of(shards)], batch_size=4
    )
    with pytest.raises(ValueError, match=r"sample s\d+: the prompt is"):
        captions[0]


def test_an_image_that_cannot_be_read_names_the_sample(encoder):
    with pytest.raises(ValueError, match="sample x9: 3 bytes that are not"):
        encoder({"id": "x9", "image": b"abc", "prompt": "<image>", "answer": "y"})


def batch_of(captions, indices):
    return collate([captions[i] for i in indices])


def test_a_batch_holds_its_samples_and_no_padding(captions):
    batch = batch_of(captions, range(6))
    for row, index in enumerate(range(6)):
        sample = captions[index]
        assert batch["ids"][row] == sample["id"]
        assert torch.equal(batch["pixel_values"][row], sample["pixel_values"])
        assert batch["input_ids"][row].tolist() == sample["input_ids"].tolist()
        assert batch["labels"][row].tolist() == sample["labels"].tolist()


def test_only_pixels_move_with_the_batch(captions):
    moved = DeviceCPU().batch_to_device(batch_of(captions, range(2)) | {"probe": torch.ones(1)})
    assert isinstance(moved["input_ids"][1], np.ndarray)
    assert isinstance(moved["labels"][1], np.ndarray)
    assert isinstance(moved["pixel_values"], torch.Tensor)


@pytest.mark.parametrize("size", [1, 2, 4, 6, 9])
def test_microbatches_hold_the_batch(captions, size):
    batch = batch_of(captions, range(6))
    parts = split_batch(batch, size)
    assert [name for part in parts for name in part["ids"]] == batch["ids"]
    assert max(len(part["ids"]) for part in parts) <= size
    assert torch.equal(torch.cat([part["pixel_values"] for part in parts]), batch["pixel_values"])
    for key in ("input_ids", "labels"):
        assert [x.tolist() for part in parts for x in part[key]] == [x.tolist() for x in batch[key]]
    for key in ("total", "loss_generating"):
        assert sum(num_tokens(part)[key] for part in parts) == num_tokens(batch)[key]
    assert sum(map(num_samples, parts)) == 6


def test_loss_tokens_are_counted_as_the_model_takes_them(captions):
    batch = batch_of(captions, [0])
    answer = (captions[0]["labels"] != IGNORE_INDEX).sum()
    assert num_tokens(batch) == {
        "total": len(captions[0]["input_ids"]),
        "loss_generating": int(answer),
    }


def test_mismatched_images_are_those_of_another_sample(captions):
    right, wrong = CaptionsByIndex(captions), CaptionsByIndex(captions, image_shift=1)
    assert len(right) == len(wrong) == captions.num_samples
    for index in (0, 3, len(right) - 1):
        assert torch.equal(right[index]["input_ids"], wrong[index]["input_ids"])
        other = right[(index + 1) % len(right)]["pixel_values"]
        assert torch.equal(wrong[index]["pixel_values"], other)


@pytest.mark.parametrize("turns", [1, 2])
def test_a_shift_that_changes_nothing_is_refused(captions, turns):
    with pytest.raises(ValueError, match="gives each its own image"):
        CaptionsByIndex(captions, image_shift=turns * captions.num_samples)
