"""What a user names, and the `--sources` file: opened, or refused with what to do."""

import pickle
from typing import Any

import pytest

from convert import ConversionError
from convert.sources import (
    LlavaJson,
    Parquet,
    SourceSpec,
    WebDataset,
    open_source,
    read_sources_yaml,
)
from source_items import LIMIT

GOOD = """
- {name: llava, json: pairs.json, images: images.zip}
- {name: emoji-2, parquet: "s3://bucket/emoji/"}
- name: web.1
  webdataset: tars/{00000..00012}.tar
- {name: paths, parquet: rows, images: images}
"""


def test_a_list_of_sources(tmp_path: Any) -> None:
    (tmp_path / "sources.yaml").write_text(GOOD)
    specs = read_sources_yaml(tmp_path / "sources.yaml")
    assert specs == [
        SourceSpec("llava", json="pairs.json", images="images.zip"),
        SourceSpec("emoji-2", parquet="s3://bucket/emoji/"),
        SourceSpec("web.1", webdataset="tars/{00000..00012}.tar"),
        SourceSpec("paths", parquet="rows", images="images"),
    ]
    sources = [open_source(spec, LIMIT) for spec in specs]
    assert [type(source) for source in sources] == [LlavaJson, Parquet, WebDataset, Parquet]
    assert [pickle.loads(pickle.dumps(source)).name for source in sources] == [
        *("llava", "emoji-2", "web.1", "paths"),
    ]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "holds a NoneType, not a list of sources such as - {name: llava,"),
        ("[]", "holds a list, not a list of sources"),
        ("name: a", "holds a dict, not a list of sources"),
        ("- {name: a", "is not valid YAML: while parsing"),
        ("- \x00", "is not valid YAML"),
        ("[" * 500, "is not valid YAML"),
        ("- a", "source 1 is a str, not name, json"),
        ("- {name: a, jsn: b}", "source 1: unknown key 'jsn'; did you mean json?"),
        ("- {name: a, zzz: b}", "source 1: unknown key 'zzz': give name, json, images, parquet"),
        ("- {name: a, 7: b}", "source 1: unknown key 7"),
        ("- {name: 7, parquet: b}", "source 1: name is 7, not text: put it in quotes"),
        ("- {name: a, parquet: [b]}", "source 1: parquet is ['b'], not text"),
        ("- {name: a, parquet: ''}", "source 1: parquet is '', not text"),
        ("- {parquet: a}", "source 1: name is '': it becomes a folder"),
        ("- {name: a/b, parquet: a}", "source 1: name is 'a/b': it becomes a folder"),
        ("- {name: .., parquet: a}", "source 1: name is '..'"),
        ("- {name: -, parquet: a}", "source 1: name is '-'"),
        ("- {name: Train, parquet: a}", "other than train and eval"),
        ("- {name: a}", "source 1: source 'a': give one of json, parquet, webdataset, not none"),
        (
            "- {name: a, parquet: b, json: c, images: d}",
            "give one of json, parquet, webdataset, not json c, parquet b",
        ),
        ("- {name: a, json: b}", "json b needs images: a folder, a zip, a tar or"),
        ("- {name: a, webdataset: b, images: c}", "images c has no use with webdataset b"),
        (
            "- {name: a, parquet: b}\n- {name: b, parquet: c}\n- {name: A, parquet: d}",
            "sources 1 and 3 are both called a: each has a folder of its name",
        ),
    ],
    ids=lambda value: value[:30],
)
def test_what_is_refused(tmp_path: Any, text: str, problem: str) -> None:
    path = tmp_path / "sources.yaml"
    path.write_text(text)
    with pytest.raises(ConversionError) as failure:
        read_sources_yaml(path)
    assert problem in str(failure.value)
    assert str(failure.value).startswith(str(path))


def test_a_file_that_is_not_there(tmp_path: Any) -> None:
    with pytest.raises(FileNotFoundError, match="absent"):
        read_sources_yaml(tmp_path / "absent")
