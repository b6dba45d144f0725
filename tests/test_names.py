"""Files that are taken for ours by their name: exactly those that we write, in ASCII digits."""

import os
import re
import subprocess
from pathlib import Path

import pytest

from convert import convert_llava
from convert.errors import ConversionError
from run_folders import whole_run
from tiny import write_pairs
from vlm_composer.local_files import partial_path, remove_partials
from vlm_composer.report.run_folder import read_run

ROOT = Path(__file__).parents[1]
PRODUCT = [path for part in ("vlm_composer", "convert") for path in (ROOT / part).rglob("*.py")]


def test_no_pattern_takes_the_digits_of_other_scripts():
    """`\\d` and isdigit() do, and int() reads many of them."""
    wrong = re.compile(r"\\d|\.isdigit\(|\.isnumeric\(")
    assert len(PRODUCT) > 150
    found = [path for path in PRODUCT if wrong.search(path.read_text(encoding="utf-8"))]
    assert found == []


def test_partial_files_of_others_stay(tmp_path):
    ended = subprocess.Popen(["true"])
    ended.wait()
    mine = partial_path(tmp_path / "a")
    machine = mine.name.removeprefix(".a.").removesuffix(f"-{os.getpid()}.partial")
    ours = tmp_path / f".a.{machine}-{ended.pid}.partial"
    arabic = str(ended.pid).translate({48 + i: 0x660 + i for i in range(10)})
    others = [
        mine,  # this process lives
        tmp_path / f".a.{machine}-{arabic}.partial",
        tmp_path / f".a.{machine}-{'9' * 100}.partial",
        tmp_path / f".a.another-{ended.pid}.partial",
    ]
    for path in (ours, *others):
        path.touch()
    remove_partials(tmp_path)
    assert sorted(os.listdir(tmp_path)) == sorted(path.name for path in others)


def test_captions_of_a_batch_in_other_digits_are_not_read(tmp_path):
    folder = whole_run(tmp_path / "run")
    expected = read_run(folder).captioned
    line = '{"id": "1", "image": null, "truth": "a", "caption": "of a stranger"}\n'
    (folder / "captions" / "ba٣٢٠.jsonl").write_text(line)
    assert read_run(folder).captioned == expected


@pytest.mark.parametrize("name", ["shard.٠٠٠٠٠.mds", "shard.00000.٠٠٠٠٠.mds"])
def test_a_shard_in_other_digits_is_not_deleted(tmp_path, name):
    json_path, images = write_pairs(tmp_path / "pairs", 4)
    foreign = tmp_path / "out" / "train" / name
    foreign.parent.mkdir(parents=True)
    foreign.touch()
    with pytest.raises(ConversionError, match="files that no conversion wrote, such as train/sh"):
        convert_llava(
            json_path, images, tmp_path / "out", overwrite=True, workers=1, show_progress=False
        )
    assert foreign.exists()
