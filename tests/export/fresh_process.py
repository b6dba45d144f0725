"""What a process without this project does with an export; run by `test_fresh_process.py`.

Arguments: the export's folder, a JSON file with pictures, prompts and answers, where to write.
"""

import json
import sys


class Blocker:
    """Lets nobody import this project, whatever is installed."""

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("vlm_composer", "convert", "composer", "streaming"):
            raise ImportError(f"{name} is not for this process")


sys.meta_path.insert(0, Blocker())

import torch  # noqa: E402
from PIL import Image  # noqa: E402
from transformers import (  # noqa: E402
    AutoModelForImageTextToText,
    AutoModelForVision2Seq,
    AutoProcessor,
)


def main(folder, inputs, out):
    with open(inputs) as file:
        asked = json.load(file)
    images = [Image.open(path) for path in asked["pictures"]]
    model, report = AutoModelForVision2Seq.from_pretrained(
        folder, trust_remote_code=True, output_loading_info=True
    )
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    found = {"report": {key: list(value) for key, value in report.items()}}
    for side in ("left", "right"):
        batch = processor(images, asked["prompts"], asked["answers"], padding_side=side)
        with torch.no_grad():
            output = model(**batch)
        predicted = batch["labels"][:, 1:] != -100
        found[side] = {
            "loss": output.loss,
            "logits": output.logits[:, :-1][predicted],
            "targets": batch["labels"][:, 1:][predicted],
        }
    found["batch"] = dict(processor(images, asked["prompts"]))
    batch = processor(images, asked["prompts"])
    generated = model.generate(**batch, max_new_tokens=9)
    found["captions"] = processor.captions_of(generated, batch)
    without_cache = model.generate(**batch, max_new_tokens=9, use_cache=False)
    found["without_cache"] = processor.captions_of(without_cache, batch)
    found["alone"] = []
    for image, prompt in zip(images, asked["prompts"], strict=True):
        batch = processor(image, prompt)
        generated = model.generate(**batch, max_new_tokens=9)
        found["alone"] += processor.captions_of(generated, batch)

    model.save_pretrained(f"{out}_saved")
    processor.save_pretrained(f"{out}_saved")
    again = AutoModelForImageTextToText.from_pretrained(f"{out}_saved", trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(f"{out}_saved", trust_remote_code=True)
    batch = processor(images, asked["prompts"], asked["answers"])
    with torch.no_grad():
        found["saved_logits"] = again(**batch).logits[:, :-1][batch["labels"][:, 1:] != -100]
    half = AutoModelForVision2Seq.from_pretrained(
        folder, trust_remote_code=True, torch_dtype=torch.bfloat16, low_cpu_mem_usage=True
    )
    found["bf16_dtypes"] = sorted({str(p.dtype) for p in half.parameters()})
    with torch.no_grad():
        found["bf16_loss"] = half(**batch).loss
    found["modules"] = sorted(name for name in sys.modules if "vlm_composer" in name)
    torch.save(found, out)


main(*sys.argv[1:])
