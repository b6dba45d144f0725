"""Where checkpoints go to and come from: written to, read from, and free of another run's."""

from __future__ import annotations

import tempfile
import uuid
from contextlib import suppress
from pathlib import Path

from vlm_composer.config import TrainConfig
from vlm_composer.outages import StoreError, ride_out
from vlm_composer.preflight.finding import Findings
from vlm_composer.storage import FolderStore, Store, open_store
from vlm_composer.training.checkpoint_file import SUFFIX
from vlm_composer.training.checkpoint_folder import checkpoints_among
from vlm_composer.training.exported_connector import FACTS_FILE
from vlm_composer.training.resumption import check_free

PROBE = ".vlm_composer_probe"
"""How the name of the file starts that is written to see whether a store can be written."""


def check_save_folder(config: TrainConfig, seconds: float) -> Findings:
    """Write, read and delete a file of a few bytes, and look for checkpoints.

    Args:
        config: The run.
        seconds: How long a bucket may be unavailable.
    """
    found = Findings()
    if config.save_folder is None:
        found.warn("no save_folder: no checkpoint is written", "set save_folder")
        return found
    url = config.folder(config.save_folder)
    with found.failing():
        store = open_store(url)
        check_writable(store, seconds)
        names = checkpoints_among(ride_out(store.names, f"list {url}", seconds))
        check_free(config, url, names)
        if not names:
            found.ok(f"{url}: written, read, deleted; no checkpoint yet")
        elif config.save_overwrite:
            found.warn(
                f"{url} holds {len(names)} checkpoints, the newest is {names[0]}; save_overwrite "
                "deletes them all",
                "set autoresume: true instead to go on from it",
            )
        else:
            found.ok(f"{url}: written, read, deleted; goes on from {names[0]}")
    return found


def check_load_path(config: TrainConfig, seconds: float) -> Findings:
    """See that there is a checkpoint at `load_path`; whether it fits is seen when it is loaded.

    Args:
        config: The run.
        seconds: How long a bucket may be unavailable.
    """
    found = Findings()
    if config.load_path is None:
        return found
    path = config.folder(config.load_path)
    names_file = path.endswith(SUFFIX) or Path(path).is_file()
    folder, _, name = path.rpartition("/") if names_file else (path, "", "")
    with found.failing():
        if "://" not in path and not Path(path).exists():
            raise FileNotFoundError(f"load_path: there is nothing at {path}; check the path")
        if names_file and "://" not in path:
            there = [name or path]
        else:
            store = open_store(folder)
            names = ride_out(lambda: store.names(name), f"list {folder}", seconds)
            if names_file:
                there = names
            elif FACTS_FILE in names:
                there = ["the connector"]
            else:
                there = checkpoints_among(names)
        if not there:
            raise FileNotFoundError(
                f"load_path: {path} holds no checkpoint (ep0-ba100{SUFFIX}) and no export; "
                "check the path"
            )
        found.ok(f"starts from {there[0]} of {folder or '.'}")
    return found


def check_writable(store: Store, seconds: float) -> None:
    """Write a tiny file, read it back and delete it; what had to be made for it is deleted too.

    Args:
        store: The folder or bucket.
        seconds: How long it may be unavailable.

    Raises:
        StoreError: The store cannot be reached, written, read, or deleted from.
    """
    name = f"{PROBE}-{uuid.uuid4().hex[:12]}"  # another run may look at the same moment
    made = _missing_folders(store.folder) if isinstance(store, FolderStore) else []
    try:
        with tempfile.TemporaryDirectory() as folder:
            sent, got = Path(folder, "sent"), Path(folder, "got")
            sent.write_text(name)
            ride_out(lambda: store.put(sent, name), f"write to {store.url}", seconds)
            try:
                ride_out(lambda: store.get(name, got), f"read from {store.url}", seconds)
                if got.read_text() != name:
                    raise StoreError(f"{store.url} gives back another file than it was given")
            finally:
                ride_out(lambda: store.delete(name), f"delete from {store.url}", seconds)
    finally:
        for path in made:
            with suppress(OSError):  # another run has put something in it
                path.rmdir()


def _missing_folders(folder: Path) -> list[Path]:
    """A folder and those above it that do not exist, the deepest first."""
    return [path for path in (folder, *folder.parents) if not path.exists()]
