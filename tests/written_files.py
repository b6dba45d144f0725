"""What a conversion has written, to be compared with what another one has."""

import json
from pathlib import Path


def written(folder: Path) -> dict[str, bytes]:
    """Everything in a folder but what tells one run from another."""
    found = {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }
    summary = json.loads(found.pop("summary.json"))
    del summary["seconds"], summary["arguments"]
    return {**found, "summary": json.dumps(summary).encode()}
