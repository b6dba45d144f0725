"""What `max_seq_len` must hold and may be, known before a run: the longest prompts of a data set,
from its conversion, and the positions of the language model."""

import json

import pytest
from PIL import Image
from transformers import OPTConfig, OPTForCausalLM

from convert import convert_llava, convert_pairs
from convert.sources import LlavaJson
from runs import run, start
from tiny import save_tower, write_pairs
from vlm_composer import train
from vlm_composer.preflight.prompts import check_prompts
from vlm_composer.preflight.report import PreflightError

LONG = "<image>\n" + "very " * 9 + "long?"
TOKENS = len(LONG) - len("<image>") + 1 + 4
"""Of `LONG` under the byte tokenizer, with the newline behind it and four image tokens."""


def pairs(folder, prompt=None, number=3, count=47):
    """Coloured pairs, one of which may have another prompt."""
    json_path, images = write_pairs(folder, count)
    if prompt is not None:
        items = json.loads(json_path.read_text())
        items[number]["conversations"][0]["value"] = prompt
        json_path.write_text(json.dumps(items))
    return json_path, images


@pytest.fixture
def config_over(tiny_config):
    """A configuration over the two sides of a conversion."""

    def make(folder, **changes):
        loaders = {
            f"{side}_loader": {"dataset": {"local": str(folder / side)}, "num_workers": 0}
            for side in ("train", "eval")
        }
        return tiny_config(**loaders | changes)

    return make


@pytest.fixture
def converted(tmp_path):
    folder = tmp_path / "mds"
    convert_llava(*pairs(tmp_path / "pairs", LONG), folder, eval_ratio=0.15, show_progress=False)
    return folder


def test_a_prompt_without_room_for_an_answer_is_refused_before_the_towers_are_loaded(
    config_over, converted, capsys
):
    with pytest.raises(PreflightError) as raised:
        start(config_over(converted, max_seq_len=TOKENS))
    assert str(raised.value) == (
        f"prompts: train: {converted}/train has a prompt of {TOKENS} tokens with its image, and "
        f"max_seq_len is {TOKENS}: no token is left for the answer to "
        f"'<image>\\nvery very very very very very very very very long?'; set max_seq_len to more "
        f"than {TOKENS}, or convert without it"
    )
    assert " parameters, " not in capsys.readouterr().err


def test_a_token_more_is_enough_for_the_whole_run(config_over, converted):
    _, _, watch = run(config_over(converted, max_seq_len=TOKENS + 1, max_duration="1ep"))
    assert len(watch.losses) == 5


def test_the_preflight_says_it(tiny_yaml, converted, capsys):
    loader = {"dataset": {"local": str(converted / "train")}, "num_workers": 0}
    path = tiny_yaml(train_loader=loader, max_seq_len=40)
    assert train.main([str(path), "--preflight"]) == 1
    said = capsys.readouterr().out
    assert f"✗ prompts         train: {converted}/train has a prompt of {TOKENS} tokens" in said
    assert f"→ set max_seq_len to more than {TOKENS}, or convert without it" in said


def test_data_without_the_statistic_are_read_until_the_sample_comes(tiny_yaml, converted, capsys):
    (converted / "quality.json").unlink()
    loader = {"dataset": {"local": str(converted / "train")}, "num_workers": 0}
    path = tiny_yaml(train_loader=loader, max_seq_len=TOKENS, max_duration="1ep", eval_loader=None)
    assert train.main([str(path)]) == 1
    said = capsys.readouterr().err
    assert f"error on rank 0: sample s3: the prompt is {TOKENS} tokens with its image" in said


def test_a_side_and_a_source_answer_for_themselves(config_over, tmp_path):
    sources = [
        LlavaJson(*pairs(tmp_path / "pairs" / name, prompt), 1 << 20, name=name)
        for name, prompt in (("long", LONG), ("short", None))
    ]
    for path in (tmp_path / "pairs" / "long" / "images").iterdir():  # none is in both
        with Image.open(path) as image:
            image.resize((50, image.width * image.height)).save(path)
    convert_pairs(sources, tmp_path / "mds", eval_ratio=0.15, show_progress=False)
    for name, faults in (("long", 1), ("short", 0)):
        found = check_prompts(config_over(tmp_path / "mds" / name, max_seq_len=TOKENS))
        assert len(found) == faults
    streams = {
        name: {"local": str(tmp_path / "mds" / name / "train")} for name in ("long", "short")
    }
    config = config_over(
        tmp_path / "mds" / "short", max_seq_len=TOKENS, train_loader={"streams": streams}
    )
    (found,) = check_prompts(config)
    assert found.text.startswith(f"train: {tmp_path}/mds/long/train has a prompt of {TOKENS} ")
    config = config_over(tmp_path / "mds" / "short", max_seq_len=TOKENS)
    config.eval_loader.dataset.local = str(tmp_path / "mds" / "long" / "train")
    (found,) = check_prompts(config)
    assert found.text.startswith(f"eval: {tmp_path}/mds/long/train has a prompt")


def test_shards_behind_a_remote_are_looked_up_there(config_over, converted, tmp_path):
    dataset = {"local": str(tmp_path / "cache"), "remote": f"{converted}/train/"}
    config = config_over(converted, max_seq_len=TOKENS, train_loader={"dataset": dataset})
    (found,) = check_prompts(config)
    assert f"a prompt of {TOKENS} tokens" in found.text


@pytest.mark.s3
def test_sources_in_a_bucket_are_looked_up_there(config_over, s3_server, tmp_path):
    bucket = s3_server.make_bucket("prompts")
    sources = [LlavaJson(*pairs(tmp_path / "pairs", LONG), 1 << 20, name="llava")]
    convert_pairs(sources, f"{bucket}/mds", eval_ratio=0, show_progress=False)
    dataset = {"local": str(tmp_path / "cache"), "remote": f"{bucket}/mds/llava/train"}
    settings = {"train_loader": {"dataset": dataset}, "eval_loader": None, "max_seq_len": 40}
    (found,) = check_prompts(config_over(tmp_path, **settings))
    assert f"{bucket}/mds/llava/train has a prompt of {TOKENS} tokens" in found.text
    dataset["remote"] = f"{bucket}/elsewhere/train"
    assert not check_prompts(config_over(tmp_path, **settings))


@pytest.mark.parametrize("content", ["{", "[]", '{"longest_prompts": {"train": [{"bytes": 3}]}}'])
def test_a_damaged_statistic_is_named(config_over, converted, content):
    (converted / "quality.json").write_text(content)
    (found,) = [f for f in check_prompts(config_over(converted)) if "train" in f.text][:1]
    assert found.level == "failure"
    assert found.text.startswith(f"the quality.json of {converted}/train cannot be read (")


@pytest.mark.parametrize("before", ["", "<image>\n"])
def test_a_prompt_that_is_listed_by_its_beginning_is_long_enough(config_over, tmp_path, before):
    prompt = before + "far too long " * 1000 + ("" if before else "\n<image>")
    convert_llava(
        *pairs(tmp_path / "pairs", prompt),
        tmp_path / "mds",
        eval_ratio=0.15,
        show_progress=False,
    )
    (found,) = check_prompts(config_over(tmp_path / "mds", max_seq_len=2000))
    assert f"{tmp_path}/mds/train has a prompt of at least " in found.text


def test_a_run_uses_every_learned_position_and_asks_for_no_more(tiny_config, tmp_path):
    shape = OPTConfig(
        vocab_size=300,
        hidden_size=64,
        ffn_dim=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        word_embed_proj_dim=64,
        max_position_embeddings=36,
    )
    tower = {"name": str(save_tower(OPTForCausalLM(shape), tmp_path / "opt")), "dtype": "fp32"}
    config = tiny_config(language_model=tower, max_seq_len=36, max_duration="1ep")
    _, _, watch = run(config)
    lengths = [len(ids) for batch in watch.batches for ids in batch["input_ids"]]
    assert max(lengths) == 36
    config.max_seq_len = 37
    with pytest.raises(PreflightError, match="max_seq_len: 37 is more than the 36 positions of"):
        start(config)
