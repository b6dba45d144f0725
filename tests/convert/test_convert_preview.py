"""`preview` says what training does: the same tokens, the same mask, from any source."""

import io
import tarfile
import uuid
from pathlib import Path
from typing import Any

import pytest

from convert.preview import main, pick_items
from convert.sources.opening import SourceSpec, open_source
from convert.token_view import Token, TokenView, draw_tokens
from tiny import byte_tokenizer
from vlm_composer.assembly import assemble_template
from vlm_composer.data.schema import Record
from vlm_composer.data.template import Template
from vlm_composer.loaders import assemble_encoder
from vlm_composer.models.packing import IGNORE_INDEX


def template(**options: Any) -> Template:
    return Template(byte_tokenizer(), **{"num_image_tokens": 3, "max_seq_len": 64, **options})


def record(prompt: str, answer: str) -> Record:
    return Record(id="1", image=b"", prompt=prompt, answer=answer)


def drawn(tokens: list[Token], **options: Any) -> list[str]:
    return list(draw_tokens(tokens, **{"width": 100, "colours": False, **options}))


@pytest.fixture
def run(tiny_yaml: Any, pairs: Any, capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs the command on the pairs, with the tiny towers; returns its status, stdout, stderr."""

    def run_main(*options: str, **changes: Any) -> tuple[int, str, str]:
        argv = [str(pairs.write_json()), "--images", str(pairs.images)]
        status = main([*argv, "--yaml", str(tiny_yaml(**changes)), *options])
        said = capsys.readouterr()
        return status, said.out, said.err

    return run_main


@pytest.mark.parametrize("add_bos", [None, True])
@pytest.mark.parametrize("max_seq_len", [24, 64])
def test_the_mask_is_that_of_the_data_set(
    pairs: Any, tiny_config: Any, add_bos: bool | None, max_seq_len: int
) -> None:
    pairs.add(8)
    pairs.convert(eval_ratio=0)
    config = tiny_config(add_bos=add_bos, max_seq_len=max_seq_len + 20)
    made = assemble_template(config)
    encoder, view = assemble_encoder(config, made), TokenView(made, config.add_bos)
    for sample in pairs.read("train"):
        batch, tokens = encoder([sample]), view.tokens(sample)
        encoded = {key: values[0] for key, values in batch.items()}
        kept = [token for token in tokens if token.role != "cut"]
        assert [token.id for token in kept] == encoded["input_ids"].tolist()
        assert [token.id if token.role == "loss" else IGNORE_INDEX for token in kept] == encoded[
            "labels"
        ].tolist()
        assert len(tokens) - len(kept) == encoded["num_cut"]
        assert all((t.role == "image") == (t.id == made.image_token_id) for t in kept)


def test_what_is_cut_is_shown() -> None:
    tokens = TokenView(template(max_seq_len=9), None).tokens(record("a<image>b", "cdefg"))
    assert drawn(tokens) == [
        "no loss   a",
        "no loss   <image_patch> × 3",
        "no loss   b|⏎",
        "loss      c|d|e",
        "cut       f|g|<eos>",
    ]


def test_the_start_is_a_token_like_others() -> None:
    tokens = TokenView(template(add_bos=True), True).tokens(record("<image>", "c"))
    assert drawn(tokens)[0] == "no loss   <bos>"
    assert drawn(tokens)[-1] == "loss      c|<eos>"


def test_colours_tell_the_same() -> None:
    tokens = TokenView(template(), None).tokens(record("a<image>", "\x1b[31m"))
    assert drawn(tokens, colours=True) == [
        "no loss   \x1b[2ma\x1b[0m",
        "no loss   \x1b[36m<image_patch> × 3\x1b[0m",
        "no loss   \x1b[2m⏎\x1b[0m",
        "loss      \x1b[1;32m\\x1b|[|3|1|m|<eos>\x1b[0m",
    ]


def test_parts_of_characters_and_long_lines() -> None:
    tokens = TokenView(template(), None).tokens(record("<image>", "é" + "x" * 30))
    assert [token.text for token in tokens[4:6]] == ["Ã", "©"]  # as the vocabulary has them
    lines = drawn(tokens, width=40)
    assert all(len(line) <= 41 for line in lines)
    assert lines[-1].startswith(" " * 10)


def test_the_command(pairs: Any, run: Any) -> None:
    pairs.add(12)
    status, out, err = run("--count", "10", max_seq_len=40)
    assert (status, err) == (0, "")
    assert out.startswith("10 of 12 items, picked at random\n\n")
    assert out.count("\nimage     32 × 24 pixels, ") == out.count(" kB → 32 × 32\n") == 10
    number = int(out.split("item ")[1].split(":")[0])
    assert f"\nprompt    Describe picture {number}.⏎<image>\n" in out
    assert f"\nanswer    picture number {number}\n" in out
    assert "\nno loss   <image_patch> × 4\n" in out
    assert "\ncut       " in out
    assert "\x1b" not in out  # nobody's terminal


def test_the_seed_decides_which(pairs: Any, run: Any) -> None:
    pairs.add(30)
    seen = [run("--count", "3", "--seed", seed)[1] for seed in ("1", "1", "2")]
    assert seen[0] == seen[1] != seen[2]


def test_items_that_would_be_rejected_or_fail(pairs: Any, run: Any) -> None:
    pairs.add(1, image="nowhere.jpg")
    long = [{"from": "human", "value": "x" * 80}, {"from": "gpt", "value": "\x1b[31m"}]
    pairs.add(1, conversations=long)
    status, out, _ = run()
    assert status == 0
    assert ", item 0: would be rejected: missing_image: no file 'nowhere.jpg'" in out
    assert "\nanswer    \\x1b[31m\n" in out
    assert "\ntraining would fail: the prompt is 86 tokens with its image and max_seq_len is" in out


def test_what_cannot_be_previewed(pairs: Any, run: Any, tmp_path: Path) -> None:
    pairs.add(2)
    for options, problem in (
        (["--tokenizer", str(tmp_path)], f"tokenizer {tmp_path} cannot be used"),
        (["--tokenizer", str(tmp_path)], "give --tokenizer FOLDER"),
        (["--json", "other.json"], "give one JSON, not "),
        (["--count", "0"], "--count is 0"),
        (["--yaml", "nowhere.yaml"], "nowhere.yaml"),
        (["--images", str(tmp_path / "nowhere")], "nowhere"),
        (["--webdataset", "x.tar"], "json"),
    ):
        status, _, err = run(*options)
        assert status == 1
        assert err.splitlines()[-1].startswith("convert preview: ") or "yaml" in problem
        assert problem in err


def test_a_tokenizer_in_place_of_the_yamls(pairs: Any, run: Any, towers: Path) -> None:
    pairs.add(1)
    status, out, _ = run(
        "--tokenizer", str(towers / "llama"), language_model={"name": "no/such-model"}
    )
    assert status == 0
    assert "1 of 1 items" in out


def test_an_image_size_that_is_not_known_is_said(pairs: Any, run: Any, tmp_path: Path) -> None:
    pairs.add(1)
    status, out, err = run(vision_tower={"name": str(tmp_path / "nowhere")})
    assert status == 0
    assert "the vision tower's image size is not known (" in err
    assert "→" not in out


def test_of_many_files_some_are_looked_at(pairs: Any, tmp_path: Path) -> None:
    pairs.add(12)
    for number in range(6):
        with tarfile.open(tmp_path / f"{number}.tar", "w") as tar:
            for item in pairs.items[2 * number : 2 * number + 2]:
                image = (pairs.images / item["image"]).read_bytes()
                for suffix, data in (("jpg", image), ("txt", b"a picture")):
                    member = tarfile.TarInfo(f"{item['id']}.{suffix}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    source = open_source(SourceSpec(webdataset=str(tmp_path / "*.tar")), 1 << 20)
    picked, total = pick_items(source, 5, seed=3)
    assert total == 8
    assert len(picked) == 5
    assert len({p.file for p in picked}) >= 3
    for item in picked:
        assert item.number in (0, 1)
        assert isinstance(item.item.image, bytes)


@pytest.mark.s3
def test_images_in_a_bucket(pairs: Any, run: Any, s3_server: Any) -> None:
    url = s3_server.make_bucket(f"preview-{uuid.uuid4().hex}")
    pairs.add(3)
    client = s3_server.client()
    for item in pairs.items:
        data = (pairs.images / item["image"]).read_bytes()
        client.put_object(Bucket=url.split("/")[2], Key=f"images/{item['image']}", Body=data)
    _, expected, _ = run()
    assert run("--images", f"{url}/images") == (0, expected, "")
