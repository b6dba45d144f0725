"""What makes a language model fast is used where it computes what the model computes, and nowhere
else; decisions and gradients are held against Hugging Face's own model, a sample at a time."""

import copy
import logging

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from tiny import IMAGE, K, batch_of, packed, tiny_llama, tiny_qwen3
from vlm_composer.models.language_model import LanguageModel
from vlm_composer.models.self_check import Levers, check_levers

ROWS = ((2, 3, 4), (0, 2, 3), (5, 0, 6))
SMALL = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
"""For any architecture; each takes what it knows."""
NAMES = {
    "gpt2": {"n_embd": 64, "n_layer": 4, "n_head": 4, "n_positions": 128},
    "bloom": {"n_layer": 4, "n_head": 4},
    "falcon": {"new_decoder_architecture": True, "num_kv_heads": 2},
    "gemma2": {"head_dim": 16, "final_logit_softcapping": None},
    "gemma3_text": {"head_dim": 16, "sliding_window": 64},
    "minimax": {
        "head_dim": 16,
        "num_local_experts": 4,
        "block_size": 8,
        "layer_types": ["linear_attention", "full_attention"] * 2,
    },
    "mixtral": {"num_local_experts": 4},
    "qwen3_moe": {
        "head_dim": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
    },
    "mamba": {"state_size": 8},
    "mamba2": {"num_heads": 8, "head_dim": 16, "n_groups": 2, "state_size": 8, "chunk_size": 8},
    "rwkv": {"attention_hidden_size": 64, "context_length": 128},
    "bamba": {"attn_layer_indices": [1, 3], "mamba_n_heads": 8, "mamba_d_head": 16,
              "mamba_n_groups": 1, "mamba_d_state": 8, "mamba_chunk_size": 8},
    "jamba": {"num_experts": 2, "attn_layer_period": 2, "attn_layer_offset": 1,
              "use_mamba_kernels": False, "mamba_d_state": 8, "mamba_dt_rank": 4},
    "recurrent_gemma": {"lru_width": 64, "head_dim": 16, "attention_window_size": 64,
                        "logits_soft_cap": None, "block_types": ["recurrent", "attention"]},
    "phi": {"head_dim": 16},
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 64},
}  # fmt: skip
PACKED = (
    *("llama", "qwen2", "qwen3", "mistral", "gemma", "gemma3_text", "phi3", "phi", "gpt_neox"),
    *("olmo2", "cohere", "mixtral", "qwen3_moe", "granite", "glm4", "starcoder2"),
)
PADDED = (
    "gemma2",
    "minimax",
    "stablelm",
    "gpt2",
    "opt",
    "falcon",
    "bloom",
    "mamba",
    "bamba",
    "jamba",
)


def tiny(kind, **changes):
    """A model of any architecture, with weights wide enough for its output to depend on all."""
    settings = SMALL | NAMES.get(kind, {}) | changes
    known = AutoConfig.for_model(kind).to_dict()
    known |= type(AutoConfig.for_model(kind)).attribute_map | NAMES.get(kind, {})
    config = AutoConfig.for_model(kind, **{k: v for k, v in settings.items() if k in known})
    for unit in ("logit_scale", "logits_scaling"):
        if hasattr(config, unit):
            setattr(config, unit, 1.0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(3)
    return model.eval()


def gradients_of_ours(model):
    """The loss and the gradient of the image tokens, all samples in one batch."""
    llm = LanguageModel(copy.deepcopy(model))
    _, ids, labels = samples()
    rows = packed(ids, labels)
    images = image_tokens(model).requires_grad_()
    embeds = llm.embed(rows.input_ids).index_copy(0, rows.image_rows, images.flatten(0, 1))
    loss = llm.head(llm.decode(embeds, rows), rows.targets)
    return llm, loss.detach(), torch.autograd.grad(loss, images)[0]


def gradients_of_theirs(model):
    """The same by Hugging Face's model, a sample at a time, by its literal attention."""
    model.config._attn_implementation = "eager"
    images = image_tokens(model).requires_grad_()
    total = torch.zeros(())
    for place, (ids, labels) in enumerate(zip(*samples()[1:], strict=True)):
        embeds = model.get_input_embeddings()(ids)
        at = (ids == IMAGE).nonzero().squeeze(1)
        embeds = embeds.index_copy(0, at, images[place])
        logits = model(inputs_embeds=embeds[None], use_cache=False).logits[0]
        total = total + nn.functional.cross_entropy(
            logits[:-1], labels[1:], ignore_index=-100, reduction="sum"
        )
    return total.detach(), torch.autograd.grad(total, images)[0]


def samples():
    torch.manual_seed(5)
    return batch_of(ROWS)


def image_tokens(model):
    width = model.get_input_embeddings().weight.shape[1]
    return torch.randn(len(ROWS), K, width, generator=torch.Generator().manual_seed(6))


def check_exact(model):
    """Ours equals theirs; returns our language model."""
    llm, loss, gradient = gradients_of_ours(model)
    expected_loss, expected = gradients_of_theirs(model)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=1e-5)
    assert (gradient - expected).norm() <= 2e-5 * expected.norm()
    return llm


@pytest.mark.parametrize("kind", PACKED)
def test_architectures_that_mix_tokens_in_their_attention_alone_are_packed(kind):
    assert check_exact(tiny(kind)).packs


@pytest.mark.parametrize("kind", PADDED)
def test_other_architectures_read_a_padded_view_and_are_exact(kind):
    assert not check_exact(tiny(kind)).packs


def test_the_linear_attention_of_minimax_is_found_and_reported(caplog):
    llm = LanguageModel(tiny("minimax"))
    assert not llm.packs
    assert "Not used for MiniMaxForCausalLM: packed rows: hidden states differ by" in caplog.text


class MixingLayer(LlamaDecoderLayer):
    """A decoder layer with a short causal convolution between tokens; its forward is Llama's."""

    def __init__(self, config, layer_idx, causal=True, gate=1.0):
        super().__init__(config, layer_idx)
        inner = self.input_layernorm
        self.input_layernorm = Convolution(config.hidden_size, inner, causal, gate)


class Convolution(nn.Module):
    def __init__(self, width, norm, causal, gate):
        super().__init__()
        self.norm, self.causal = norm, causal
        self.kernel = nn.Conv1d(width, width, 3, groups=width, bias=False)
        self.gate = nn.Parameter(torch.full((width,), float(gate)))

    def forward(self, hidden):
        pad = (2, 0) if self.causal else (1, 1)
        mixed = self.kernel(nn.functional.pad(hidden.mT, pad)).mT
        return self.norm(hidden + self.gate * mixed)


def with_convolution(at=1, **options):
    model = LlamaForCausalLM(LlamaConfig(**SMALL)).eval()
    model.model.layers[at] = MixingLayer(model.config, at, **options).eval()
    return model


@pytest.mark.parametrize("at", range(4))
def test_a_convolution_between_tokens_of_any_layer_is_found(at):
    assert not check_exact(with_convolution(at)).packs


def test_a_convolution_behind_a_closed_gate_is_found():
    levers = check_levers(with_convolution(gate=0.0))
    assert not levers.packs
    assert "packed rows: hidden states differ" in levers.refused[0]


def test_a_decoder_that_looks_ahead_is_refused():
    with pytest.raises(ValueError, match=r"LlamaModel does not give .*hidden states differ by"):
        LanguageModel(with_convolution(causal=False))


class Doubled(nn.Module):
    def __init__(self, inner, factor=2.0):
        super().__init__()
        self.inner, self.factor = inner, factor

    def forward(self, *arguments, **options):
        return self.factor * self.inner(*arguments, **options)


def test_a_last_layer_that_does_more_than_its_code_says_is_not_cut():
    model = tiny_llama(tie_word_embeddings=False)
    shift = torch.randn(64)
    model.model.layers[-1].register_forward_hook(lambda _, args, out: (out[0] + shift, *out[1:]))
    llm = check_exact(model)
    assert llm.packs
    assert not llm.levers.cuts_last_layer
    assert "cut last layer: hidden states differ by" in llm.levers.refused[0]
    assert llm.model.model.layers[-1] is not None
    assert type(llm.model.model.layers[-1]) is LlamaDecoderLayer


@pytest.mark.parametrize("part", ["mlp", "input_layernorm", "self_attn.q_proj"])
def test_a_replaced_part_is_run_as_it_is(part):
    model = tiny_llama(tie_word_embeddings=False)
    parent, _, name = part.rpartition(".")
    holder = model.model.layers[-1].get_submodule(parent)
    setattr(holder, name, Doubled(getattr(holder, name)))
    check_exact(model)


def test_blocks_whose_code_is_known_but_not_what_they_compute_are_not_compiled():
    model = tiny_qwen3()
    assert check_levers(model, compile_blocks=True).compiles_blocks
    for layer in model.model.layers:
        layer.mlp.register_forward_hook(lambda _, args, out: 2 * out)
    levers = check_levers(model, compile_blocks=True)
    assert levers.packs
    assert not levers.compiles_blocks
    assert "compiled blocks: hidden states differ by" in levers.refused[-1]


def test_prompts_are_not_cached_where_a_token_looks_at_its_neighbours_twice():
    model = tiny_llama(tie_word_embeddings=False)
    rotary = model.model.rotary_emb

    class FromZero(nn.Module):  # positions counted from the first that it is given
        def forward(self, hidden, position_ids):
            return rotary(hidden, position_ids - position_ids.flatten()[0])

    model.model.rotary_emb = FromZero()
    levers = check_levers(model)
    assert levers.packs
    assert not levers.caches_prompts
    assert levers.refused[0].startswith("cached prompts: ")


@pytest.mark.parametrize("compile_blocks", [False, True])
def test_a_check_leaves_no_trace(compile_blocks):
    from transformers.models.qwen3 import modeling_qwen3

    for make in (tiny_qwen3, tiny_llama, lambda: tiny("minimax"), with_convolution):
        model = make()
        modules = {name: type(module) for name, module in model.named_modules()}
        weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        config, rotary = model.config.to_dict(), modeling_qwen3.apply_rotary_pos_emb
        attention, random = model.config._attn_implementation, torch.get_rng_state()
        check_levers(model, compile_blocks=compile_blocks)
        assert torch.equal(torch.get_rng_state(), random)
        assert {name: type(module) for name, module in model.named_modules()} == modules
        assert all(torch.equal(weights[n], t) for n, t in model.state_dict().items())
        assert model.config.to_dict() == config
        assert model.config._attn_implementation == attention
        assert modeling_qwen3.apply_rotary_pos_emb is rotary
        assert not any(p.grad is not None for p in model.parameters())


def test_a_deep_model_is_checked_by_its_last_layer_of_each_kind(monkeypatch):
    built = []
    real = copy.deepcopy
    monkeypatch.setattr(
        "vlm_composer.models.self_check.copy.deepcopy",
        lambda *arguments: built.append(real(*arguments)) or built[-1],
    )
    kinds = ["linear_attention"] * 3 + ["full_attention"] * 3
    check_levers(tiny("minimax", num_hidden_layers=6, layer_types=kinds))
    (probe,) = [found for found in built if hasattr(found, "layers")]
    assert len(probe.layers) == 2
    assert probe.config.layer_types == ["linear_attention", "full_attention"]
    assert {p.dtype for p in probe.parameters()} == {torch.float32}


def test_bf16_weights_are_checked_as_exactly():
    model = tiny_qwen3().bfloat16()
    assert check_levers(model, compile_blocks=True) == Levers("sdpa", True, True, True, True)
    levers = check_levers(with_convolution().bfloat16())
    assert not levers.packs
    assert next(model.parameters()).dtype == torch.bfloat16


def test_on_the_meta_device_the_code_decides():
    with torch.device("meta"):
        model = tiny_qwen3()
    assert check_levers(model) == Levers("sdpa", True, True, True, False)


@pytest.mark.world_size(2)
def test_ranks_without_weights_take_the_first_ranks_decision(tiny_config, towers, tmp_path, caplog):
    from composer.utils import dist

    from vlm_composer.assembly import assemble_model
    from vlm_composer.training.parallelism import assemble_on_first_rank

    caplog.set_level(logging.WARNING)
    config = tiny_config(device_train_microbatch_size=2)
    refused = Levers("eager", refused=("packed rows: of the first rank",))

    def assemble(empty):
        vlm = assemble_model(config, "cpu", empty_towers=empty)
        if dist.get_global_rank() == 0:
            vlm.language_model.levers = refused
        return vlm

    vlm = assemble_on_first_rank(assemble, "replicate", "cpu")
    assert vlm.language_model.levers == refused
    if dist.get_global_rank() == 1:
        assert not vlm.language_model.packs
        assert vlm.language_model.model.config._attn_implementation == "eager"
        assert "packed rows: of the first rank" in caplog.text
