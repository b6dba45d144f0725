"""Shards of coloured squares in a folder and a bucket, and what reads them."""

import uuid

from torch.utils.data import DataLoader

from convert import convert_llava
from tiny import write_pairs
from vlm_composer.data.dataset import StreamingCaptions
from vlm_composer.data.leftovers import die_with_parent
from vlm_composer.data.stream import CheckedStream

SAMPLES = 80
"""Of the fixture `folder`, in seven shards."""
DEADLINE = 60
BAD = "shard.00000.00003.mds"
"""The one that something happens to."""


def write_shards(folder, count):
    json_path, images = write_pairs(folder, count)
    convert_llava(
        json_path, images, folder / "mds", eval_ratio=0, size_limit=2048, show_progress=False
    )
    return folder / "mds" / "train"


class Remote:
    """A prefix of a bucket of a real server."""

    def __init__(self, server, folder):
        self.server = server
        self.bucket = f"stream-{uuid.uuid4().hex}"
        self.url = server.make_bucket(self.bucket) + "/some/train"
        for path in folder.iterdir():
            self.put(path.name, path.read_bytes())

    def put(self, name, data):
        self.server.client().put_object(
            Bucket=self.bucket, Key=f"some/train/{name}", Body=bytes(data)
        )


def open_captions(local, remote=None, *, store_timeout=60, streaming=None, **stream):
    stream = CheckedStream(
        local=str(local),
        remote=remote and remote.url,
        store_timeout=store_timeout,
        **{"validate_hash": "xxh64", **stream},
    )
    return StreamingCaptions([stream], batch_size=4, **streaming or {})


def read(captions, workers=0):
    """All samples of an epoch, by id, none twice."""
    options = {"timeout": DEADLINE, "worker_init_fn": die_with_parent} if workers else {}
    loader = DataLoader(captions, 4, num_workers=workers, collate_fn=list, **options)
    batches = iter(loader)
    try:
        samples = [sample for batch in batches for sample in batch]
    finally:
        if workers:
            batches._shutdown_workers()  # a garbage collector that does it takes 5 s a worker
    by_id = {sample["id"]: sample for sample in samples}
    assert len(by_id) == len(samples)
    return by_id


def assert_same(found, expected):
    assert found == expected
