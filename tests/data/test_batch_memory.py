"""A worker's memory for batches: used again, and never while somebody sees it."""

import gc
import os
import random

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from vlm_composer.data import batch_memory
from vlm_composer.data.batch_memory import BatchMemory
from vlm_composer.data.leftovers import die_with_parent

SHAPE = (3, 5)
IN_FLIGHT = 4
"""The one here and the next before this one is gone, and two that torch has a worker make ahead."""


class Filled:
    """A collate_fn: a batch of [index] is a tensor of that number, and where its memory lies."""

    def __init__(self, dtype=torch.int64, sizes=1):
        self.dtype, self.sizes = dtype, sizes
        self.memory = BatchMemory()

    def __call__(self, indices):
        place = []

        def write(tensor):
            place.append(tensor.data_ptr())
            tensor.fill_(indices[0])

        shape = (indices[0] % self.sizes + 1, *SHAPE)
        return self.memory.batch(shape, self.dtype, write), place[0], os.getpid()


@pytest.fixture
def loader():
    loaders = []

    def make(count, *, workers=1, dtype=torch.int64, sizes=1, persistent=True, **options):
        made = DataLoader(
            range(count),
            batch_size=1,
            num_workers=workers,
            collate_fn=Filled(dtype, sizes),
            worker_init_fn=die_with_parent,
            persistent_workers=persistent and workers > 0,
            **options,
        )
        loaders.append(made)
        return made

    yield make
    for made in loaders:
        if made._iterator is not None:
            made._iterator._shutdown_workers()


def right(tensor, index, sizes=1):
    return tensor.shape == (index % sizes + 1, *SHAPE) and bool((tensor == index).all())


@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.int64])
def test_batches_that_are_kept_stay_what_they_were(loader, workers, dtype):
    for _ in range(2):
        batches = [batch for batch, *_ in loader(40, workers=workers, dtype=dtype, sizes=3)]
        assert all(batch.dtype == dtype for batch in batches)
        assert all(right(batch, index, 3) for index, batch in enumerate(batches))


def test_memory_is_used_again_once_nobody_sees_it(loader):
    made = loader(60)
    places = []
    for index, (batch, place, _) in enumerate(made):
        assert right(batch, index)
        places.append(place)
    assert len(set(places)) <= IN_FLIGHT
    again = [place for _, place, _ in made]
    assert set(again) <= set(places)


def test_a_part_of_a_batch_keeps_all_of_its_memory(loader):
    views, places = [], []
    for index, (batch, place, _) in enumerate(loader(60)):
        if index % 7 == 0:
            views.append((index, place, batch[0, 1:].t()))
        else:
            places.append(place)
        assert all(bool((view == kept).all()) for kept, _, view in views)
    assert len(views) == 9
    for kept, place, view in views:
        assert bool((view == kept).all())
        assert place not in places[kept:]


def test_kept_at_random_over_epochs(loader):
    draw = random.Random(3)
    made = loader(50, workers=2, sizes=5)
    kept = []
    for _ in range(4):
        for index, (batch, *_) in enumerate(made):
            if draw.random() < 0.5:
                kept.append((index, batch))
            while kept and draw.random() < 0.4:
                kept.pop(draw.randrange(len(kept)))
            assert all(right(batch, index, 5) for index, batch in kept)


def test_an_epoch_that_is_left_gives_its_memory_back(loader):
    made = loader(60)
    places = set()
    for _ in range(12):
        for index, (batch, place, _) in zip(range(3), made, strict=False):
            assert right(batch, index)
            places.add(place)
    assert len(places) <= IN_FLIGHT


def test_a_forked_process_gives_nothing_back(loader):
    made = loader(60)
    batches = iter(made)
    held, place, _ = next(batches)
    child = os.fork()
    if child == 0:
        del held
        gc.collect()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert place not in [place for _, place, _ in batches]
    assert right(held, 0)


def test_what_ended_workers_wrote_is_forgotten(loader):
    first = loader(20, persistent=False)
    kept = [batch for batch, *_ in first]
    (pid,) = {pid for *_, pid in loader(1, persistent=False)}
    assert {name.pid for name in batch_memory._received} == {pid}
    assert all(right(batch, index) for index, batch in enumerate(kept))


def test_memory_that_is_sent_starts_empty(loader):
    spawned = loader(9, multiprocessing_context="spawn")
    assert all(right(batch, index) for index, (batch, *_) in enumerate(spawned))


def test_numpy_sees_the_same_memory(loader):
    (batch, *_) = next(iter(loader(9)))
    seen = batch.numpy()
    del batch
    gc.collect()
    assert np.array_equal(seen, np.zeros((1, *SHAPE)))
