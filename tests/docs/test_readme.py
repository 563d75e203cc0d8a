"""The README's tour runs as printed (with fewer rows), and its commands exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from palate.cli import main

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_tour_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    (tour,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    for printed, small in (('"rows": 2000', '"rows": 160'), ('"rows": 500', '"rows": 64'), ("=640", "=128")):
        assert printed in tour
        tour = tour.replace(printed, small)
    found: dict[str, object] = {}
    exec(compile(tour, "README.md", "exec"), found)
    assert (tmp_path / "my_model" / "model.safetensors").exists()
    assert len(found["ppo"].metrics) == 2  # type: ignore[attr-defined]
    said = capsys.readouterr().out.strip().splitlines()
    score, kl = map(float, said[-1].split())
    assert -1.0 <= score <= 1.0
    assert abs(kl) < 1.0


def test_every_command_it_names_is_a_verb() -> None:
    listed = CliRunner().invoke(main, ["--help"]).output
    blocks = re.findall(r"```(\w*)\n(.*?)```", README, re.DOTALL)
    shell = "".join(text for language, text in blocks if not language)
    verbs = set(re.findall(r"^palate (\w+)", shell, re.MULTILINE))
    assert len(verbs) >= 5
    for verb in verbs:
        assert re.search(rf"^  {verb} ", listed, re.MULTILINE), verb


@pytest.mark.parametrize("link", sorted(set(re.findall(r"\]\(([^)#]+)\)", README))))
def test_links_lead_somewhere(link: str) -> None:
    assert link.startswith("http") or (ROOT / link).exists()
