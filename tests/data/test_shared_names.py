"""Runs that start together on a machine get shared memory of their own; their ranks agree on it."""

from contextlib import suppress

import pytest
from composer.utils import dist
from streaming.base.constant import LOCALS
from streaming.base.shared import SharedMemory, prefix
from streaming.base.shared.prefix import _get_path, _pack_locals
from streaming.base.world import World

from vlm_composer.data import shared_names
from vlm_composer.data.shared_names import claim_prefix


def late_rival(monkeypatch, module):
    """Has another run take the number that was found free, before it is claimed."""
    find, taken = prefix._check_and_find_retrying, []

    def find_then_lose(*arguments, **options):
        number = find(*arguments, **options)
        if not taken:
            taken.append(number)
            data = _pack_locals(["/elsewhere"], number)
            with suppress(FileExistsError):  # another test's process took it this very moment
                block = SharedMemory(_get_path(number, LOCALS), True, len(data))
                block.buf[: len(data)] = data
        return number

    monkeypatch.setattr(module, "_check_and_find_retrying", find_then_lose)
    return taken


def test_a_number_that_another_run_took_is_passed_over(monkeypatch, tmp_path):
    taken = late_rival(monkeypatch, shared_names)
    number, _ = claim_prefix([str(tmp_path)], [None], World.detect())
    assert number != taken[0]


def test_streaming_itself_fails_there(monkeypatch, tmp_path):
    """When this one fails, `shared_names` may go."""
    late_rival(monkeypatch, prefix)
    with pytest.raises(FileExistsError):
        prefix.get_shm_prefix([str(tmp_path)], [None], World.detect())


@pytest.mark.world_size(2)
def test_ranks_agree_though_the_second_sees_another_number_free(monkeypatch, shared_path):
    find = prefix._check_and_find_retrying
    offset = dist.get_global_rank()
    monkeypatch.setattr(
        shared_names, "_check_and_find_retrying", lambda *a, **o: find(*a, **o) + offset
    )
    number, _ = claim_prefix([str(shared_path)], [None], World.detect())
    assert dist.all_gather_object(number) == [number] * 2


@pytest.mark.world_size(2)
def test_a_folder_in_use_is_an_error_on_every_rank(monkeypatch, shared_path):
    def in_use(folders, *rest):
        raise ValueError(f"Reused local directory: {folders}")

    if dist.get_local_rank() == 0:  # which alone looks
        monkeypatch.setattr(shared_names, "_check_and_find_retrying", in_use)
    with pytest.raises(ValueError, match="Reused local directory"):
        claim_prefix([str(shared_path)], ["elsewhere"], World.detect())
