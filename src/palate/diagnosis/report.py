"""The report of a run: report.html and report.md, from the files of its directory and nothing else."""

from __future__ import annotations

import os
from pathlib import Path

from palate.diagnosis import report_html, report_markdown
from palate.diagnosis.run_folder import read
from palate.settings import PalateError


def write(folder: Path) -> tuple[Path, Path]:
    """Write both reports into a run directory; returns their paths, the page first.

    Any run can be reported, at any time: what is missing is named in the report. PalateError when the folder
    itself is not there.
    """
    try:
        run = read(folder)
    except NotADirectoryError:
        raise PalateError(f"{folder}: there is no such run directory. `palate report RUN` names one.") from None
    page, text = folder / "report.html", folder / "report.md"
    _replace(page, report_html.render(run))
    _replace(text, report_markdown.render(run))
    return page, text


def _replace(path: Path, text: str) -> None:
    """Write so that a reader finds the old file or the new one, never half of it."""
    fresh = path.with_name(f".{path.name}.new")
    # A lone surrogate, as byte-level text can hold, has no UTF-8 form; it is shown as a question mark.
    fresh.write_text(text, encoding="utf-8", errors="replace")
    os.replace(fresh, path)
