"""`python -m vlm_composer.caption`: a line for every picture, in order, whatever they are."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from exports import png
from vlm_composer import caption
from vlm_composer.evaluation.captioning import caption_images
from vlm_composer.export.exporting import export_checkpoint
from vlm_composer.export.loading import load_export
from vlm_composer.export.pictures_at import find_pictures


@pytest.fixture
def captions(qwen_export, capsys):
    """Runs the command; returns its exit code, lines and what it said."""

    def run(*arguments):
        capsys.readouterr()
        code = caption.main([str(qwen_export.folder), *map(str, arguments)])
        out, err = capsys.readouterr()
        return code, [json.loads(line) for line in out.splitlines()], err

    return run


def test_captions_are_those_of_the_evaluation(qwen_export, captions):
    prompt = "What colour is it?\n<image>"
    expected = caption_images(
        qwen_export.vlm, qwen_export.template, qwen_export.pixels(), prompt, max_new_tokens=9
    )
    options = ("--prompt", prompt, "--max-new-tokens", 9, "--batch-size", 2)
    code, rows, err = captions(*qwen_export.pictures, *options)
    assert code == 0
    assert rows == [
        {"image": str(path), "caption": text}
        for path, text in zip(qwen_export.pictures, expected, strict=True)
    ]
    assert "3/3" in err
    assert "image/s" in err or "s/image" in err


def test_a_picture_that_cannot_be_read_stops_nothing(captions, tmp_path):
    (tmp_path / "a.png").write_bytes(png((250, 0, 0)))
    (tmp_path / "b.jpg").write_bytes(b"no picture")
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "c.PNG").write_bytes(png((0, 250, 0)))
    (tmp_path / "notes.txt").write_text("not asked")
    out = tmp_path / "out.jsonl"
    code, rows, err = captions(
        tmp_path, tmp_path / "none.png", tmp_path / "*.gif", "--max-new-tokens", 2, "--out", out
    )
    assert (code, rows) == (1, [])
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    names = ["a.png", "b.jpg", "below/c.PNG", "none.png", "*.gif"]
    assert [row["image"] for row in rows] == [str(tmp_path / name) for name in names]
    assert ["caption" in row for row in rows] == [True, False, True, False, False]
    assert "cannot identify image file" in rows[1]["error"]
    assert "there is no picture at" in rows[4]["error"]
    assert "3 of 5 pictures could not be read" in err


def test_a_folder_gives_every_format_and_says_what_it_passes_over(tmp_path, caplog):
    forms = {"a.jfif": "JPEG", "b.avif": "AVIF", "c.JPE": "JPEG", "d.tif": "TIFF"}
    for name, form in forms.items():
        Image.new("RGB", (9, 9)).save(tmp_path / name, form)
    for name in ("notes.txt", "f.heic", "g.heic", "plain"):
        (tmp_path / name).write_text("no image")
    (tmp_path / "__MACOSX").mkdir()
    for name in ("__MACOSX/a.jpg", "._a.jfif", ".DS_Store"):
        (tmp_path / name).write_text("of a system")
    found = list(find_pictures([str(tmp_path)]))
    assert [Path(picture.name).name for picture in found] == sorted(forms)
    assert not [picture.open() for picture in found if isinstance(picture.open(), str)]
    said = caplog.messages
    assert said == [
        f"{tmp_path}: passed over 4 files that are not images by their names (2 × .heic, 1 × .txt, "
        "1 × no suffix); name one to try it."
    ]


def test_globs_take_files_and_the_default_prompt_is_asked(captions, tmp_path):
    for name in ("x1.png", "x2.png", "y.png"):
        (tmp_path / name).write_bytes(png((9, 9, 9)))
    code, rows, err = captions(tmp_path / "x*.png", "--max-new-tokens", 2)
    assert code == 0
    assert [row["image"] for row in rows] == [str(tmp_path / f"x{i}.png") for i in (1, 2)]
    assert "prompt: '" in err


def test_what_cannot_be_used_is_told_in_a_line(captions, tmp_path, capsys):
    assert caption.main([str(tmp_path), "a.png"]) == 1
    assert "is not an export: it has no config.json" in capsys.readouterr().err
    code, rows, err = captions("ftp://host/a.png")
    assert (code, rows) == (1, [])
    assert "starts with one of s3://, gs://, azure://" in err
    with pytest.raises(SystemExit):
        captions("a.png", "--batch-size", 0)
    assert "0 is less than 1" in capsys.readouterr().err


@pytest.mark.s3
def test_from_a_bucket_to_captions(qwen_export, s3_server, tmp_path, capsys):
    bucket = s3_server.make_bucket("take-away")
    client = s3_server.client()
    for name in ("ep0-ba2.safetensors", "ep0-ba4.safetensors"):
        client.upload_file(f"{qwen_export.checkpoints}/{name}", "take-away", f"run/{name}")
    out = export_checkpoint(f"{bucket}/run", tmp_path / "export")
    assert '"checkpoint": "ep0-ba4.safetensors"' in (out / "vlm_composer.json").read_text()

    for name in ("b.png", "a.png", "deep/c.png", "text.txt"):
        client.put_object(Bucket="take-away", Key=f"pictures/{name}", Body=png((200, 0, 0)))
    client.put_object(Bucket="take-away", Key="pictures/bad.png", Body=b"no picture")
    places = [f"{bucket}/pictures", f"{bucket}/pictures/[ab].png", f"{bucket}/pictures/none.png"]
    assert caption.main([str(out), *places, "--max-new-tokens", "2"]) == 1
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    names = ["a.png", "b.png", "bad.png", "deep/c.png", "a.png", "b.png", "none.png"]
    assert [row["image"] for row in rows] == [f"{bucket}/pictures/{name}" for name in names]
    assert ["error" in row for row in rows] == [name in ("bad.png", "none.png") for name in names]
    assert "there is no such bucket or object" in rows[-1]["error"]
    assert [p.name for p in find_pictures([bucket])] == sorted(
        f"{bucket}/pictures/{n}" for n in ("a.png", "b.png", "bad.png", "deep/c.png")
    )


def test_bf16_is_not_computed_where_it_is_slow(qwen_export, tmp_path, monkeypatch):
    half = export_checkpoint(qwen_export.checkpoints, tmp_path / "half", dtype="bf16")
    for native, dtype in ((False, torch.float32), (True, torch.bfloat16)):
        monkeypatch.setattr(
            "vlm_composer.training.hardware.has_native_bf16", lambda device, n=native: n
        )
        assert load_export(half, device="cpu")[0].dtype == dtype
    assert load_export(half, device="cpu", dtype="fp32")[0].dtype == torch.float32
