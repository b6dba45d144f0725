"""Image tokens go where they belong, and the connector's gradients are those of Hugging Face's own
path."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Gemma3TextConfig,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    Llama4TextConfig,
    MambaConfig,
)

from tiny import IMAGE, K, batch_of, packed, tiny_dinov2, tiny_llama, tiny_qwen3, tiny_siglip
from vlm_composer.models.connector import Connector
from vlm_composer.models.language_model import LanguageModel
from vlm_composer.models.packing import IGNORE_INDEX
from vlm_composer.models.projector import MLPProjector
from vlm_composer.models.resampler import PerceiverResampler
from vlm_composer.models.vision_tower import VisionTower
from vlm_composer.models.vlm import VisionLanguageModel


def build(vision=tiny_siglip, llm=tiny_qwen3, dtype=torch.float32, **options):
    tower, language_model = VisionTower(vision().to(dtype)), LanguageModel(llm(**options).to(dtype))
    resampler = PerceiverResampler(48, num_latents=K, depth=2, num_heads=2, head_dim=16)
    connector = Connector(resampler, MLPProjector(32, 64, mlp_ratio=2))
    return VisionLanguageModel(tower, connector, language_model, IMAGE)


def reference_loss(model, pixels, ids, labels):
    """Each row alone, unpadded, all logits, Hugging Face's eager attention and own loss."""
    llm = model.language_model.model
    previous = llm.config._attn_implementation
    llm.config._attn_implementation = "eager"
    total, count = 0.0, 0
    for image, row, label in zip(pixels, ids, labels, strict=True):
        end = (
            int((label != IGNORE_INDEX).nonzero().max()) + 1 if (label != IGNORE_INDEX).any() else 0
        )
        if not end:
            continue
        row, label = row[:end], label[:end]
        with torch.no_grad():
            normalised = (image[None].float() / 255 - 0.5) / 0.5
            weight = next(model.vision_tower.parameters())
            patches = model.vision_tower.model(normalised.to(weight.dtype)).last_hidden_state
            patches = patches[:, patches.shape[1] - model.vision_tower.num_patches :].float()
        tokens = model.connector.projector(model.connector.resampler(patches))[0]
        pieces, taken = [], 0
        for token in row.tolist():
            if token == IMAGE:
                pieces.append(tokens[taken])
                taken += 1
            else:
                pieces.append(llm.get_input_embeddings()(torch.tensor(token)).float())
        embeds = torch.stack(pieces)[None].to(weight.dtype)
        answers = int((label[1:] != IGNORE_INDEX).sum())
        total = (
            total + llm(inputs_embeds=embeds, labels=label[None], use_cache=False).loss * answers
        )
        count += answers
    llm.config._attn_implementation = previous
    return total / count


def mean_loss(model, pixels, ids, labels, **options):
    total, num_tokens = model(pixels, packed(ids, labels, **options))
    return total / num_tokens


def gradients(model, loss):
    return torch.autograd.grad(loss, list(model.connector.parameters()))


def relative_error(got, want):
    got, want = torch.cat([g.flatten() for g in got]), torch.cat([g.flatten() for g in want])
    return ((got - want).norm() / want.norm()).item()


ROWS = {
    "image first": [(0, 3, 4), (0, 2, 6)],
    "image last": [(5, 1, 4), (2, 1, 1), (9, 1, 12)],
    "one token answers": [(3, 1, 1), (0, 4, 1)],
    "one sample": [(2, 2, 5)],
    "image straight before the answer": [(3, 0, 4), (0, 0, 2)],
}


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS.keys())
@pytest.mark.parametrize(
    ("vision", "llm", "size"),
    [(tiny_siglip, tiny_qwen3, 32), (tiny_dinov2, tiny_llama, 42)],
    ids=["siglip-qwen3", "dinov2-llama"],
)
@pytest.mark.parametrize("split_prompts", [False, True], ids=["whole", "cached prompts"])
def test_loss_and_connector_gradients_equal_hugging_face_eager(
    vision, llm, size, rows, split_prompts
):
    model = build(vision, llm)
    pixels, ids, labels = batch_of(rows, size)
    ours = mean_loss(model, pixels, ids, labels, split_prompts=split_prompts)
    expected = reference_loss(model, pixels, ids, labels)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)
    assert relative_error(gradients(model, ours), gradients(model, expected)) < 1e-5


TEXT = {"vocab_size": 300, "hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 96}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "pad_token_id": 0}


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS.keys())
@pytest.mark.parametrize(
    "config",
    [
        BloomConfig(vocab_size=300, hidden_size=64, n_layer=2, n_head=4),
        MambaConfig(vocab_size=300, hidden_size=64, num_hidden_layers=2, state_size=8),
        Gemma3TextConfig(**TEXT, **HEADS),
        Llama4TextConfig(**TEXT, **HEADS, intermediate_size_mlp=96, num_local_experts=2),
    ],
    ids=lambda config: config.model_type,
)
def test_other_kinds_of_decoder_give_the_same_connector_gradients(config, rows):
    model = build(llm=lambda: AutoModelForCausalLM.from_config(config))
    pixels, ids, labels = batch_of(rows)
    ours = mean_loss(model, pixels, ids, labels)
    expected = reference_loss(model, pixels, ids, labels)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)
    assert relative_error(gradients(model, ours), gradients(model, expected)) < 1e-5


def tiny_gpt_neox():
    """A decoder whose norms compute in the dtype of their input: Qwen3's and Llama's use fp32."""
    config = GPTNeoXConfig(
        vocab_size=300,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        hidden_dropout=0.0,
        attention_dropout=0.0,
    )
    return GPTNeoXForCausalLM(config)


def test_gradients_equal_finite_differences():
    model = build(llm=tiny_gpt_neox).double()
    pixels, ids, labels = batch_of([(2, 1, 3), (0, 2, 4)])

    def loss():
        return mean_loss(model, pixels, ids, labels)

    parameters = list(model.connector.parameters())
    analytic = torch.autograd.grad(loss(), parameters)
    for parameter, gradient in zip(parameters, analytic, strict=True):
        direction = torch.randn_like(parameter)
        values = []
        for step in (1e-6, -1e-6):
            with torch.no_grad():
                parameter.add_(step * direction)
                values.append(loss())
                parameter.sub_(step * direction)
        numeric = (values[0] - values[1]) / 2e-6
        torch.testing.assert_close((gradient * direction).sum(), numeric, rtol=1e-6, atol=1e-9)


def test_bf16_towers_are_no_further_from_fp32_than_hugging_face_in_bf16():
    exact = build()
    rounded = build(dtype=torch.bfloat16)
    rounded.load_state_dict(exact.state_dict())
    pixels, ids, labels = batch_of([(2, 1, 9), (0, 2, 12), (4, 1, 7)])
    want = gradients(exact, reference_loss(exact, pixels, ids, labels))

    theirs = gradients(rounded, reference_loss(rounded, pixels, ids, labels))
    for split_prompts in (False, True):
        loss = mean_loss(rounded, pixels, ids, labels, split_prompts=split_prompts)
        error = relative_error(gradients(rounded, loss), want)
        assert error < 1.2 * relative_error(theirs, want)


def test_row_k_of_an_image_goes_to_its_kth_position():
    model = build()
    ids = [7, IMAGE, 8, IMAGE, IMAGE, 9, IMAGE], [IMAGE] * 4 + [1, 2]
    tokens = torch.randn(2, K, 64)
    embeds = model.build_inputs_embeds(packed(ids), tokens)
    table = model.language_model.model.get_input_embeddings().weight
    expected = table[torch.tensor(ids[0] + ids[1])].clone()
    for image, positions in enumerate([[1, 3, 4, 6], [7, 8, 9, 10]]):
        for k, position in enumerate(positions):
            expected[position] = tokens[image, k]
    assert torch.equal(embeds, expected)


def test_rows_may_have_no_image_or_several():
    model = build()
    tokens = torch.randn(2, K, 64)
    rows = packed([[IMAGE] * 8, [5] * 3])
    embeds = model.build_inputs_embeds(rows, tokens, num_images=[2, 0])
    assert torch.equal(embeds[:8], tokens.flatten(0, 1))


@pytest.mark.parametrize("found", [0, 3, 5, 8])
def test_another_number_of_image_tokens_is_an_error_that_names_the_sample(found):
    model = build()
    rows = packed(
        [[IMAGE] * 4 + [1] * 4, [IMAGE] * found + [1] * (9 - found)], sample_ids=["dog-1", "cat-7"]
    )
    message = rf"sample cat-7: {found} <image_patch> tokens for 1 image\(s\) .*; expected 4"
    with pytest.raises(ValueError, match=message):
        model.build_inputs_embeds(rows, torch.randn(2, K, 64))


def test_another_number_of_images_is_an_error_with_both_numbers():
    model = build()
    with pytest.raises(ValueError, match="2 images were given for samples that name 1"):
        model.build_inputs_embeds(packed([[IMAGE] * 4]), torch.randn(2, K, 64))


def test_patches_stand_for_their_images():
    model = build()
    pixels, ids, labels = batch_of([(2, 1, 3), (0, 2, 4)])
    patches = model.vision_tower(pixels)
    loss, again = mean_loss(model, pixels, ids, labels), mean_loss(model, patches, ids, labels)
    assert torch.equal(loss, again)


def test_patches_of_another_tower_are_an_error_with_both_shapes():
    model = build()
    _, ids, labels = batch_of([(2, 1, 3)])
    match = r"patches of shape \(1, 9, 48\): this vision tower makes \(images, 16, 48\)"
    with pytest.raises(ValueError, match=match):
        mean_loss(model, torch.randn(1, 9, 48), ids, labels)


def test_a_batch_without_answers_gives_no_loss_and_zero_gradients():
    model = build()
    pixels, ids, _ = batch_of([(2, 1, 3)])
    loss, num_tokens = model(pixels, packed(ids))
    assert (loss, num_tokens) == (0, 0)
    assert all((g == 0).all() for g in gradients(model, loss))
    logits, targets = model(pixels, packed(ids), return_logits=True)
    assert logits.shape == (0, 300)
    assert targets.shape == (0,)


def test_logits_and_loss_are_of_the_same_answers():
    model = build()
    pixels, ids, labels = batch_of([(2, 1, 5), (0, 3, 1)])
    logits, targets = model(pixels, packed(ids, labels), return_logits=True)
    assert targets.tolist() == [*ids[0][-5:].tolist(), *ids[1][-1:].tolist()]
    expected = torch.nn.functional.cross_entropy(logits, targets)
    torch.testing.assert_close(mean_loss(model, pixels, ids, labels), expected)


def test_an_image_token_outside_the_table_is_refused():
    model = build()
    with pytest.raises(ValueError, match="300 is not a row of an embedding table of 300 rows"):
        VisionLanguageModel(model.vision_tower, model.connector, model.language_model, 300)


def test_the_image_matters_to_the_answer():
    model = build()
    pixels, ids, labels = batch_of([(2, 1, 5)])
    rows = packed(ids, labels)
    first, _ = model(pixels, rows, return_logits=True)
    second, _ = model(255 - pixels, rows, return_logits=True)
    assert (first - second).abs().max() > 1e-4


@pytest.mark.parametrize("llm", [tiny_qwen3, tiny_llama], ids=lambda m: m.__name__)
def test_evaluation_gives_the_same_numbers_packed_and_not_packed(llm):
    model = build(llm=llm)
    pixels, ids, labels = batch_of([(2, 1, 5), (0, 3, 1), (6, 0, 9)])
    logits, targets = model(pixels, packed(ids, labels), return_logits=True)
    apart = [
        model(pixels[i : i + 1], packed(ids[i : i + 1], labels[i : i + 1]), return_logits=True)
        for i in range(3)
    ]
    torch.testing.assert_close(torch.cat([x.logits for x in apart]), logits, rtol=1e-5, atol=1e-5)
    assert torch.cat([x.targets for x in apart]).tolist() == targets.tolist()

    unpacked = build(llm=lambda: llm())
    unpacked.language_model.packs = unpacked.language_model._cuts_last_layer = False
    unpacked.load_state_dict(model.state_dict())
    unpacked.language_model.model.config._attn_implementation = "eager"
    padded, _ = unpacked(pixels, packed(ids, labels), return_logits=True)
    torch.testing.assert_close(padded, logits, rtol=1e-4, atol=1e-5)
