"""A store that goes away while sources are read: waited for, and never taken for damage."""

import threading
import uuid
from typing import Any

import pytest

from convert import ConversionError
from convert.sources import LlavaJson
from convert.sources.archive_index import write_index
from convert.sources.files import InputFile
from source_items import LIMIT, images_of, items_of, tar_of, zip_of


@pytest.mark.s3
def test_an_outage_is_ridden_out(pairs: Any, s3_server: Any, put_in_bucket: Any) -> None:
    pairs.add(40)
    url = s3_server.make_bucket(f"outage-{uuid.uuid4().hex}")
    put_in_bucket(pairs.images, url)
    source = LlavaJson(pairs.write_json(), url, LIMIT)
    (piece,) = [piece for file in source.files() for piece in source.pieces(file)]
    images = source.read(piece, [True] * 40)
    first = next(images)
    s3_server.kill()
    revival = threading.Thread(target=s3_server.start)
    revival.start()
    expected = items_of(LlavaJson(pairs.json_path, pairs.images, LIMIT))
    assert [first, *images] == expected
    revival.join()
    source.close()


@pytest.fixture
def impatient(monkeypatch: Any, s3_server: Any) -> Any:
    """A server that may be killed, and a reader that does not wait for it."""
    monkeypatch.setattr("convert.sources.files.PATIENCE", 0)
    yield s3_server
    s3_server.start()


@pytest.mark.s3
@pytest.mark.parametrize("make", [zip_of, tar_of])
def test_an_archive_out_of_reach_is_not_called_damaged(
    pairs: Any, make: Any, impatient: Any, put_in_bucket: Any, monkeypatch: Any
) -> None:
    pairs.add(3)
    path = make(images_of(pairs), pairs.folder / "images.archive")
    url = impatient.make_bucket(f"away-{uuid.uuid4().hex}")
    put_in_bucket(pairs.folder, url)
    read_at = InputFile.read_at

    def killed_once_known(file: InputFile, offset: int, count: int) -> bytes:
        """What it starts with says which kind it is; the server goes before the rest is read."""
        found = read_at(file, offset, count)
        impatient.kill()
        return found

    monkeypatch.setattr("convert.sources.files._BUCKET_BUFFER_BYTES", 512)
    monkeypatch.setattr(InputFile, "read_at", killed_once_known)
    with pytest.raises(ConversionError) as error:
        write_index(f"{url}/{path.name}", pairs.folder / "index")
    assert "read images.archive of" in str(error.value)
    assert "not a whole" not in str(error.value)


@pytest.mark.s3
def test_a_json_out_of_reach_has_not_changed(
    pairs: Any, impatient: Any, put_in_bucket: Any
) -> None:
    pairs.add(3)
    pairs.write_json()
    url = impatient.make_bucket(f"away-{uuid.uuid4().hex}")
    put_in_bucket(pairs.folder, url)
    source = LlavaJson(f"{url}/{pairs.json_path.name}", pairs.images, LIMIT)
    (piece,) = [piece for file in source.files() for piece in source.pieces(file)]
    impatient.kill()
    with pytest.raises(ConversionError, match=r"read pairs\.json of") as error:
        list(source.read(piece, [True] * 3))
    assert "when this conversion began" not in str(error.value)
    source.close()
