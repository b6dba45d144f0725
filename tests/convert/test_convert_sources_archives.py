"""Images in a zip, a tar and a bucket: the same as in a folder, and nothing gets out of hand."""

import pickle
import random
import shutil
import struct
import tarfile
import tempfile
import tracemalloc
import uuid
import zipfile
import zlib
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from convert import ConversionError
from convert.errors import Reason, Rejected
from convert.sources import LlavaJson
from convert.sources.archive_images import ArchiveImages
from convert.sources.image_places import open_images
from source_items import (
    LIMIT,
    add_to_tar,
    check_pieces_are_independent,
    images_of,
    items_of,
    outcomes_of,
    tar_of,
    zip_of,
)

PLACES = {
    "stored zip": lambda files, folder: zip_of(files, folder / "images.zip"),
    "deflated zip": lambda files, folder: zip_of(
        files, folder / "images.zip", compression=zipfile.ZIP_DEFLATED
    ),
    "tar": lambda files, folder: tar_of(files, folder / "images.tar"),
    "tar without a suffix": lambda files, folder: tar_of(files, folder / "images.part"),
}


def reason_of(place: Any, name: str) -> Reason:
    """Why an image is not read."""
    with pytest.raises(Rejected) as rejected:
        place.read(name)
    assert len(str(rejected.value)) < 600
    return rejected.value.reason


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: Any) -> Path:
    """A temporary folder that must be empty at the end."""
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@pytest.mark.parametrize("kind", PLACES)
@pytest.mark.parametrize("prefix", ["", "./", "images/", "./images/"])
def test_the_same_items_as_from_a_folder(pairs: Any, kind: str, prefix: str, scratch: Path) -> None:
    pairs.add(300)
    pairs.write_image("large.jpg" if prefix == "" else "00000/large.jpg", bytes(LIMIT + 1))
    pairs.add(1, image="large.jpg" if prefix == "" else "00000/large.jpg")
    for name in ("absent.jpg", "../secret.jpg", "/etc/passwd", "a\0b", "\ud800", "00000/..", None):
        pairs.add(1, image=name)
    for name in ("./00000/000000001.jpg", "00000/../00000/000000001.jpg"):
        pairs.add(1, image=name)
    from_folder = LlavaJson(pairs.write_json(), pairs.images, LIMIT)
    archive = PLACES[kind](images_of(pairs, prefix), pairs.folder)
    source = LlavaJson(pairs.json_path, archive, LIMIT)
    expected = outcomes_of(from_folder)
    assert [one for one in expected if isinstance(one, str)] == [
        *(Reason.TOO_LARGE, Reason.MISSING_IMAGE, Reason.OUTSIDE_IMAGES_ROOT),
        *(Reason.OUTSIDE_IMAGES_ROOT, Reason.UNREADABLE_IMAGE, Reason.UNREADABLE_IMAGE),
        *(Reason.UNREADABLE_IMAGE, Reason.BAD_IMAGE_FIELD),
    ]
    folder = expected.index(Reason.BAD_IMAGE_FIELD) - 1
    expected[folder] = Reason.OUTSIDE_IMAGES_ROOT  # "." is no name of an archive's
    assert outcomes_of(source) == expected
    check_pieces_are_independent(source)
    source.close()
    assert not list(scratch.iterdir())


def test_another_machine_makes_the_index_again(pairs: Any, scratch: Path) -> None:
    pairs.add(1)
    source = LlavaJson(pairs.write_json(), zip_of(images_of(pairs), pairs.folder / "i.zip"), LIMIT)
    (item,) = items_of(source)
    (folder,) = scratch.iterdir()
    shutil.rmtree(folder)
    assert items_of(source) == [item]
    source.close()
    assert not list(scratch.iterdir())


def test_an_archive_whose_top_folder_is_not_the_only_one_is_taken_as_it_is(pairs: Any) -> None:
    archive = zip_of({"a/b.jpg": b"1", "c.jpg": b"2"}, pairs.folder / "i.zip")
    place = ArchiveImages(str(archive), LIMIT)
    assert place.read("a/b.jpg") == b"1"
    assert reason_of(place, "b.jpg") is Reason.MISSING_IMAGE
    place.close()


def test_a_name_that_is_there_comes_before_one_without_its_top_folder(pairs: Any) -> None:
    archive = zip_of({"a/b.jpg": b"1", "a/a/b.jpg": b"2", "a/a/a/c": b"3"}, pairs.folder / "i.zip")
    place = ArchiveImages(str(archive), LIMIT)
    assert [place.read(name) for name in ("a/b.jpg", "b.jpg", "a/a/b.jpg", "a/a/c")] == [
        *(b"1", b"1", b"2", b"3"),
    ]
    place.close()


def test_of_two_files_of_a_name_the_last_is_meant(pairs: Any) -> None:
    with tarfile.open(pairs.folder / "i.tar", "w") as tar:
        add_to_tar(tar, "a", b"first")
        add_to_tar(tar, "./a", b"last")
    with zipfile.ZipFile(pairs.folder / "i.zip", "w") as archive:
        archive.writestr("a", b"first")
        with pytest.warns(UserWarning, match="Duplicate name"):
            archive.writestr("a", b"last")
    for name in ("i.tar", "i.zip"):
        place = open_images(str(pairs.folder / name), LIMIT)
        assert place.read("a") == b"last"
        place.close()


def test_names_outside_of_ascii(pairs: Any) -> None:
    names = ["ü.jpg", "图/日.jpg", "x" * 300 + "é"]
    files = {name: name.encode() for name in names}
    dos = zip_of({"u\u2030": b""} | files, pairs.folder / "i.zip")
    marked = dos.read_bytes()
    unmarked = bytearray(marked)  # as Info-ZIP writes them: UTF-8, and not marked as such
    for magic, flags in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        place = -1
        while (place := unmarked.find(magic, place + 1)) >= 0:
            unmarked[place + flags + 1] &= ~0x08
    (pairs.folder / "unmarked.zip").write_bytes(unmarked)
    tar_of(files, pairs.folder / "i.tar")
    for name in ("i.zip", "unmarked.zip", "i.tar"):
        place = open_images(str(pairs.folder / name), LIMIT)
        assert [place.read(name) for name in names] == list(files.values())
        place.close()


def test_a_tar_that_ends_with_a_zip_is_a_tar(pairs: Any) -> None:
    inner = zip_of({"b": b"2"}, pairs.folder / "inner.zip").read_bytes()
    place = ArchiveImages(str(tar_of({"a": b"1", "b.zip": inner}, pairs.folder / "i.tar")), LIMIT)
    assert place.read("a") == b"1"
    place.close()


def test_links_in_a_tar(pairs: Any) -> None:
    with tarfile.open(pairs.folder / "i.tar", "w") as tar:
        add_to_tar(tar, "a/1.jpg", b"1")
        for name, target in (
            *(("a/soft", "1.jpg"), ("b/up", "../a/soft"), ("out", "../../etc/passwd")),
            *(("loop", "loop"), ("dangling", "nothing"), ("root", "/etc/passwd")),
        ):
            add_to_tar(tar, name, type=tarfile.SYMTYPE, linkname=target)
        add_to_tar(tar, "b/hard", type=tarfile.LNKTYPE, linkname="a/1.jpg")
        add_to_tar(tar, "pipe", type=tarfile.FIFOTYPE)
    place = open_images(str(pairs.folder / "i.tar"), LIMIT)
    assert [place.read(name) for name in ("a/soft", "b/up", "b/hard")] == [b"1"] * 3
    assert {
        name: reason_of(place, name) for name in ("out", "root", "loop", "dangling", "pipe")
    } == {
        "out": Reason.OUTSIDE_IMAGES_ROOT,
        "root": Reason.OUTSIDE_IMAGES_ROOT,
        "loop": Reason.UNREADABLE_IMAGE,
        "dangling": Reason.MISSING_IMAGE,
        "pipe": Reason.UNREADABLE_IMAGE,
    }
    place.close()


def test_zip_slip_is_a_name_that_no_item_may_have(pairs: Any, scratch: Path) -> None:
    names = ["../../secret.jpg", "/secret.jpg", "a/../../secret.jpg", "..", "good.jpg"]
    zip_of(dict.fromkeys(names, b"1"), pairs.folder / "i.zip")
    tar_of(dict.fromkeys(names, b"1"), pairs.folder / "i.tar")
    before = {*pairs.folder.rglob("*.jpg")}
    for archive in ("i.zip", "i.tar"):
        place = open_images(str(pairs.folder / archive), LIMIT)
        assert place.read("good.jpg") == b"1"
        for name in names[:-1]:
            assert reason_of(place, name) is Reason.OUTSIDE_IMAGES_ROOT
        place.close()
    assert {*pairs.folder.rglob("*.jpg")} == before


def zip_entry(path: Path, data: bytes, **header: int) -> ArchiveImages:
    """A deflated zip of one file `a`, whose directory says something else of it than is true."""
    zip_of({"a": data}, path, compression=zipfile.ZIP_DEFLATED)
    raw = bytearray(path.read_bytes())
    directory = raw.rindex(b"PK\1\2")
    for field, value in header.items():
        offset, form = {
            "flags": (8, "<H"), "method": (10, "<H"), "crc": (16, "<I"),
            "packed": (20, "<I"), "size": (24, "<I"), "offset": (42, "<I"),
        }[field]  # fmt: skip
        struct.pack_into(form, raw, directory + offset, value)
    path.write_bytes(raw)
    return ArchiveImages(str(path), LIMIT)


@pytest.mark.parametrize(
    ("header", "reason", "problem"),
    [
        ({"flags": 1}, Reason.UNREADABLE_IMAGE, "is encrypted"),
        ({"method": 14}, Reason.UNREADABLE_IMAGE, "method 14; make the zip with deflate"),
        ({"method": 0}, Reason.UNREADABLE_IMAGE, "is stored, and of two sizes"),
        ({"crc": 7}, Reason.UNREADABLE_IMAGE, "another checksum than the zip says"),
        ({"size": 10}, Reason.UNREADABLE_IMAGE, "does not unpack to the 10 bytes"),
        ({"size": 60_000}, Reason.UNREADABLE_IMAGE, "does not unpack to the 60000 bytes"),
        ({"size": LIMIT + 1}, Reason.TOO_LARGE, f"{LIMIT + 1} bytes"),
        ({"packed": LIMIT + 1}, Reason.TOO_LARGE, f"({LIMIT + 1} in the archive)"),
        ({"packed": 30}, Reason.UNREADABLE_IMAGE, "does not unpack"),
        ({"packed": 50_000}, Reason.UNREADABLE_IMAGE, "goes on after the zip's end"),
        ({"offset": 3}, Reason.UNREADABLE_IMAGE, "has no header where the zip says"),
    ],
)
def test_a_zip_that_lies(pairs: Any, header: dict[str, int], reason: Reason, problem: str) -> None:
    place = zip_entry(pairs.folder / "i.zip", random.Random(0).randbytes(20_000), **header)
    with pytest.raises(Rejected) as rejected:
        place.read("a")
    assert rejected.value.reason is reason
    assert problem in rejected.value.detail
    place.close()


def test_a_zip_bomb_unpacks_to_no_more_than_it_says(pairs: Any) -> None:
    bomb = bytes(200_000_000)
    assert len(zlib.compress(bomb)) > LIMIT  # so this one is refused for what it takes already
    honest = zip_entry(pairs.folder / "honest.zip", bomb)
    packed = zip_entry(pairs.folder / "packed.zip", bomb[: LIMIT * 100], size=LIMIT)
    del bomb
    tracemalloc.start()
    assert reason_of(honest, "a") is Reason.TOO_LARGE
    assert reason_of(packed, "a") is Reason.UNREADABLE_IMAGE
    assert tracemalloc.get_traced_memory()[1] < 2_000_000
    tracemalloc.stop()
    honest.close()
    packed.close()


@pytest.mark.parametrize("mode", ["gz", "bz2", "xz"])
def test_a_compressed_tar_is_for_its_user_to_unpack(pairs: Any, mode: str) -> None:
    path = tar_of({"a": b"1"}, pairs.folder / "i.tar", f"w:{mode}")
    with pytest.raises(ConversionError, match=r"i\.tar is compressed by .*unpack it once"):
        open_images(str(path), LIMIT).check()


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_an_archive_cut_short(pairs: Any, kind: str) -> None:
    pairs.add(20)
    path = PLACES["stored zip" if kind == "zip" else kind](images_of(pairs), pairs.folder)
    whole = path.read_bytes()
    cuts = [len(whole) // 2, 100]
    for cut in cuts:
        path.write_bytes(whole[:cut])
        with pytest.raises(ConversionError, match=f"images.{kind} is not a whole {kind} "):
            open_images(str(path), LIMIT).check()
    if kind == "tar":
        path.write_bytes(whole[:5120] + b"?" * 512 + whole[5632:])
        with pytest.raises(ConversionError, match=r"images\.tar is not a whole tar \(at byte "):
            open_images(str(path), LIMIT).check()


@pytest.mark.parametrize("kind", ["zip", "tar"])
@settings(deadline=None, derandomize=True, database=None, max_examples=60)
@given(
    damage=st.lists(st.tuples(st.integers(0, 6000), st.integers(0, 255)), min_size=1, max_size=6)
)
def test_damage_is_refused_or_rejected_and_never_crashes(
    kind: str, damage: list[tuple[int, int]]
) -> None:
    files = {f"{n}/{n}.jpg": bytes([n]) * 500 * n for n in range(4)}
    with tempfile.TemporaryDirectory() as folder:
        path = PLACES["deflated zip" if kind == "zip" else kind](files, Path(folder))
        data = bytearray(path.read_bytes())
        for place, value in damage:
            data[place % len(data)] = value
        path.write_bytes(data)
        images = open_images(str(path), LIMIT)
        for name in files:
            with suppress(Rejected, ConversionError):
                images.read(name)
        images.close()


def test_a_tar_of_headers_without_end_is_refused(pairs: Any) -> None:
    path = pairs.folder / "i.tar"
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        add_to_tar(tar, "x" * 2_000_000, b"1")
    with pytest.raises(ConversionError, match="a header of type b'L' for 2000001 bytes"):
        open_images(str(path), LIMIT).check()
    back = tarfile.TarInfo("a")
    back.size = 0
    header = bytearray(back.tobuf(tarfile.GNU_FORMAT))
    header[124:136] = b"\xff" * 10 + b"\xfc\x00"  # -1024, and so back to where it starts
    checksum = sum(header[:148]) + sum(header[156:]) + 8 * 32
    header[148:156] = f"{checksum:06o}\0 ".encode()
    path.write_bytes(bytes(header) * 2)
    with pytest.raises(ConversionError, match="for -1024 bytes"):
        open_images(str(path), LIMIT).check()


def test_the_members_of_a_tar_stay_out_of_memory(pairs: Any) -> None:
    path = pairs.folder / "i.tar"
    with tarfile.open(path, "w") as tar:
        for number in range(20_000):
            tar.members.clear()
            add_to_tar(tar, f"00000/{number:09}.jpg")
    images = open_images(str(path), LIMIT)
    tracemalloc.start()
    images.check()
    assert tracemalloc.get_traced_memory()[1] < 3_000_000  # tarfile's own list takes 30 MB
    tracemalloc.stop()
    assert images.read("00000/000019999.jpg") == b""
    images.close()


@pytest.mark.s3
@pytest.mark.parametrize("kind", ["deflated zip", "tar"])
def test_an_archive_in_a_bucket_is_read_where_it_is(
    pairs: Any, kind: str, s3_server: Any, put_in_bucket: Any, scratch: Path
) -> None:
    pairs.add(40)
    pairs.add(1, image="absent.jpg")
    pairs.add(1, image=None)
    path = PLACES[kind](images_of(pairs), pairs.folder)
    url = s3_server.make_bucket(f"archive-{uuid.uuid4().hex}")
    put_in_bucket(pairs.folder, url)
    source = LlavaJson(pairs.write_json(), f"{url}/{path.name}", LIMIT)
    assert outcomes_of(source) == outcomes_of(LlavaJson(pairs.json_path, pairs.images, LIMIT))
    source.close()
    assert not list(scratch.iterdir())


def test_rejected_survives_a_process() -> None:
    rejected = pickle.loads(pickle.dumps(Rejected(Reason.NOT_JSON, "why")))
    assert (rejected.reason, rejected.detail, str(rejected)) == (
        Reason.NOT_JSON,
        "why",
        "not_json: why",
    )
