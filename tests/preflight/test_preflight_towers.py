"""Towers and tokenizer are judged by their configurations, with no weight read."""

import json
import re
import shutil

import pytest
from huggingface_hub import constants
from tokenizers import Tokenizer, models
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    PixtralVisionConfig,
    PixtralVisionModel,
    PreTrainedTokenizerFast,
)

from tiny import byte_tokenizer, save_tower, tiny_qwen3, tiny_siglip
from vlm_composer import train
from vlm_composer.data.template import IMAGE_TOKEN, Template, check_token_ids
from vlm_composer.preflight.report import PreflightError
from vlm_composer.preflight.towers import (
    check_language_model,
    check_tokenizer,
    check_vision_tower,
)


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def texts(found, level):
    return [str(finding) for finding in found if finding.level == level]


def test_towers_that_can_be_had(tiny_config, towers):
    config = tiny_config(vision_tower={"name": str(towers / "siglip"), "layer": -2})
    (vision,) = texts(check_vision_tower(config), "ok")
    assert vision == f"{towers}/siglip: 2 layers, 16 patches of 32 × 32 pixels"
    (language,) = texts(check_language_model(config), "ok")
    assert language == f"{towers}/qwen3: 3 layers, width 64"
    (tokenizer,) = texts(check_tokenizer(config), "ok")
    assert tokenizer == f"{towers}/qwen3: <image_patch> is 258, in a table of 300 rows"


def test_a_table_without_a_spare_row(tiny_config, tmp_path, towers):
    tiny_qwen3(vocab_size=258).save_pretrained(tmp_path / "small")
    changes = {"name": str(tmp_path / "small"), "tokenizer": str(towers / "qwen3")}
    (text,) = texts(check_tokenizer(tiny_config(language_model=changes)), "ok")
    assert "the table of 258 rows has none to spare and will be resized to 259, frozen" in text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "{towers}/siglip", "layer": 4}, "hidden states -4 to 3"),
        ({"name": "{towers}/siglip", "image_size": 7}, "7 is less than one patch of 8 pixels"),
        ({"name": "{towers}/nothing"}, "there is no folder"),
        ({"name": "google/vit-base"}, "HF_HUB_OFFLINE is set; check the name, download it first"),
    ],
)
def test_a_vision_tower_that_cannot_be_used(tiny_config, towers, changes, message):
    changes |= {"name": changes["name"].format(towers=towers)}
    (text,) = texts(check_vision_tower(tiny_config(vision_tower=changes)), "failure")
    assert message in text


def test_a_vision_tower_for_a_language_model(tiny_config, towers):
    changes = {"name": str(towers / "siglip"), "tokenizer": str(towers / "nothing")}
    config = tiny_config(language_model=changes)
    (text,) = texts(check_language_model(config), "failure")
    assert "which transformers has no causal language model for" in text
    (text,) = texts(check_tokenizer(config), "failure")
    assert f"there is no folder {towers}/nothing" in text


def test_what_sharding_and_positions_allow(tiny_config, towers):
    config = tiny_config(
        language_model={"name": str(towers / "llama")}, parallelism="shard", max_seq_len=513
    )
    found = check_language_model(config)
    assert "tie_word_embeddings" in texts(found, "failure")[0]
    config.parallelism = "replicate"
    (found,) = [f for f in check_language_model(config) if f.level != "ok"]
    assert found.level == "failure"
    assert str(found) == (
        f"max_seq_len: 513 is more than the 512 positions of {towers / 'llama'} "
        "(max_position_embeddings); set 512 or less"
    )
    config.max_seq_len = 512
    assert not [f for f in check_language_model(config) if f.level != "ok"]


def test_weights_that_are_not_all_there(tiny_config, tmp_path):
    folder = tmp_path / "siglip"
    tiny_siglip().save_pretrained(folder, max_shard_size="50kB")
    names = set(
        json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"].values()
    )
    changes = {"name": str(folder)}
    assert not texts(check_vision_tower(tiny_config(vision_tower=changes)), "failure")
    lost = folder / max(names)
    lost.unlink()
    (text,) = texts(check_vision_tower(tiny_config(vision_tower=changes)), "failure")
    assert f"lacks 1 of its {len(names)} files of weights, the first is {lost.name}" in text
    for path in folder.glob("model*"):
        path.unlink()
    (text,) = texts(check_vision_tower(tiny_config(vision_tower=changes)), "failure")
    assert f"{folder} has no model.safetensors" in text
    changes["pretrained"] = False
    assert not texts(check_vision_tower(tiny_config(vision_tower=changes)), "failure")


def test_a_hub_that_cannot_be_reached_is_told_at_once(tiny_config, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    (text,) = texts(check_vision_tower(tiny_config(vision_tower={"name": "no/one"})), "failure")
    assert "the hub (http://127.0.0.1:9) cannot be reached; check the name and the network" in text


def tokenizer_of(folder, extra=(), special=()):
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(list(extra))
    tokenizer.add_special_tokens({"additional_special_tokens": list(special)})
    tokenizer.save_pretrained(folder)
    return folder


MANY = [f"word{index}" for index in range(1000)]


@pytest.mark.parametrize(
    ("rows", "extra", "special", "beyond"),
    [
        (
            300,
            MANY,
            (),
            "1,258 tokens with ids up to 1,257 ('word999')",
        ),
        (258, (), ("<|im_start|>",), "259 tokens with ids up to 258 ('<|im_start|>')"),
        (257, (), (), "258 tokens with ids up to 257 ('<eos>')"),
    ],
    ids=["of a larger model", "one special token more", "no row for the start token"],
)
def test_a_tokenizer_of_another_model_is_refused_with_both_sizes(
    tiny_config, tmp_path, rows, extra, special, beyond
):
    tiny_qwen3(vocab_size=rows).save_pretrained(tmp_path / "model")
    tokenizer = tokenizer_of(tmp_path / "tokenizer", extra, special)
    changes = {"name": str(tmp_path / "model"), "tokenizer": str(tokenizer)}
    config = tiny_config(language_model=changes)
    (text,) = texts(check_tokenizer(config), "failure")
    assert f"the tokenizer {tokenizer} has {beyond}, and {tmp_path}/model has {rows} rows" in text
    assert text.endswith("have none; set language_model.tokenizer to the model's own")
    with pytest.raises(PreflightError, match=re.escape(text)):
        train.prepare(config)


def test_the_image_token_alone_may_lack_a_row(tiny_config, tmp_path):
    tiny_qwen3(vocab_size=258).save_pretrained(tmp_path / "model")
    for special in ((), (IMAGE_TOKEN,)):  # added by the run, or saved with the tokenizer
        tokenizer = tokenizer_of(tmp_path / "tokenizer", special=special)
        changes = {"name": str(tmp_path / "model"), "tokenizer": str(tokenizer)}
        found = check_tokenizer(tiny_config(language_model=changes))
        assert [finding.level for finding in found] == ["ok"]
        assert "will be resized to 259, frozen" in found[0].text


def test_a_tokenizer_with_holes_counts_by_its_ids(tmp_path):
    vocabulary = byte_tokenizer().get_vocab()
    vocabulary = {token: id for token, id in vocabulary.items() if id < 256} | {"zz": 400}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.BPE(vocab=vocabulary, merges=[])), eos_token="a"
    )
    check_token_ids(tokenizer, 401, name="it", language_model="a model")
    with pytest.raises(
        ValueError, match=r"257 tokens with ids up to 400 \('zz'\), .* has 400 rows"
    ):
        check_token_ids(tokenizer, 400, name="it", language_model="a model")
    vocabulary["zz"] = 257  # where the next token that is added goes
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.BPE(vocab=vocabulary, merges=[])), eos_token="a"
    )
    with pytest.raises(ValueError, match="<image_patch> would have id 257, which another token"):
        Template(tokenizer, num_image_tokens=4, max_seq_len=64)


def test_another_tokenizer_whose_ids_fit_is_warned_of(tiny_config, towers, tmp_path):
    vocabulary = sorted(byte_tokenizer().get_vocab().items(), key=lambda item: item[1])
    shifted = {token: (id + 1) % 256 for token, id in vocabulary if id < 256}
    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.BPE(vocab=shifted, merges=[])), eos_token="!"
    ).save_pretrained(tmp_path)
    changes = {"name": str(towers / "qwen3"), "tokenizer": str(tmp_path)}
    (text,) = texts(check_tokenizer(tiny_config(language_model=changes)), "warning")
    assert "has another id, or none, for 258 of the 258 tokens of" in text
    assert "leave language_model.tokenizer out" in text
    changes["tokenizer"] = str(towers / "llama")  # another folder, the same tokenizer
    assert not texts(check_tokenizer(tiny_config(language_model=changes)), "warning")


def test_an_architecture_that_cannot_be_used_is_a_line_of_preflight_and_of_a_run(
    tiny_config, tiny_yaml, tmp_path, capsys
):
    sizes = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    PixtralVisionModel(
        PixtralVisionConfig(**sizes, intermediate_size=96, image_size=32, patch_size=8)
    ).save_pretrained(tmp_path / "pixtral")
    changes = {"vision_tower": {"name": str(tmp_path / "pixtral")}}
    found = check_vision_tower(tiny_config(**changes))
    (text,) = texts(found, "failure")
    assert "is a pixtral (PixtralVisionModel), which cannot be a vision tower here" in text
    assert train.main([str(tiny_yaml(**changes))]) == 1
    said = capsys.readouterr().err.splitlines()
    assert sum("which cannot be a vision tower here" in line for line in said) == 1
    assert not any("Traceback" in line or "object has no attribute" in line for line in said)
    assert train.main([str(tiny_yaml(**changes)), "--preflight"]) == 1
    assert f"✗                 {text}\n" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["mixtral", "mamba", "bloom"])
def test_experts_states_and_biased_attention_train(kind, tiny_yaml, tmp_path, capsys):
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 300}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 96}
    of_kind = {"mixtral": heads, "mamba": {"state_size": 8}, "bloom": {"n_head": 4}}
    config = CONFIG_MAPPING[kind](**sizes, **of_kind[kind])
    model = AutoModelForCausalLM.from_config(config)
    path = tiny_yaml(
        language_model={"name": str(save_tower(model, tmp_path / kind)), "dtype": "fp32"},
        max_duration="1ba",
        callbacks={"evidence": {"num_samples": 4}, "captions": {"num_images": 2}},
    )
    assert train.main([str(path), "--preflight"]) == 0
    inconclusive = "! memory          memory of a micro-batch is inconclusive"
    assert (inconclusive in capsys.readouterr().out) == (kind == "mixtral")
    assert train.main([str(path)]) == 0


def test_what_is_assumed_of_images_is_said_once(tiny_yaml, towers, tmp_path, capfd):
    tower = shutil.copytree(towers / "siglip", tmp_path / "bare")
    (tower / "preprocessor_config.json").unlink()
    path = tiny_yaml(vision_tower={"name": str(tower), "dtype": "fp32"}, max_duration="1ba")
    for arguments in ([str(path), "--preflight"], [str(path)]):
        assert train.main(arguments) == 0
        said = "".join(capfd.readouterr())
        assert said.count("has no preprocessor_config.json: mean and std 0.5, bicubic") == 1
