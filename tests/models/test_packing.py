"""Packed samples do not see each other, whatever the model; what cannot be packed is refused."""

import pytest
import torch
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

from tiny import IMAGE, packed, tiny_llama, tiny_qwen3
from vlm_composer.models import packing
from vlm_composer.models.packing import IGNORE_INDEX, pack
from vlm_composer.models.towers import LanguageModel

SMALL = {
    "vocab_size": 300,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def tiny_bloom():
    """A decoder whose attention cannot be replaced."""
    return BloomForCausalLM(
        BloomConfig(vocab_size=300, hidden_size=64, n_layer=2, n_head=4, hidden_dropout=0.0)
    )


def tiny_opt():
    return OPTForCausalLM(
        OPTConfig(**SMALL, ffn_dim=96, max_position_embeddings=64, word_embed_proj_dim=64)
    )


def tiny_mistral(**changes):
    config = MistralConfig(**SMALL, intermediate_size=96, num_key_value_heads=1, **changes)
    return MistralForCausalLM(config)


def apart(llm, rows):
    """Each sample alone, in Hugging Face's eager attention."""
    llm.model.config._attn_implementation = "eager"
    hidden = [llm.model.base_model(inputs_embeds=x[None]).last_hidden_state[0] for x in rows]
    if llm._packs:
        llm.model.config._attn_implementation = packing.PACKED_ATTENTION
    return torch.cat(hidden)


@pytest.mark.parametrize(
    "model", [tiny_qwen3, tiny_llama, tiny_mistral, tiny_opt, tiny_bloom], ids=lambda m: m.__name__
)
@pytest.mark.parametrize("lengths", [(5, 9, 1), (4,), (1, 1), (7, 7, 7)], ids=str)
@pytest.mark.parametrize("attend", ["_attend", "_attend_on_cpu"])
def test_outputs_and_gradients_equal_those_of_single_samples(model, lengths, attend, monkeypatch):
    monkeypatch.setattr(packing, "_attend_on_cpu", getattr(packing, attend))
    llm = LanguageModel(model())
    rows = [torch.randn(length, 64, requires_grad=True) for length in lengths]
    weights = torch.randn(sum(lengths), 64)
    together = llm.decode(torch.cat(rows), packed([[1] * length for length in lengths]))
    expected = apart(llm, rows)
    torch.testing.assert_close(together, expected, rtol=1e-4, atol=1e-5)
    ours = torch.autograd.grad((together * weights).sum(), rows)
    theirs = torch.autograd.grad((expected * weights).sum(), rows)
    scale = torch.cat(theirs).norm()
    assert (torch.cat(ours) - torch.cat(theirs)).norm() < 1e-5 * scale


def test_a_sample_does_not_see_what_stands_beside_it():
    llm = LanguageModel(tiny_qwen3())
    row, other = torch.randn(6, 64), torch.randn(9, 64)
    rows = packed([[1] * 6, [1] * 9])
    first = llm.decode(torch.cat([row, other]), rows)[:6]
    second = llm.decode(torch.cat([row, other * 100]), rows)[:6]
    assert torch.equal(first, second)


def test_the_rows_of_answers_are_those_before_each_answer_token():
    none = IGNORE_INDEX
    rows = pack(
        [torch.tensor([5, IMAGE, 6, 7]), torch.tensor([8, 9, IMAGE])],
        [torch.tensor([none, none, 6, 7]), torch.tensor([8, 9, none])],
        image_token_id=IMAGE,
        sample_ids=["a", "b"],
    )
    assert rows.input_ids.tolist() == [5, IMAGE, 6, 7, 8, 9, IMAGE]
    assert rows.position_ids.tolist() == [0, 1, 2, 3, 0, 1, 2]
    assert rows.image_rows.tolist() == [1, 6]
    # A sample's first token is predicted by nothing: not by the sample before it.
    assert rows.answer_rows.tolist() == [1, 2, 4]
    assert rows.targets.tolist() == [6, 7, 9]
    assert rows.padded_shape == (2, 4)
    assert rows.num_image_tokens == (1, 1)
    assert rows.unpad(rows.pad(torch.arange(7.0))).tolist() == list(range(7))


@pytest.mark.parametrize(
    ("ids", "labels", "message"),
    [([], [], "no sample"), ([[1, 2]], [[1]], "2 tokens and 1 labels"), ([[]], [[]], "0 tokens")],
)
def test_what_is_no_batch_is_refused(ids, labels, message):
    with pytest.raises(ValueError, match=message):
        pack(
            [torch.tensor(row, dtype=torch.int64) for row in ids],
            [torch.tensor(row, dtype=torch.int64) for row in labels],
            image_token_id=IMAGE,
        )


def test_a_window_shorter_than_a_sample_is_refused():
    llm = LanguageModel(tiny_mistral(sliding_window=4))
    llm.decode(torch.randn(6, 64), packed([[1] * 4, [1] * 2]))
    with pytest.raises(ValueError, match="5 tokens is longer than the sliding window of 4"):
        llm.decode(torch.randn(5, 64), packed([[1] * 5]))


def test_a_capped_attention_is_refused():
    config = Gemma2Config(
        **SMALL,
        intermediate_size=96,
        num_key_value_heads=1,
        head_dim=16,
        final_logit_softcapping=None,
    )
    llm = LanguageModel(Gemma2ForCausalLM(config))
    with pytest.raises(ValueError, match=r"Gemma2Attention cannot be packed: .* softcap 50\.0"):
        llm.decode(torch.randn(3, 64), packed([[1] * 3]))


def test_generate_uses_and_gives_back_the_attention():
    llm = LanguageModel(tiny_llama())
    options = {"inputs_embeds": torch.randn(2, 5, 64), "max_new_tokens": 3, "do_sample": False}
    assert llm.generate(**options, pad_token_id=0, eos_token_id=None).shape == (2, 3)
    assert llm.model.config._attn_implementation == packing.PACKED_ATTENTION
