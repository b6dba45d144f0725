"""Compiled blocks compute what they replace, forward and backward, for any number of rows."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import Linear
from transformers import GemmaConfig, GemmaForCausalLM
from transformers.models.qwen3 import modeling_qwen3

from tiny import packed, tiny_llama, tiny_qwen3
from vlm_composer.assembly import assemble_model
from vlm_composer.models.frozen_blocks import FrozenRMSNorm, FrozenSwiGLU, compile_blocks
from vlm_composer.models.fused_gelu import GELULinear
from vlm_composer.models.language_model import LanguageModel
from vlm_composer.training import hardware

FC1 = "vision_model.encoder.layers.0.mlp.fc1"
LENGTHS = [(5, 9, 1), (2,), (4, 4), (2, 30), (20, 17, 3)]


def run(llm, rows, lengths, weights):
    rows = rows.clone().requires_grad_()
    ones = [torch.ones(n, dtype=torch.int64) for n in lengths]
    together = packed(ones, ones)
    hidden = llm.decode(rows.to(llm.model.dtype), together).float()
    return hidden, torch.autograd.grad((hidden * weights[together.answer_rows]).sum(), rows)[0]


def together(results):
    """Hidden states of several runs as one tensor, and their gradients as another."""
    return [torch.cat(parts) for parts in zip(*results, strict=True)]


def error(got, want):
    return ((got - want).norm() / want.norm()).item()


COMPILED = """
import sys, torch
from torch import nn
from vlm_composer.models.frozen_blocks import compile_blocks
if "told" in sys.argv:
    compile_blocks(nn.Module())
torch.compile(lambda x: nn.functional.silu(x) + 1)(torch.randn(300, 1000))
print(torch._dynamo.utils.counters["inductor"]["fxgraph_cache_hit"])
"""


@pytest.mark.slow
@pytest.mark.parametrize("told", [False, True])
def test_kernels_for_another_number_of_threads_are_not_taken(told, tmp_path):
    """Where the compiler is not told the number, they are: if that fails, torch has mended it."""
    hits = [
        subprocess.run(
            [sys.executable, "-c", COMPILED, *(["told"] if told else [])],
            cwd=Path(__file__).parents[2],
            env=os.environ | {"OMP_NUM_THREADS": threads, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.split()[-1]
        for threads in ("2", "1")
    ]
    assert hits == ["0", "0" if told else "1"]


@pytest.mark.slow
@pytest.mark.parametrize("model", [tiny_qwen3, tiny_llama], ids=lambda m: m.__name__)
def test_a_compiled_decoder_is_the_same_function(model):
    torch.compiler.reset()
    made = model()
    if model is tiny_qwen3:  # of trained models no norm is all ones
        with torch.no_grad():
            for name, parameter in made.named_parameters():
                if "norm" in name:
                    parameter.uniform_(0.5, 1.5)
    plain = LanguageModel(made)
    cases = []
    for lengths in LENGTHS:
        rows, weights = torch.randn(sum(lengths), 64), torch.randn(sum(lengths), 64)
        cases.append((rows, lengths, weights))
    expected = [run(plain, *case) for case in cases]
    rounded = LanguageModel(copy.deepcopy(made).bfloat16())
    theirs = [run(rounded, *case) for case in cases]

    names = list(plain.state_dict())
    assert len(compile_blocks(plain.model)) == 3  # the rotary embedding among them
    assert len(compile_blocks(rounded.model)) == 2
    assert list(plain.state_dict()) == names
    for case, want in zip(cases, expected, strict=True):
        for got, exact in zip(run(plain, *case), want, strict=True):
            assert error(got, exact) < 1e-5
    # In bf16 a few rows say little: hidden states and gradients of all cases together.
    ours = [run(rounded, *case) for case in cases]
    for got, in_bf16, exact in zip(*map(together, (ours, theirs, expected)), strict=True):
        assert error(got, exact) < 1.1 * error(in_bf16, exact)


@pytest.mark.slow
def test_one_kernel_serves_any_number_of_rows():
    torch.compiler.reset()
    llm = LanguageModel(tiny_qwen3())
    compile_blocks(llm.model)
    run(llm, torch.randn(12, 64), (5, 7), torch.randn(12, 64))
    run(llm, torch.randn(2, 64), (2,), torch.randn(2, 64))  # torch makes a kernel of its own for 1
    with torch.compiler.set_stance("fail_on_recompile"):
        for count in (3, 4, 17, 40):
            run(llm, torch.randn(count, 64), (count,), torch.randn(count, 64))


def test_only_what_is_known_letter_for_letter_is_replaced():
    gelu = tiny_llama(hidden_act="gelu")
    compile_blocks(gelu)
    kinds = {type(module) for module in gelu.modules()}
    assert FrozenRMSNorm in kinds
    assert FrozenSwiGLU not in kinds  # its gate is not SiLU
    config = GemmaConfig(
        vocab_size=300,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=16,
    )
    gemma = GemmaForCausalLM(config)  # its norm multiplies by 1 + weight
    compile_blocks(gemma)
    assert not {type(module) for module in gemma.modules()} & {FrozenRMSNorm, FrozenSwiGLU}


def test_replacing_twice_changes_nothing():
    model = tiny_qwen3()
    compile_blocks(model)
    rotary = modeling_qwen3.apply_rotary_pos_emb
    assert compile_blocks(model) == []
    assert modeling_qwen3.apply_rotary_pos_emb is rotary


@pytest.mark.slow
@pytest.mark.parametrize("model", [tiny_llama, tiny_qwen3], ids=lambda m: m.__name__)
def test_generation_is_unchanged(model):
    torch.compiler.reset()
    llm = LanguageModel(model())
    options = {"inputs_embeds": torch.randn(2, 5, 64), "max_new_tokens": 6, "do_sample": False}
    options |= {"pad_token_id": 0, "eos_token_id": None}
    before = llm.generate(**options)
    assert len(compile_blocks(llm.model)) == 3
    assert torch.equal(llm.generate(**options), before)


def test_a_cpu_without_a_compiler_cannot_compile(monkeypatch):
    assert hardware.compile_obstacle("cpu") is None
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", ("no-such-compiler",))
    assert hardware.compile_obstacle("cpu") == "torch finds no C++ compiler"


def test_what_a_yaml_insists_on_and_a_machine_cannot_do_is_refused(monkeypatch, tiny_config):
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", ("no-such-compiler",))
    with pytest.raises(
        ValueError, match=r"compile_blocks: true, but torch finds no C\+\+ compiler"
    ):
        assemble_model(tiny_config(compile_blocks=True), "cpu", 299)
    assemble_model(tiny_config(compile_blocks="auto"), "cpu", 299)


def test_a_gelu_for_a_cpu_is_refused_on_a_gpu(tiny_config):
    config = tiny_config()
    config.vision_tower.fuse_gelu = True
    with pytest.raises(ValueError, match="fuse_gelu: true, but it is for a CPU"):
        assemble_model(config, "gpu", 299)


def test_a_gelu_in_bf16_is_for_a_cpu_that_multiplies_it(monkeypatch, tiny_config):
    monkeypatch.setattr("torch.ops.mkldnn._is_mkldnn_bf16_supported", lambda: False)
    config = tiny_config()
    config.vision_tower.dtype = "bf16"
    assert type(assemble_model(config, "cpu", 299).vision_tower.model.get_submodule(FC1)) is Linear
    config.vision_tower.fuse_gelu = True
    with pytest.raises(ValueError, match="fuse_gelu: true, but oneDNN takes no bf16 on this CPU"):
        assemble_model(config, "cpu", 299)
    config.vision_tower.dtype = "fp32"
    fused = assemble_model(config, "cpu", 299).vision_tower.model.get_submodule(FC1)
    assert isinstance(fused, GELULinear)
