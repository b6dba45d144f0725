"""One window for all that is read ahead."""

import itertools
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from vlm_composer import read_ahead
from vlm_composer.read_ahead import map_ahead


@pytest.fixture
def threads():
    with ThreadPoolExecutor(4) as threads:
        yield threads


def test_results_come_in_order_and_an_error_in_its_place(threads):
    first_may_end = threading.Event()

    def inverse(number):
        if number == 9:
            assert first_may_end.wait(30)
        if number == 8:
            first_may_end.set()
        return 1 / number

    found = map_ahead(threads, inverse, range(9, -1, -1), 3)
    assert [next(found) for _ in range(9)] == [1 / number for number in range(9, 0, -1)]
    with pytest.raises(ZeroDivisionError):
        next(found)
    assert next(found, None) is None


@pytest.mark.parametrize("ahead", [0, 1, 4])
def test_items_are_taken_as_they_are_needed(threads, ahead):
    endless = itertools.count()
    found = map_ahead(threads, str, endless, ahead)
    assert [next(found), next(found)] == ["0", "1"]
    assert next(endless) == 2 + ahead


def test_one_that_is_left_computes_no_more():
    done, last_may_end = [], threading.Event()

    def add(number):
        done.append(number)
        assert number == 0 or last_may_end.wait(30)

    with ThreadPoolExecutor(1) as one:
        found = map_ahead(one, add, range(100), 8)
        next(found)
        found.close()
        last_may_end.set()
    assert len(done) <= 2


def test_there_is_one_window():
    """`Destination.publish` has no sequence: it waits as files come."""
    root = Path(read_ahead.__file__).parent.parent
    sources = [*root.glob("vlm_composer/**/*.py"), *root.glob("convert/**/*.py")]
    window = re.compile(r"popleft\(\)\.result|threads\.map\(|executor\.map\(|pool\.map\(")
    found = {path.name for path in sources if window.search(path.read_text())}
    assert len(sources) > 100
    assert found == {"read_ahead.py", "destination.py"}
