"""Names of images and files: hidden ones, those of Windows and macOS, and absolute paths."""

import io
import os
import unicodedata
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from convert import ConversionError
from convert.errors import Reason, Rejected
from convert.sources import LlavaJson, Parquet, WebDataset
from convert.sources.image_places import open_images
from convert.sources.image_stores import ImageStore
from convert.sources.patterns import list_files
from source_items import LIMIT, outcomes_of, tar_of, zip_of
from vlm_composer.local_files import is_hidden

Put = Callable[[dict[str, bytes]], ImageStore]
PLACES = [
    "folder", "zip", "tar", pytest.param("bucket", marks=pytest.mark.s3),
]  # fmt: skip


@pytest.fixture(params=PLACES)
def put(request: Any, tmp_path: Path, put_in_bucket: Any) -> Put:
    """Puts files into a folder, a zip, a tar or a bucket, and opens it."""

    def open_with(files: dict[str, bytes]) -> ImageStore:
        if request.param in ("zip", "tar"):
            pack = {"zip": zip_of, "tar": tar_of}[request.param]
            return open_images(str(pack(files, tmp_path / f"i.{request.param}")), LIMIT)
        folder = tmp_path / "images"
        for name, data in files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        if request.param == "folder":
            return open_images(str(folder), LIMIT)
        server = request.getfixturevalue("s3_server")
        url = server.make_bucket(f"names-{os.urandom(6).hex()}") + "/images"
        put_in_bucket(folder, url)
        return open_images(url, LIMIT)

    return open_with


def reject(store: ImageStore, name: str) -> Rejected:
    with pytest.raises(Rejected) as rejected:
        store.read(name)
    return rejected.value


COMPOSED = "caf\u00e9/\u1e69\u304c.jpg"
DECOMPOSED = unicodedata.normalize("NFD", COMPOSED)
assert COMPOSED != DECOMPOSED


@pytest.mark.parametrize("stored", [COMPOSED, DECOMPOSED])
@pytest.mark.parametrize("asked", [COMPOSED, DECOMPOSED])
def test_names_are_found_however_unicode_composes_them(put: Put, stored: str, asked: str) -> None:
    store = put({stored: b"1", "other.jpg": b"2"})
    assert store.read(asked) == b"1"
    assert store.read("other.jpg") == b"2"
    store.close()


def test_the_exact_name_comes_first(put: Put) -> None:
    store = put({"caf\u00e9.jpg": b"composed", "cafe\u0301.jpg": b"decomposed"})
    assert store.read("caf\u00e9.jpg") == b"composed"
    assert store.read("cafe\u0301.jpg") == b"decomposed"
    store.close()


def test_several_names_that_differ_in_composition_alone_are_not_guessed(put: Put) -> None:
    # Neither is the one that is asked for, and both are it: ṩ is s with two marks, in any order.
    names = ("s\u0323\u0307.jpg", "\u1e63\u0307.jpg")
    store = put({names[0]: b"1", names[1]: b"2"})
    if type(store).__name__ == "BucketImages":  # asks for names: the composed and decomposed form
        assert store.read("s\u0307\u0323.jpg") == b"1"
    else:
        said = str(reject(store, "s\u0307\u0323.jpg"))
        assert r"'s\u0323\u0307.jpg' or '\u1e63\u0307.jpg'" in said or "rename one" in said
    store.close()


def test_a_backslash_of_windows_separates_folders(put: Put) -> None:
    store = put({"00000/a.jpg": b"1", "00000/b.jpg": b"2"})
    assert store.read(r"00000\a.jpg") == b"1"
    for name in (r"..\secret.jpg", r"00000\..\..\secret.jpg"):
        assert reject(store, name).reason in (Reason.OUTSIDE_IMAGES_ROOT, Reason.MISSING_IMAGE)
    store.close()


def windows_zip(files: dict[str, bytes], path: Path, system: int) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            info = zipfile.ZipInfo(name)
            info.filename = info.orig_filename = name  # as a program on Windows writes it
            info.create_system = system
            archive.writestr(info, data)
    return path


@pytest.mark.parametrize("system", [0, 10, 3])
def test_a_zip_made_on_windows(tmp_path: Path, system: int) -> None:
    files = {"images\\": b"", "images\\00000\\a.jpg": b"1", "images\\b.jpg": b"2"}
    store = open_images(str(windows_zip(files, tmp_path / "i.zip", system)), LIMIT)
    for name in ("images/00000/a.jpg", "00000/a.jpg", r"00000\a.jpg", r"images\00000\a.jpg"):
        assert store.read(name) == b"1", name
    assert store.read("b.jpg") == b"2"
    assert reject(store, r"..\b.jpg").reason is Reason.OUTSIDE_IMAGES_ROOT
    store.close()


SYSTEM_FILES = {
    **{"__MACOSX/._images": b"x", "__MACOSX/images/._a.jpg": b"x", ".DS_Store": b"x"},
    **{"images/.DS_Store": b"x", "images/._a.jpg": b"x", "Thumbs.db": b"x", "desktop.ini": b"x"},
}


@pytest.mark.parametrize("pack", [zip_of, tar_of])
def test_the_one_folder_of_an_archive_made_on_macos_may_be_left_out(
    tmp_path: Path, pack: Any
) -> None:
    files = {**SYSTEM_FILES, "images/a.jpg": b"1", "images/.hidden/b.jpg": b"2"}
    store = open_images(str(pack(files, tmp_path / "i.zip")), LIMIT)
    assert store.read("a.jpg") == store.read("images/a.jpg") == b"1"
    assert store.read(".hidden/b.jpg") == b"2"  # a name that an item gives
    store.close()


def test_a_missing_file_is_reported_with_one_that_is_there(put: Put) -> None:
    files = {"00000/000000001.jpg": b"1", "00000/000000012.jpg": b"2", "00000/._x.jpg": b"x"}
    store = put(files)
    for name in ("00000/000000011.jpg", "images/00000/000000001.jpg", "0000/x.jpg", "e\u0301.jpg"):
        rejected = reject(store, name)
        assert rejected.reason is Reason.MISSING_IMAGE
        assert f"no file {name!a} in the " in rejected.detail
        assert "; there is '00000" in rejected.detail
        assert rejected.detail.isascii()
    store.close()


@pytest.mark.parametrize("name", [
    *(".DS_Store", "a/.DS_Store", "__MACOSX/a.jpg", "a/__macosx/b", "._a.tar", "a/._b.parquet"),
    *(".ipynb_checkpoints/x.parquet", ".git/x", "Thumbs.db", "a/desktop.ini", ".hidden"),
])  # fmt: skip
def test_what_a_system_keeps_is_hidden(name: str) -> None:
    assert is_hidden(name)


@pytest.mark.parametrize(
    "name", ["a.jpg", "a.b/c.jpg", "./a.jpg", "../a", "a..b", "MACOSX/a", "_a"]
)
def test_what_a_person_keeps_is_not(name: str) -> None:
    assert not is_hidden(name)


def jpeg() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "JPEG")
    return buffer.getvalue()


@pytest.fixture(params=["folder", pytest.param("bucket", marks=pytest.mark.s3)])
def source_folder(request: Any, tmp_path: Path, put_in_bucket: Any) -> str:
    """A tar and a Parquet file, and beside them what notebooks and macOS leave."""
    folder = tmp_path / ".cache" / "data"  # hidden above: that says nothing of what is below
    for below in (folder, folder / ".ipynb_checkpoints", folder / "__MACOSX"):
        below.mkdir(parents=True, exist_ok=True)
    tar_of({"a.jpg": jpeg(), "a.txt": b"x", "._a.jpg": b"x", "__MACOSX/._a.txt": b"x"},
           folder / "0.tar")  # fmt: skip
    pq.write_table(pa.table({"image": [jpeg()], "text": ["x"]}), folder / "0.parquet")
    for name in ("._0.tar", "._0.parquet", "__MACOSX/0.tar", "__MACOSX/0.parquet"):
        (folder / name).write_bytes(b"\0\5\x16\7 AppleDouble")
    for end in ("tar", "parquet"):
        copy = folder / ".ipynb_checkpoints" / f"0-checkpoint.{end}"
        copy.write_bytes((folder / f"0.{end}").read_bytes())
    if request.param == "folder":
        return str(folder)
    url = request.getfixturevalue("s3_server").make_bucket(f"hidden-{os.urandom(6).hex()}")
    put_in_bucket(folder, f"{url}/data")
    return f"{url}/data"


@pytest.mark.parametrize(("kind", "end"), [(WebDataset, "tar"), (Parquet, "parquet")])
@pytest.mark.parametrize("pattern", ["", "/", "/*.{end}", "/**/*.{end}"])
def test_hidden_files_beside_a_source_are_passed_over(
    source_folder: str, kind: Any, end: str, pattern: str
) -> None:
    place = source_folder + pattern.replace("{end}", end)
    if "://" in place and "**" in place:
        place = place.replace("**/", "")  # a bucket's `*` goes through folders
    assert list_files(place, (f".{end}",)) == [f"{source_folder}/0.{end}"]
    source = kind(place, LIMIT)
    (found,) = outcomes_of(source)
    assert found["answer"] == "x"
    source.close()


def test_a_hidden_file_that_is_named_is_taken(tmp_path: Path) -> None:
    path = tar_of({"a.jpg": jpeg(), "a.txt": b"x"}, tmp_path / ".mine.tar")
    assert list_files(str(path), (".tar",)) == [str(path)]


def test_absolute_paths_inside_the_images_are_taken(pairs: Any, tmp_path: Path) -> None:
    pairs.add(4)
    link = tmp_path / "link"
    link.symlink_to(pairs.images)
    name = pairs.items[0]["image"]
    for root, asked in (
        (pairs.images, pairs.images / name),
        (link, link / name),
        (link, pairs.images / name),
        (Path(os.path.relpath(pairs.images)), pairs.images / name),
        (pairs.images, f"{pairs.images}//./00000/../{name}"),
    ):
        pairs.items[0]["image"] = str(asked)
        source = LlavaJson(pairs.write_json(), str(root), LIMIT)
        assert not [one for one in outcomes_of(source) if isinstance(one, str)], (root, asked)


def test_absolute_paths_elsewhere_stay_refused(pairs: Any, tmp_path: Path) -> None:
    name = pairs.add()["image"]
    secret = tmp_path / "secret.jpg"
    secret.write_bytes((pairs.images / name).read_bytes())
    beside = tmp_path / "images_2"
    beside.mkdir()
    (beside / "secret.jpg").write_bytes(secret.read_bytes())
    (pairs.images / "out.jpg").symlink_to(secret)
    (pairs.images / "outside").symlink_to(beside)
    store = open_images(str(pairs.images), LIMIT)
    for asked in (
        *(secret, beside / "secret.jpg", f"{pairs.images}/../secret.jpg", "/etc/passwd"),
        *(f"{pairs.images}/out.jpg", f"{pairs.images}/outside/secret.jpg", f"{pairs.images}_2/x"),
    ):
        assert reject(store, str(asked)).reason is Reason.OUTSIDE_IMAGES_ROOT, asked
    assert reject(store, str(pairs.images)).reason is not None


@pytest.mark.s3
def test_urls_inside_the_images_are_taken(pairs: Any, s3_server: Any, put_in_bucket: Any) -> None:
    name = pairs.add()["image"]
    url = s3_server.make_bucket(f"urls-{os.urandom(6).hex()}")
    put_in_bucket(pairs.images, f"{url}/images")
    put_in_bucket(pairs.images, f"{url}/other")
    store = open_images(f"{url}/images/", LIMIT)
    assert store.read(f"{url}/images/{name}") == store.read(name)
    for asked in (f"{url}/other/{name}", f"{url}/images/../other/{name}"):
        assert reject(store, asked).reason in (Reason.MISSING_IMAGE, Reason.OUTSIDE_IMAGES_ROOT)
    store.close()


def test_a_folder_of_hidden_files_alone_is_empty(tmp_path: Path) -> None:
    (tmp_path / "._0.tar").write_bytes(b"x")
    with pytest.raises(ConversionError, match="nothing named"):
        list_files(str(tmp_path), (".tar",))


def test_names_that_are_not_unicode_are_read_and_shown(tmp_path: Path) -> None:
    name = os.fsdecode(b"\xff.jpg")
    (tmp_path / name).write_bytes(b"1")
    store = open_images(str(tmp_path), LIMIT)
    assert store.read(name) == b"1"
    assert r"there is '\udcff.jpg'" in reject(store, "\u00ff.jpg").detail
