"""From a run's folder to its page."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from vlm_composer.report.page import render
from vlm_composer.report.run_folder import ReportError, read_run


def write_report(folder: Path, out: Path | None = None) -> Path:
    """Write a run's page, whole or not at all.

    Args:
        folder: The run's folder.
        out: The file; `report.html` in the run's folder when None.

    Returns:
        The file.

    Raises:
        ReportError: There is no run in the folder, or the file cannot be written.
    """
    page = render(read_run(folder))
    target = folder / "report.html" if out is None else out
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(page, encoding="utf-8", errors="replace")
        partial.replace(target)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise ReportError(f"{target} cannot be written: {error}; give another --out") from error
    return target
