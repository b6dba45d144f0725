"""Positions that a configuration tells of, against what tiny models of it can read."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BioGptConfig,
    BloomConfig,
    CodeGenConfig,
    CohereConfig,
    FalconConfig,
    Gemma3Config,
    GPT2Config,
    GPTBigCodeConfig,
    GPTJConfig,
    GPTNeoConfig,
    LlamaConfig,
    MambaConfig,
    MptConfig,
    OPTConfig,
    RwkvConfig,
    XLNetConfig,
)

from vlm_composer.models.positions import count_positions
from vlm_composer.models.tower_loading import read_config

N = 48
SMALL = {"vocab_size": 300, "hidden_size": 32}
GPT = {"vocab_size": 300, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": N}
HEADS = {"num_hidden_layers": 2, "num_attention_heads": 4}
LIMITED = [
    OPTConfig(**SMALL, **HEADS, ffn_dim=64, word_embed_proj_dim=32, max_position_embeddings=N),
    GPT2Config(**GPT),
    GPTBigCodeConfig(**GPT),
    GPTJConfig(**GPT, rotary_dim=4),
    CodeGenConfig(**GPT, rotary_dim=4),
    GPTNeoConfig(
        **SMALL,
        num_layers=1,
        attention_types=[[["global"], 1]],
        num_heads=4,
        max_position_embeddings=N,
    ),
    BioGptConfig(**SMALL, **HEADS, intermediate_size=64, max_position_embeddings=N),
    MptConfig(vocab_size=300, d_model=32, n_layers=2, n_heads=4, max_seq_len=N),
]
ENDLESS = [
    # Published configurations of BLOOM have a seq_length, which their models do not know.
    BloomConfig(**SMALL, n_layer=2, n_head=4, seq_length=N),
    FalconConfig(**SMALL, **HEADS, alibi=True, max_position_embeddings=N),
    MambaConfig(**SMALL, num_hidden_layers=2),
    RwkvConfig(**SMALL, num_hidden_layers=2, context_length=N),
]


def reads(model, length):
    with torch.no_grad():
        model(inputs_embeds=torch.randn(1, length, 32), use_cache=False)


@pytest.mark.parametrize("config", LIMITED, ids=lambda config: config.model_type)
def test_a_model_reads_as_many_tokens_as_it_has_positions_and_no_more(config):
    positions, key = count_positions(config)
    assert positions == getattr(config, key) == N
    model = AutoModelForCausalLM.from_config(config)
    reads(model, N)
    with pytest.raises((IndexError, RuntimeError)):
        reads(model, N + 1)


@pytest.mark.parametrize("config", ENDLESS, ids=lambda config: config.model_type)
def test_a_model_without_positions_reads_any_length(config):
    assert count_positions(config) is None
    reads(AutoModelForCausalLM.from_config(config), 3 * N)


@pytest.mark.parametrize(
    ("scaling", "positions"),
    [
        (None, 2048),
        ({"rope_type": "default"}, 2048),
        ({"rope_type": "linear", "factor": 4.0}, 8192),
        ({"type": "dynamic", "factor": 2.5}, 5120),
        ({"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 1024}, 8192),
        ({"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 512}, 2048),
        (
            {
                "rope_type": "llama3",
                "factor": 8.0,
                "original_max_position_embeddings": 256,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
            },
            2048,
        ),
    ],
)
def test_rotary_positions_are_stretched(scaling, positions):
    config = LlamaConfig(max_position_embeddings=2048, rope_scaling=scaling)
    assert count_positions(config) == (positions, "max_position_embeddings")


def test_positions_that_a_configuration_has_under_other_names():
    config = Gemma3Config(text_config={"max_position_embeddings": 512, "model_type": "gemma3_text"})
    assert count_positions(config) == (512, "max_position_embeddings")
    config = CohereConfig(max_position_embeddings=8192, model_max_length=131072)
    assert count_positions(config) == (131072, "model_max_length")
    # A tokenizer's limit, which some put into the model's configuration, lengthens no table.
    config = GPT2Config(n_positions=1024, model_max_length=4096)
    assert count_positions(config)[0] == 1024
    assert count_positions(XLNetConfig()) is None


def test_the_full_recipe_fits():
    assert count_positions(read_config("Qwen/Qwen3-8B-Base", "text_config")) == (
        *(32768, "max_position_embeddings"),
    )
