"""The pages of docs/reference/ that are read off the code: settings, metrics, formats, losses; by `make docs`."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterable
from pathlib import Path

from palate import manual, metrics
from palate.data.formats import catalogue
from palate.settings import kinds

HERE = Path(__file__).parent / "reference"
LOSSES = Path(__file__).parents[1] / "src" / "palate" / "losses"
FAMILIES = ("policy", "preference", "unpaired", "offline", "comparison", "numeric")
CLASSES = {"stages": "Stage", "algorithms": "Algorithm", "rewards": "Reward"}


def table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    """A Markdown table."""
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def settings_page() -> str:
    """Every setting of every stage, algorithm and reward, with its default and meaning."""
    parts = ["# Settings", "", "Written from the code by `make docs`. An empty default must be given, or is a group."]
    for folder, name in CLASSES.items():
        for kind in kinds(folder):
            rows = [(f"`{e.name}`", f"`{e.default}`" if e.default else "", e.meaning) for e in _own(folder, kind, name)]
            parts += ["", f"## {name.lower()}: {kind}", "", table(("setting", "default", "meaning"), rows)]
    return "\n".join(parts) + "\n"


def _own(folder: str, kind: str, name: str) -> list[manual.Entry]:
    return list(manual.entries(f"{folder}/{kind}", name))


def metrics_page() -> str:
    """Every metric, its unit, its meaning and what it is taken over."""
    rows = [(f"`{m.name}`", m.unit, m.meaning, m.over) for m in metrics.METRICS.values()]
    head = "# Metrics\n\nWritten from the code by `make docs`.\n\n"
    return head + table(("name", "unit", "meaning", "over"), rows) + "\n"


def formats_page() -> str:
    """Every data format, the columns it is known by, and what it means."""
    rows = [(f"`{name}`", f"`{columns}`", meaning) for name, columns, meaning in catalogue()]
    head = (
        "# Data formats\n\nWritten from the code by `make docs`. Told apart by their columns, or named by `format`.\n\n"
    )
    return head + table(("format", "columns", "what it is"), rows) + "\n"


def losses_page() -> str:
    """Every objective with its formula and source, by family; read without importing torch."""
    parts = ["# Losses", "", "Written from the code by `make docs`. All of them are names of `palate.losses`."]
    for family in FAMILIES:
        tree = ast.parse((LOSSES / f"{family}.py").read_text(encoding="utf-8"))
        parts += ["", f"## {family}", "", ast.get_docstring(tree) or ""]
        for node in tree.body:
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
                for argument in node.args.args:
                    argument.annotation = None
                parts += ["", f"### `{node.name}({ast.unparse(node.args)})`", "", ast.get_docstring(node) or ""]
    return "\n".join(parts) + "\n"


PAGES = {
    "settings.md": settings_page,
    "metrics.md": metrics_page,
    "formats.md": formats_page,
    "losses.md": losses_page,
}


def main(check: bool) -> int:
    """Write the pages, or with --check say which are not as the code is."""
    HERE.mkdir(exist_ok=True)
    stale = [name for name, page in PAGES.items() if not _is(HERE / name, page())]
    for name in stale:
        print(f"{'stale' if check else 'written'}: docs/reference/{name}")
        if not check:
            (HERE / name).write_text(PAGES[name](), encoding="utf-8")
    return int(check and bool(stale))


def _is(path: Path, text: str) -> bool:
    return path.exists() and path.read_text(encoding="utf-8") == text


if __name__ == "__main__":
    sys.exit(main("--check" in sys.argv))
