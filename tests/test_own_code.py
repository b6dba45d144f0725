"""No code of a model's folder runs, whatever its files name and whatever is answered on stdin."""

import ast
import io
import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import constants
from safetensors.torch import load_file
from transformers import dynamic_module_utils

import convert
import vlm_composer
from convert import features, preview
from tiny import write_pairs
from vlm_composer import caption, plan, train
from vlm_composer.export import __main__ as export
from vlm_composer.models import own_code
from vlm_composer.models.own_code import load_tokenizer
from vlm_composer.models.tower_loading import load_language_model, load_vision_model, read_config

EVIL = "from pathlib import Path\nPath({mark!r}).touch()\nclass Evil: pass\ngenerate = Evil\n"


@pytest.fixture(autouse=True)
def watched(monkeypatch, tmp_path):
    """Answers every question with "y" and sees that no code was copied or run."""
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 99))
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    own_code._say.cache_clear()
    yield
    assert not (tmp_path / "ran").exists(), "code of the folder ran"
    assert not (tmp_path / "modules").exists(), "code of the folder was copied"


def load_vision_config(folder):
    return read_config(str(folder), "vision_config")


def changed(path, **values):
    """Change a JSON file's top level; None removes a key."""
    found = json.loads(path.read_text()) if path.is_file() else {}
    found = {key: value for key, value in (found | values).items() if value is not None}
    path.write_text(json.dumps(found))


def config(**values):
    return lambda folder: changed(folder / "config.json", **values)


def tokenizer(**values):
    return lambda folder: changed(folder / "tokenizer_config.json", **values)


def both(*changes):
    return lambda folder: [change(folder) for change in changes]


def own_generate(folder):
    (folder / "custom_generate").mkdir()
    shutil.copy(folder / "evil.py", folder / "custom_generate" / "generate.py")


EVIL_TOKENIZER = {"AutoTokenizer": ["evil.Evil", None]}
LANGUAGE = {
    "tokenizer": tokenizer(tokenizer_class="Evil", auto_map=EVIL_TOKENIZER),
    "tokenizer, fast": tokenizer(
        tokenizer_class="Evil", auto_map={"AutoTokenizer": [None, "evil.Evil"]}
    ),
    "tokenizer, legacy list": tokenizer(tokenizer_class="Evil", auto_map=["evil.Evil", None]),
    "tokenizer beside a known class": tokenizer(auto_map=EVIL_TOKENIZER),
    "tokenizer in the model's configuration": both(
        tokenizer(tokenizer_class=None), config(auto_map=EVIL_TOKENIZER)
    ),
    "tokenizer of another repository": tokenizer(
        tokenizer_class="Evil", auto_map={"AutoTokenizer": ["some/where--evil.Evil", None]}
    ),
    "configuration": config(model_type="evil", auto_map={"AutoConfig": "evil.Evil"}),
    "configuration of a known type": config(auto_map={"AutoConfig": "evil.Evil"}),
    "model of a known type": config(auto_map={"AutoModelForCausalLM": "evil.Evil"}),
    "part of a model": config(part={"auto_map": {"AutoModel": "evil.Evil"}}),
    "generate": own_generate,
    "attention kernel": config(_attn_implementation="some/where:evil"),
}
VISION = {
    "configuration": config(model_type="evil", auto_map={"AutoConfig": "evil.Evil"}),
    "model of a known type": config(auto_map={"AutoModel": "evil.Evil"}),
    "half of a model": config(
        model_type="siglip", vision_config={"auto_map": {"AutoModel": "evil.Evil"}}
    ),
    "attention kernel": config(part={"attn_implementation": "some/where:evil"}),
    "backbone": lambda folder: changed(
        folder / "config.json", model_type="dpt", is_hybrid=True, backbone=str(folder / "evil"),
        backbone_kwargs={"trust_remote_code": True},
    ),
}  # fmt: skip
NEEDS = "needs Python code of its own"


def attacked(source, folder, change, mark):
    """A copy of a tower with a file that leaves a mark, and a change that has it loaded."""
    shutil.copytree(source, folder)
    (folder / "evil.py").write_text(EVIL.format(mark=str(mark)))
    (folder / "evil").mkdir()
    shutil.copy(folder / "evil.py", folder / "evil" / "evil.py")
    auto = {"AutoConfig": "evil.Evil", "AutoBackbone": "evil.Evil"}
    changed(folder / "evil" / "config.json", model_type="evil", auto_map=auto)
    change(folder)
    return folder


@pytest.fixture
def hostile(tmp_path, towers):
    """Attacks one of the towers."""

    def build(part, change):
        name = "qwen3" if part == "language_model" else "siglip"
        return attacked(towers / name, tmp_path / "hostile", change, tmp_path / "ran")

    return build


CASES = [("language_model", name, change) for name, change in LANGUAGE.items()] + [
    ("vision_tower", name, change) for name, change in VISION.items()
]


@pytest.mark.parametrize(("part", "name", "change"), CASES, ids=[f"{p} {n}" for p, n, _ in CASES])
def test_a_folder_that_needs_code_is_refused(part, name, change, hostile, tiny_yaml, capsys):
    folder = hostile(part, change)
    path = str(tiny_yaml(**{part: {"name": str(folder), "dtype": "fp32"}}))
    for arguments in ([path], [path, "--preflight"]):
        assert train.main(arguments) == 1
        output = capsys.readouterr()
        lines = [line for line in (output.out + output.err).split("\n") if str(folder) in line]
        said = "names another model as a part" if name == "backbone" else NEEDS
        assert [line for line in lines if said in line], output
        assert "Traceback" not in output.err


def commands(path, data, out):
    """Each command that loads a tower or a tokenizer, for a yaml."""
    return {
        "plan": lambda: plan.main([path]),
        "features": lambda: features.main([path, "--out", str(out)]),
        "preview": lambda: preview.main([*data, "--yaml", path]),
    }


@pytest.mark.parametrize("command", ["plan", "features", "preview"])
@pytest.mark.parametrize(
    ("part", "name"), [("vision_tower", "configuration"), ("language_model", "configuration"),
                       ("language_model", "tokenizer"), ("language_model", "generate")],
)  # fmt: skip
def test_every_command_refuses_what_it_loads(
    command, part, name, hostile, tiny_yaml, tmp_path, capsys
):
    folder = hostile(part, (VISION if part == "vision_tower" else LANGUAGE)[name])
    path = str(tiny_yaml(**{part: {"name": str(folder), "dtype": "fp32"}}))
    pairs, images = write_pairs(tmp_path / "pairs", 3)
    data = ["--json", str(pairs), "--images", str(images)]
    status = commands(path, data, tmp_path / "out")[command]()
    output = capsys.readouterr()
    loads = {
        "plan": name != "tokenizer",
        "features": name != "tokenizer",
        "preview": name == "tokenizer" or part == "vision_tower",
    }[command]
    shown = output.out + output.err
    assert (NEEDS in shown and str(folder) in shown) == loads, shown
    if loads and not (command == "preview" and part == "vision_tower"):  # which it can do without
        assert status == 1


@pytest.mark.parametrize("name", ["tokenizer", "configuration", "generate"])
def test_export_refuses_a_tower_that_needs_code(name, qwen_export, hostile, tmp_path, capsys):
    folder = hostile("language_model", LANGUAGE[name])
    settings = yaml.safe_load((qwen_export.folder.parent / "run.yaml").read_text())
    settings["language_model"]["name"] = str(folder)
    (tmp_path / "changed.yaml").write_text(yaml.safe_dump(settings))
    arguments = [qwen_export.checkpoints, "--out", str(tmp_path / "out")]
    assert export.main([*arguments, "--yaml", str(tmp_path / "changed.yaml")]) == 1
    assert f"{folder} {NEEDS}" in capsys.readouterr().err


OF_EXPORTS = {
    **{name: LANGUAGE[name] for name in LANGUAGE if name.startswith("tokenizer")},
    "part": lambda folder: changed(
        folder / "config.json",
        vision_config={"model_type": "evil", "auto_map": {"AutoModel": "evil.Evil"}},
    ),
    "generate": own_generate,
    "attention kernel": config(_attn_implementation="some/where:evil"),
    "tower beside it": lambda folder: changed(
        folder / "config.json",
        towers={"vision_tower": {"name": str(folder.parent / "vision"), "revision": None},
                "language_model": {"name": str(folder.parent / "bad"), "revision": None,
                                   "vocab_size": 300}},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OF_EXPORTS)
def test_caption_runs_nothing_of_an_export(name, qwen_export, tmp_path, capsys):
    folder, around = tmp_path / "export", qwen_export.folder.parent
    shutil.copytree(around / "vision", tmp_path / "vision")
    attacked(around / "language", tmp_path / "bad", own_generate, tmp_path / "ran")
    attacked(qwen_export.folder, folder, OF_EXPORTS[name], tmp_path / "ran")
    assert caption.main([str(folder), str(qwen_export.pictures[0])]) == 1
    at = tmp_path / "bad" if name == "tower beside it" else folder
    assert f"{at} {NEEDS}" in capsys.readouterr().err


def test_files_that_are_not_loaded_are_not_asked_for(hostile, tiny_config):
    def change(folder):
        auto = {"AutoImageProcessor": "evil.Evil", "AutoProcessor": "evil.Evil"}
        changed(folder / "preprocessor_config.json", auto_map=auto)
        changed(folder / "processor_config.json", auto_map=auto)
        changed(folder / "config.json", auto_map={"AutoModelForImageClassification": "evil.Evil"})

    folder = str(hostile("vision_tower", change))
    load_vision_model(folder, pretrained=True, dtype=torch.float32)


def test_transformers_own_class_stands_in_for_one_of_its_name(hostile, towers, caplog):
    """Code that a folder still has of the time before transformers had the class."""

    def change(folder):
        auto = {"AutoConfig": "evil.Qwen3Config", "AutoModelForCausalLM": "evil.Qwen3ForCausalLM"}
        changed(folder / "config.json", auto_map=auto)
        names = ["evil.PreTrainedTokenizerFast", None]
        changed(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": names})

    folder = str(hostile("language_model", change))
    model = load_language_model(folder, pretrained=True, dtype=torch.float32)
    for name, weight in load_file(towers / "qwen3" / "model.safetensors").items():
        torch.testing.assert_close(model.state_dict()[name], weight, rtol=0, atol=0)
    assert (
        load_tokenizer(folder)("ab").input_ids == load_tokenizer(towers / "qwen3")("ab").input_ids
    )
    said = [one.message for one in caplog.records if "which is not run" in one.message]
    assert f"{folder} has code of its own for Qwen3ForCausalLM" in " ".join(said)


@pytest.mark.parametrize("name", ["configuration", "model of a known type"])
def test_a_model_of_the_hub_s_cache_is_refused_alike(name, hostile, tmp_path, monkeypatch):
    """As a download leaves it; the hub is not reached."""
    folder = hostile("language_model", LANGUAGE[name])
    repo = tmp_path / "hub" / "models--some--evil"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("a" * 40)
    shutil.copytree(folder, repo / "snapshots" / ("a" * 40))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("transformers.utils.hub.TRANSFORMERS_CACHE", str(tmp_path / "hub"))
    with pytest.raises(ValueError, match=f"^some/evil {NEEDS}"):
        read_config("some/evil", "text_config")


@pytest.mark.parametrize("auto_map", ["evil.Evil", ["evil.Evil"], 3, None])
def test_a_malformed_auto_map_is_refused(auto_map, hostile):
    folder = hostile(
        "vision_tower",
        lambda folder: (folder / "config.json").write_text(
            json.dumps(json.loads((folder / "config.json").read_text()) | {"auto_map": auto_map})
        ),
    )
    with pytest.raises(ValueError, match=r"auto_map in config.json is not an object"):
        read_config(str(folder), "vision_config")


@pytest.mark.parametrize("document", ["", "{", "[]", "3", "\ud800", "[" * 100_000])
@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_a_file_that_is_no_object_is_refused_in_a_line(document, file, hostile):
    folder = hostile("language_model", lambda folder: (folder / file).write_bytes(
        document.encode("utf-8", "surrogatepass")))  # fmt: skip
    load = load_tokenizer if file == "tokenizer_config.json" else load_vision_config
    with pytest.raises(ValueError, match=f"{folder}: {file} is not (a )?JSON"):
        load(folder)


@pytest.mark.parametrize("value", [3, [], {"a": 1}, True])
@pytest.mark.parametrize("key", ["model_type", "tokenizer_class"])
def test_names_of_another_type_are_refused_in_a_line(key, value, hostile):
    folder = hostile("language_model", both(
        tokenizer(tokenizer_class=None), config(**{key: value})))  # fmt: skip
    for load in (load_tokenizer, load_vision_config):
        with pytest.raises(ValueError, match=f"{folder}: {key} is .* and must be a name"):
            load(folder)


@pytest.mark.parametrize("value", [[], ["a.PreTrainedTokenizerFast"], [3, 4, 5], [{}, []]])
def test_a_malformed_list_of_tokenizers_is_refused(value, hostile):
    folder = hostile("language_model", tokenizer(auto_map=value))
    with pytest.raises(ValueError, match=NEEDS):
        load_tokenizer(folder)


class Pickled:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (Path(self.mark),)


@pytest.mark.parametrize("whole", [True, False], ids=["zip", "pickle"])
def test_weights_that_are_a_pickle_run_nothing(whole, hostile, tmp_path, tiny_yaml, capsys):
    def change(folder):
        (folder / "model.safetensors").unlink()
        hostile_weights = {"model.norm.weight": Pickled(str(tmp_path / "ran"))}
        if whole:
            torch.save(hostile_weights, folder / "pytorch_model.bin")
        else:
            (folder / "pytorch_model.bin").write_bytes(pickle.dumps(hostile_weights))

    folder = hostile("language_model", change)
    assert train.main([str(tiny_yaml(language_model={"name": str(folder)}))]) == 1
    assert str(folder / "pytorch_model.bin") in capsys.readouterr().err


def sources():
    for package in (vlm_composer, convert):
        for path in sorted(Path(package.__file__).parent.rglob("*.py")):
            yield path, ast.parse(path.read_text())


SAFE = {
    "from_pretrained": ("trust_remote_code", False),
    "from_config": ("trust_remote_code", False),
    "torch.load": ("weights_only", True),
    "np.load": ("allow_pickle", False),
}
"""What each call must pass."""
OURS = ("VLMComposer", "super()")
"""Receivers of `from_pretrained` that are concrete classes, which load no other code."""
UNSAFE = ("yaml.load", "yaml.unsafe_load", "yaml.full_load", "pickle.load", "dill.load",
          "joblib.load", "torch.hub.load", "pickle.Unpickler", "marshal.loads", "shelve.open",
          "eval", "exec")  # fmt: skip
SPARK = ("spark_engine.py", "pickle.loads(shipped.value)")
"""What Spark's driver sends its own workers."""


def fault(call):
    """What makes a call unsafe; None where it is not."""
    name = ast.unparse(call.func)
    last = name.rpartition(".")[2]
    rule = SAFE.get(name) or (SAFE.get(last) if last.startswith("from_") else None)
    if rule and not name.startswith(OURS):
        given = {k.arg: k.value.value for k in call.keywords if isinstance(k.value, ast.Constant)}
        return None if given.get(rule[0]) is rule[1] else f"{name} without {rule[0]}={rule[1]}"
    return f"{name}" if name in UNSAFE or name == "pickle.loads" else None


def test_every_call_that_could_run_code_is_told_not_to():
    found, seen = [], set()
    for path, tree in sources():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                seen.add(ast.unparse(node.func).rpartition(".")[2])
                why = fault(node)
                if why and (path.name, ast.unparse(node)) != SPARK:
                    found.append(f"{path}:{node.lineno}: {why}")
    assert found == []
    assert {"from_pretrained", "from_config", "load", "safe_load"} <= seen


@pytest.mark.parametrize("line", ["AutoModel.from_pretrained(x)", "auto.from_config(c, **o)",
    "AutoConfig.from_pretrained(x, trust_remote_code=True)", "torch.load(f)", "np.load(f)",
    "a.AutoTokenizer.from_pretrained(x, trust_remote_code=y)", "yaml.load(f)", "pickle.loads(b)",
    "np.load(f, allow_pickle=True)", "torch.load(f, weights_only=False)"])  # fmt: skip
def test_the_walk_finds_an_unsafe_call(line):
    assert fault(ast.parse(line).body[0].value) is not None
