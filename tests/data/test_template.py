"""The exact ids, text and labels of samples, and the rules of the template."""

import pytest

from tiny import byte_tokenizer
from vlm_composer.data.template import IGNORE_INDEX, IMAGE_TOKEN, Template

BOS, EOS = 256, 257


def template(**options):
    settings = {"num_image_tokens": 3, "max_seq_len": 64}
    return Template(byte_tokenizer(), **settings | options)


def byte_ids(text):
    return byte_tokenizer()(text, add_special_tokens=False).input_ids


SAMPLES = {
    "image first": (
        "<image>\nWhat?",
        "A cat.",
        [258, 258, 258, 198, 54, 71, 64, 83, 30, 198, 32, 220, 66, 64, 83, 13, 257],
        "<image_patch><image_patch><image_patch>\nWhat?\nA cat.<eos>",
    ),
    "image last": (
        "Say it.\n<image>",
        "Hi",
        [50, 64, 88, 220, 72, 83, 13, 198, 258, 258, 258, 198, 39, 72, 257],
        "Say it.\n<image_patch><image_patch><image_patch>\nHi<eos>",
    ),
    "image in the middle": (
        "a<image>b",
        "c",
        [64, 258, 258, 258, 65, 198, 66, 257],
        "a<image_patch><image_patch><image_patch>b\nc<eos>",
    ),
}


@pytest.mark.parametrize(("prompt", "answer", "ids", "text"), SAMPLES.values(), ids=SAMPLES.keys())
def test_ids_text_and_labels_are_pinned(prompt, answer, ids, text):
    made = template()
    sample = made.encode(prompt, answer)
    decoded = made.tokenizer.decode(sample.input_ids)
    print(f"{decoded!r}\n  ids    {sample.input_ids}\n  labels {sample.labels}")
    assert sample.input_ids == ids
    assert decoded == text
    num_loss = len(answer) + 1
    assert sample.labels == [IGNORE_INDEX] * (len(ids) - num_loss) + ids[-num_loss:]
    assert sample.num_cut == 0


def test_an_answer_that_is_too_long_is_cut_without_end_of_text():
    prompt = "<image>"
    sample = template(max_seq_len=8).encode(prompt, "abcdef")
    assert len(sample.input_ids) == 8
    assert sample.input_ids[4:] == byte_ids("abcd")
    assert sample.labels[4:] == byte_ids("abcd")
    assert sample.num_cut == 3  # e, f and the end-of-text


def test_an_answer_that_just_fits_keeps_its_end_of_text():
    sample = template(max_seq_len=8).encode("<image>", "abc")
    assert sample.input_ids[-1] == EOS
    assert sample.num_cut == 0


def test_a_prompt_without_room_for_an_answer_is_an_error_with_both_numbers():
    with pytest.raises(ValueError, match=r"the prompt is 9 tokens .* max_seq_len is 9"):
        template(max_seq_len=9).encode("12345<image>", "x")


@pytest.mark.parametrize(("prompt", "count"), [("none", 0), ("<image><image>", 2)])
def test_a_prompt_has_one_image(prompt, count):
    with pytest.raises(ValueError, match=f"this one has {count}"):
        template().encode(prompt, "x")


def test_special_tokens_in_the_data_are_plain_text():
    made = template()
    sample = made.encode("<image>", f"{IMAGE_TOKEN}<eos>")
    assert sample.input_ids.count(made.image_token_id) == 3
    assert sample.input_ids.count(EOS) == 1
    assert sample.input_ids[-1] == EOS
    assert made.encode(f"{IMAGE_TOKEN}<image>", "x").input_ids.count(made.image_token_id) == 3


def test_a_start_token_comes_once_and_only_where_asked_for():
    assert BOS not in template().encode("a<image>", "b").input_ids
    ids = template(add_bos=True).encode("a<image>", "b").input_ids
    assert ids[0] == BOS
    assert ids.count(BOS) == 1


def test_a_tokenizer_that_adds_a_start_token_keeps_its_habit():
    from tokenizers.processors import TemplateProcessing

    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", BOS)]
    )
    made = Template(tokenizer, num_image_tokens=3, max_seq_len=64)
    ids = made.encode("a<image>b", "c").input_ids
    assert ids == [
        BOS,
        *byte_ids("a"),
        *[made.image_token_id] * 3,
        *byte_ids("b\n"),
        *byte_ids("c"),
        EOS,
    ]


def test_the_image_token_is_added_once():
    tokenizer = byte_tokenizer()
    first = Template(tokenizer, num_image_tokens=1, max_seq_len=9)
    second = Template(tokenizer, num_image_tokens=1, max_seq_len=9)
    assert first.image_token_id == second.image_token_id == 258
    assert len(tokenizer) == 259


def test_a_tokenizer_without_end_of_text_is_refused():
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no end-of-text token"):
        Template(tokenizer, num_image_tokens=1, max_seq_len=9)
