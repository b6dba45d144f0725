"""The files of a place are the same in a folder and in every kind of bucket."""

import re
import uuid
from pathlib import Path

import pytest

from convert import ConversionError
from convert.sources.patterns import list_files
from store_server import BUCKETS, SERVERS
from vlm_composer import listing
from vlm_composer.export.pictures_at import find_pictures
from vlm_composer.listing import find_files
from vlm_composer.outages import StoreError
from vlm_composer.storage import open_store

NAMES = (
    *("a.png", "b.PNG", "below/c.png", "below/.hidden/d.png", "._a.png", "__MACOSX/a.png"),
    *("notes.txt", "below/notes.txt", ".ipynb_checkpoints/a.png"),
)


def is_png(name):
    return name.lower().endswith(".png")


@pytest.fixture(params=["folder", *BUCKETS])
def place(request, tmp_path):
    """A folder or a bucket's, of pictures, notes and what a system keeps, below a hidden folder."""
    url = str(tmp_path)
    if request.param != "folder":
        server = request.getfixturevalue(SERVERS[request.param])
        url = server.make_bucket(f"listing-{uuid.uuid4().hex}")
    store = open_store(f"{url}/.cache/data")
    (tmp_path / "file").write_bytes(b"1")
    for name in NAMES:
        store.put(tmp_path / "file", name)
    return f"{url}/.cache/data"


@pytest.mark.parametrize(
    ("pattern", "files", "others"),
    [
        ("", ["a.png", "b.PNG", "below/c.png"], ["below/notes.txt", "notes.txt"]),
        ("/", ["a.png", "b.PNG", "below/c.png"], ["below/notes.txt", "notes.txt"]),
        ("/below", ["below/c.png"], ["below/notes.txt"]),
        ("/[ab].*", ["a.png", "b.PNG"], []),
        ("/below/*", ["below/c.png", "below/notes.txt"], []),
        ("/n?tes.txt", ["notes.txt"], []),
        ("/._*", ["._a.png"], []),
        ("/__MACOSX/a.png", ["__MACOSX/a.png"], []),
        ("/absent/*.png", [], []),
        ("/absent", [], []),
    ],
)
def test_what_a_place_stands_for(place, pattern, files, others):
    found = find_files(place + pattern, is_png, 60)
    assert found == tuple([f"{place}/{name}" for name in names] for names in (files, others))


def test_pictures_of_a_pattern_are_those_of_a_person(place):
    pattern = f"{place}/*.png" if "://" in place else f"{place}/**/*.png"
    found = [picture.name for picture in find_pictures([pattern])]
    assert found == [f"{place}/a.png", f"{place}/below/c.png"]
    assert [picture.read() for picture in find_pictures([pattern])] == [b"1", b"1"]


@pytest.mark.parametrize("spelled", ["./.cache/data", ".cache/data/", ".//.cache/../.cache/data"])
def test_a_hidden_folder_that_is_named_is_searched_however_it_is_spelled(
    tmp_path, monkeypatch, spelled
):
    (tmp_path / ".cache" / "data").mkdir(parents=True)
    (tmp_path / ".cache" / "data" / "0.tar").touch()
    monkeypatch.chdir(tmp_path)
    (found,) = list_files(spelled, (".tar",))
    assert Path(found).samefile(tmp_path / ".cache" / "data" / "0.tar")


@pytest.mark.s3
def test_what_a_console_keeps_for_a_folder_is_no_file(s3_server):
    bucket = f"listing-{uuid.uuid4().hex}"
    url = s3_server.make_bucket(bucket)
    for key in ("data/", "data/below/", "data/0.tar"):
        s3_server.client().put_object(Bucket=bucket, Key=key, Body=b"")
    assert open_store(url).names() == ["data/0.tar"]
    assert open_store(url).first() == "data/0.tar"
    assert find_files(f"{url}/data/*", is_png, 60) == ([f"{url}/data/0.tar"], [])


def test_a_bucket_has_a_name_without_wildcards():
    for place in ("s3://*", "gs://a*/x", "azure://[ab]/x.png"):
        with pytest.raises(StoreError, match="cannot stand for the bucket's own name"):
            find_files(place, is_png, 60)
        with pytest.raises(ConversionError, match="cannot stand for the bucket's own name"):
            list_files(place, (".tar",))


def test_folders_are_listed_in_one_place():
    root = Path(listing.__file__).parent.parent
    sources = [*root.glob("vlm_composer/**/*.py"), *root.glob("convert/**/*.py")]
    listed = re.compile(r"rglob|os\.walk|scandir|glob\.glob|fnmatch|has_magic|Path\.walk")
    found = {path.name for path in sources if listed.search(path.read_text())}
    assert len(sources) > 100
    assert found == {"listing.py", "storage.py"}
