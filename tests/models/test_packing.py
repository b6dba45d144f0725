"""Packed samples do not see each other, whatever the model; what cannot be packed is refused."""

import copy
import itertools

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
from vlm_composer.models.language_model import LanguageModel
from vlm_composer.models.packed_attention import (
    PACKED_ATTENTION,
    attention_by_products,
    attention_kernel,
    fused_attention,
)
from vlm_composer.models.packing import IGNORE_INDEX, pack
from vlm_composer.models.prompt_cache import PromptCache

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
    if llm.packs:
        llm.model.config._attn_implementation = PACKED_ATTENTION
    return torch.cat(hidden)


def all_answers(lengths):
    """Rows that all predict an answer, but for the last of each sample."""
    ones = [torch.ones(length, dtype=torch.int64) for length in lengths]
    return packed(ones, ones)


@pytest.mark.parametrize(
    "model", [tiny_qwen3, tiny_llama, tiny_mistral, tiny_opt, tiny_bloom], ids=lambda m: m.__name__
)
@pytest.mark.parametrize("lengths", [(5, 9, 1), (4,), (1, 1), (7, 7, 7)], ids=str)
@pytest.mark.parametrize("kernel", [fused_attention, attention_by_products])
def test_outputs_and_gradients_equal_those_of_single_samples(model, lengths, kernel):
    llm = LanguageModel(model())
    rows = [torch.randn(length, 64, requires_grad=True) for length in lengths]
    weights = torch.randn(sum(lengths) - len(lengths), 64)
    with attention_kernel(kernel):
        together = llm.decode(torch.cat(rows), all_answers(lengths))
    expected = apart(llm, rows)
    expected = expected[all_answers(lengths).answer_rows]
    torch.testing.assert_close(together, expected, rtol=1e-4, atol=1e-5)
    ours = torch.autograd.grad((together * weights).sum(), rows)
    theirs = torch.autograd.grad((expected * weights).sum(), rows)
    scale = torch.cat(theirs).norm()
    assert (torch.cat(ours) - torch.cat(theirs)).norm() <= 1e-5 * scale


def test_a_sample_does_not_see_what_stands_beside_it():
    llm = LanguageModel(tiny_qwen3())
    row, other = torch.randn(6, 64), torch.randn(9, 64)
    rows = all_answers([6, 9])
    first = llm.decode(torch.cat([row, other]), rows)[:5]
    second = llm.decode(torch.cat([row, other * 100]), rows)[:5]
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


def test_a_capped_attention_is_not_packed_but_exact(caplog):
    config = Gemma2Config(
        **SMALL,
        intermediate_size=96,
        num_key_value_heads=1,
        head_dim=16,
        final_logit_softcapping=None,
        attn_logit_softcapping=0.5,
        attn_implementation="sdpa",  # which caps nothing
    )
    model = Gemma2ForCausalLM(config)
    stock = copy.deepcopy(model).eval()
    stock.config._attn_implementation = "eager"
    llm = LanguageModel(model)
    assert not llm.packs
    assert "Gemma2Attention cannot be packed" in caplog.text
    assert "softcap 0.5" in caplog.text
    assert "sdpa attention: hidden states differ by" in caplog.text
    rows, embeds = packed([[1] * 5, [1] * 3]), torch.randn(8, 64)
    found = llm.model.base_model(inputs_embeds=rows.pad(embeds), use_cache=False).last_hidden_state
    for sample, alone in zip(rows.unpad(found).split([5, 3]), embeds.split([5, 3]), strict=True):
        with torch.no_grad():
            expected = stock.model(inputs_embeds=alone[None]).last_hidden_state[0]
        torch.testing.assert_close(sample, expected, rtol=1e-5, atol=1e-5)


def test_generate_uses_and_gives_back_the_attention():
    llm = LanguageModel(tiny_llama())
    options = {"inputs_embeds": torch.randn(2, 5, 64), "max_new_tokens": 3, "do_sample": False}
    assert llm.generate(**options, pad_token_id=0, eos_token_id=None).shape == (2, 3)
    assert llm.model.config._attn_implementation == PACKED_ATTENTION


@pytest.mark.parametrize("model", [tiny_qwen3, tiny_llama, tiny_mistral], ids=lambda m: m.__name__)
def test_cached_prompts_change_neither_outputs_nor_gradients(model):
    llm = LanguageModel(model())
    prompts = [[7, 8, 9], [], [7, 8, 9], [5]]
    samples = [[*prompt, IMAGE, IMAGE, *range(3, 4 + k)] for k, prompt in enumerate(prompts)]
    ids = [torch.tensor(sample) for sample in samples]
    labels = [torch.full_like(row, IGNORE_INDEX) for row in ids]
    for label in labels:
        label[-1] = 4
    whole = pack(ids, labels, image_token_id=IMAGE)
    split = pack(ids, labels, image_token_id=IMAGE, split_prompts=True)
    assert split.prompts == ((7, 8, 9), (), (7, 8, 9), (5,))
    kept = [sample[len(prompt) :] for sample, prompt in zip(samples, prompts, strict=True)]
    assert split.input_ids.tolist() == list(itertools.chain(*kept))
    assert split.position_ids[:3].tolist() == [3, 4, 5]

    def run(rows):
        embeds = llm.embed(rows.input_ids)
        image = torch.randn(len(rows.image_rows), 64, generator=torch.Generator().manual_seed(1))
        image.requires_grad_()
        hidden = llm.decode(embeds.index_copy(0, rows.image_rows, image), rows)
        weights = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(2))
        return hidden, torch.autograd.grad((hidden * weights).sum(), image)[0]

    for got, expected in zip(run(split), run(whole), strict=True):
        assert (got - expected).norm() < 1e-5 * expected.norm()
    again = run(split)
    assert torch.equal(again[0], run(split)[0])


def test_a_prompt_ends_before_the_first_row_that_is_needed():
    none = IGNORE_INDEX
    ids = [torch.tensor([1, 2, 3, IMAGE, 4]), torch.tensor([1, 2, 3]), torch.tensor([IMAGE, 2])]
    labels = [
        torch.tensor([none, none, 3, none, 4]),  # an answer before the image: row 1 predicts it
        torch.tensor([none, none, none]),  # nothing is needed
        torch.tensor([none, 2]),
    ]
    rows = pack(ids, labels, image_token_id=IMAGE, split_prompts=True)
    assert rows.prompts == ((1,), (), ())


def test_each_prompt_is_read_once_and_alone():
    read = []

    def reader(prompt):
        read.append(prompt)
        return [(torch.tensor(prompt).float().view(-1, 1, 1), torch.zeros(len(prompt), 1, 1))]

    cache = PromptCache(reader)
    assert cache.rows([(), ()]) is None
    for _ in range(2):
        rows = cache.rows([(4, 5), (), (6,), (4, 5)])
        assert rows.of(0)[0].flatten().tolist() == [4, 5, 6, 4, 5]
    assert read == [(4, 5), (6,)]
