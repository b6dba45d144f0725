"""One name for a data set's shared memory, that all ranks of a node agree on.

streaming 0.13 numbers the blocks of every data set on a machine, and each rank looks for the first
free number by itself. Where another run starts or ends meanwhile, ranks choose different ones
("shared memory prefix was not registered by local leader") or two runs the same (FileExistsError).
Importing this module replaces that: a node's first rank takes a number and tells the others.
"""

from __future__ import annotations

import streaming.base.dataset
from composer.utils import dist
from streaming.base.constant import LOCALS, SHM_TO_CLEAN
from streaming.base.shared import SharedMemory
from streaming.base.shared.prefix import (
    _check_and_find_retrying,
    _check_self,
    _get_path,
    _pack_locals,
)
from streaming.base.world import World

from vlm_composer.ranks import run_on


def claim_prefix(
    streams_local: list[str],
    streams_remote: list[str | None],
    world: World,
    retry: int = 100,
) -> tuple[int, SharedMemory]:
    """Take a number for a data set's blocks; every rank calls this, as `get_shm_prefix`.

    Args:
        streams_local: Folders that the streams are read from.
        streams_remote: Where each is downloaded from.
        world: streaming's view of nodes and ranks.
        retry: Looks at a folder that is in use before that is an error.

    Returns:
        The number, and the block that says whose it is.

    Raises:
        ValueError: Another data set of this machine uses one of the folders.
    """
    _check_self(streams_local)

    def claim() -> tuple[int, SharedMemory]:
        while True:
            prefix = max(
                _check_and_find_retrying(streams_local, streams_remote, name, retry)
                for name in SHM_TO_CLEAN
            )
            data = _pack_locals(streams_local, prefix)
            try:
                block = SharedMemory(_get_path(prefix, LOCALS), True, len(data))
            except FileExistsError:
                continue  # another run took it since
            block.buf[: len(data)] = data
            return prefix, block

    claimed = run_on(world.is_local_leader, claim)
    numbers = dist.all_gather_object((world.node, claimed and claimed[0]))
    if claimed is not None:
        return claimed
    (prefix,) = {number for node, number in numbers if node == world.node and number is not None}
    return prefix, SharedMemory(_get_path(prefix, LOCALS), False)


streaming.base.dataset.get_shm_prefix = claim_prefix
