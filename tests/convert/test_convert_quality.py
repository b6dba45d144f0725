"""What is said of the samples: duplicates, placeholder images, lengths, sizes, prompts."""

import json
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from convert import duplicates
from convert.duplicates import MOVED, count_sharing, find_exceptions, sorted_hashes
from convert.longest_prompts import LongestPrompts
from convert.quality import Histogram, PromptCounts, Statistics
from convert.split import EVAL, TRAIN

steady = settings(deadline=None, derandomize=True, database=None)


def quality(pairs: Any) -> dict[str, Any]:
    return json.loads((pairs.out / "quality.json").read_text())


def test_duplicates_are_counted_and_dropped(pairs: Any) -> None:
    pairs.add(20)
    pairs.add(2, image=pairs.items[3]["image"])
    pairs.items += [{**item, "id": "again"} for item in pairs.items[5:9]]
    pairs.convert(eval_ratio=0)
    found = quality(pairs)
    assert (found["exact_duplicates"], found["same_image_other_text"]) == (4, 2)
    assert not pairs.rejects()

    summary = pairs.convert(eval_ratio=0, drop_duplicates=True, overwrite=True, max_reject_ratio=0)
    assert (summary.train, summary.duplicates, summary.rejected) == (22, 4, 0)
    assert summary.samples_in == 26
    assert quality(pairs)["exact_duplicates"] == 0
    assert "again" not in pairs.ids("train")
    assert pairs.rejects() == [
        {
            "index": 22 + number,
            "id": "again",
            "image": pairs.items[5 + number]["image"],
            "reason": "duplicate",
            "detail": f"the same image and text as item {5 + number}",
        }
        for number in range(4)
    ]


def test_placeholder_images(pairs: Any, capsys: pytest.CaptureFixture[str]) -> None:
    pairs.add(40)
    pairs.add(11, image=pairs.items[7]["image"])
    pairs.convert(eval_ratio=0, show_progress=True)
    found = quality(pairs)
    assert found["placeholder_images"] == 1
    (worst,) = found["placeholder_examples"]
    assert (worst["samples"], worst["texts"]) == (12, 12)
    assert worst["items"][:2] == [{"index": 7}, {"index": 40}]
    said = capsys.readouterr().err
    assert "1 images have 10 or more different texts, one has 12 (first at item 7)" in said
    assert "repeat" not in said


def test_the_longest_prompts_of_each_side(pairs: Any) -> None:
    for number in range(40):
        pairs.add()["conversations"][0]["value"] = "<image>\n" + "é" * (number // 2)
    pairs.items[7]["conversations"][0]["value"] = "x" * 20_000 + "\n<image>"
    pairs.convert(eval_ratio=0.25, workers=2)
    found = quality(pairs)["longest_prompts"]
    assert found.keys() == {"train", "eval"}
    for side, listed in found.items():
        prompts = {sample["prompt"] for sample in pairs.read(side)}
        longest = sorted(prompts, key=lambda text: (-len(text.encode()), text))[:8]
        assert listed == [
            {"bytes": len(text.encode()), "prompt": text[:10_000]} for text in longest
        ]


@given(prompts=st.lists(st.text("aé", max_size=12)), cut=st.integers(0, 30))
@steady
def test_the_longest_prompts_of_parts_are_those_of_all(prompts: list[str], cut: int) -> None:
    together, parts = LongestPrompts(), (LongestPrompts(), LongestPrompts())
    for number, prompt in enumerate(prompts):
        together.add("train", prompt)
        parts[number >= cut].add("train", prompt)
    merged = LongestPrompts.from_json(json.loads(json.dumps(parts[0].to_json())))
    merged.merge(parts[1])
    assert merged.to_json() == together.to_json()
    reverse = LongestPrompts()
    for prompt in reversed(prompts):
        reverse.add("train", prompt)
    assert reverse.to_json() == together.to_json()


def test_many_copies_are_alarming(pairs: Any, capsys: pytest.CaptureFixture[str]) -> None:
    pairs.add(20)
    pairs.items += pairs.items[:1]
    pairs.convert(eval_ratio=0, show_progress=True)
    assert "1 of 21 samples repeat the image and text" in capsys.readouterr().err


def test_an_eval_side_that_only_shows_what_train_shows(pairs: Any) -> None:
    image = pairs.add()["image"]
    pairs.add(9, image=image)
    with pytest.raises(ValueError, match=r"each of the 2 samples of eval .*--eval-ratio 0"):
        pairs.convert(eval_ratio=0.2)
    pairs.convert(eval_ratio=0)  # nothing in the way
    assert len(pairs.ids("train")) == 10


def test_shared_images_go_to_train(pairs: Any) -> None:
    pairs.add(50)
    pairs.convert(eval_ratio=0.2)
    held_out = pairs.ids("eval")
    in_train = next(item for item in pairs.items if item["id"] not in held_out)
    pairs.items[int(held_out[4])]["image"] = in_train["image"]
    summary = pairs.convert(eval_ratio=0.2, overwrite=True)
    assert summary.moved_to_train == 1
    assert pairs.ids("eval") == held_out[:4] + held_out[5:]


def test_lengths_sizes_and_prompts(pairs: Any) -> None:
    pairs.add(9)
    pairs.add(conversations=[
        {"from": "human", "value": "Describe picture 1.\n<image>"},
        {"from": "gpt", "value": "word " * 60},
    ])  # fmt: skip
    pairs.convert(eval_ratio=0.2)
    found = quality(pairs)
    words = found["captions"]["words"]
    assert (words["min"], words["max"], words["mean"]) == (3, 60, (9 * 3 + 60) / 10)
    assert dict(zip(words["edges"], words["bins"], strict=True))[50] == 1
    assert found["images"]["width"]["min"] == found["images"]["width"]["max"] == 32
    assert found["formats"] == {"JPEG": 10}
    assert found["samples"] == 10
    assert found["prompts"][0] == {"prompt": "Describe picture 1.\n<image>", "samples": 2}
    assert (found["prompts_different"], found["prompts_uncounted"]) == (9, 0)


@steady
@given(st.lists(st.integers(0, 10**6)), st.integers(0, 100))
def test_histograms_add_up(numbers: list[int], cut: int) -> None:
    edges = (0, 1, 10, 1000)
    parts = [Histogram(edges), Histogram(edges), Histogram(edges)]
    for number in numbers:
        parts[0].add(number)
    for part, some in zip(parts[1:], (numbers[:cut], numbers[cut:]), strict=True):
        for number in some:
            part.add(number)
    parts[1].merge(parts[2])
    assert parts[0] == parts[1]
    assert parts[0].count == sum(parts[0].bins) == len(numbers)
    assert parts[0].min == min(numbers, default=None)
    expected = Counter(max(edge for edge in edges if edge <= number) for number in numbers)
    assert dict(zip(edges, parts[0].bins, strict=True)) == {e: expected[e] for e in edges}


def test_prompts_are_counted_in_bounded_memory() -> None:
    counts = PromptCounts()
    for number in range(5000):
        counts.add(f"prompt {number % 3000}" + "long " * 1000)
    assert len(counts.counts) == 1000
    assert max(map(len, counts.counts)) == 200
    assert sum(counts.counts.values()) + counts.others == 5000


def test_statistics_survive_json() -> None:
    statistics = Statistics()
    statistics.add({"id": "1", "image": b"GIF89a", "prompt": "p", "answer": "a b"}, (3, 4))
    again = Statistics.from_json(json.loads(json.dumps(statistics.to_json())))
    again.merge(statistics)
    statistics.merge(Statistics.from_json(statistics.to_json()))
    assert json.dumps(again.to_json()) == json.dumps(statistics.to_json())


@steady
@given(
    items=st.lists(
        st.tuples(st.integers(0, 6), st.integers(0, 2), st.sampled_from([TRAIN, EVAL])),
        min_size=1, max_size=60,
    ),
    parts=st.integers(1, 4),
    drop=st.booleans(),
)  # fmt: skip
def test_hashes_find_what_is_shared(
    tmp_path_factory: Any, items: list[tuple[int, int, int]], parts: int, drop: bool
) -> None:
    """Against a plain search; in several files, and in ranges of a few items."""
    folder = tmp_path_factory.mktemp("hashes")
    high = (1 << 64) // 7  # images all over the range
    rows = [(image * high, 1, text, 2, i, side) for i, (image, text, side) in enumerate(items)]
    paths = []
    for part in range(parts):
        paths.append(folder / f"{part}.npy")
        np.save(paths[-1], sorted_hashes(rows[part::parts]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(duplicates, "_RANGE_ROWS", 5)
        exceptions = find_exceptions(paths, len(items), drop)
        sharing = count_sharing(paths, len(items), least_texts=2, keep=3)

    first: dict[tuple[int, int], int] = {}
    for index, (image, text, _) in enumerate(items):
        first.setdefault((image, text), index)
    originals = {i: first[item[:2]] for i, item in enumerate(items) if first[item[:2]] != i}
    kept = [(i, item) for i, item in enumerate(items) if not (drop and i in originals)]
    in_train = {image for _, (image, _, side) in kept if side == TRAIN}
    expected = {i: MOVED for i, (image, _, side) in kept if side == EVAL and image in in_train}
    if drop:
        expected |= originals
    assert dict(exceptions[["index", "original"]].tolist()) == expected
    assert exceptions["index"].tolist() == sorted(expected)
    assert sharing.exact_duplicates == len(originals)
    assert sharing.same_image_other_text == len(first) - len({image for image, _ in first})
    texts = Counter(image for image, _ in first)
    assert sharing.much_shared == sum(1 for count in texts.values() if count >= 2)
    assert [shared.texts for shared in sharing.most_shared] == sorted(
        (count for count in texts.values() if count >= 2), reverse=True
    )[:3]
