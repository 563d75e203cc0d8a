"""`palate check` as a user meets it: real processes, exit codes, one JSON document, nothing written."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

DATA = [{"prompt": f"say {n}:", "completion": f" {n}."} for n in range(8)]
STAGE = {
    "kind": "train",
    "name": "sft",
    "model": {"hidden_size": 16, "layers": 1, "heads": 2, "vocabulary": 300, "context": 48},
    "data": "demonstrations.jsonl",
    "algorithm": {"kind": "sft"},
    "batch_size": 4,
}


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lab")
    (folder / "demonstrations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in DATA))
    (folder / "mine.yaml").write_text(yaml.safe_dump({"name": "mine", "stages": [STAGE]}))
    return folder


def palate(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "palate", *words], cwd=cwd, capture_output=True, text=True)


def test_a_page_for_people(lab: Path) -> None:
    done = palate("check", "mine.yaml", "stages.sft.num_train_epochs=3", cwd=lab)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "3 epochs × 2 = 6 optimiser steps" in done.stdout
    assert "command line" in done.stdout
    assert "<eos>]]" in done.stdout
    assert all(line == line.rstrip() for line in done.stdout.splitlines())
    assert sorted(p.name for p in lab.iterdir()) == ["demonstrations.jsonl", "mine.yaml"]


def test_one_document_for_machines(lab: Path) -> None:
    done = palate("check", "mine.yaml", "--json", "--quick", "stages.sft.batch_size=64", cwd=lab)
    assert done.returncode == 2
    found = json.loads(done.stdout)
    assert found["what"] == "recipe"
    assert found["healthy"] is False
    assert found["stages"][0]["seen"]["faults"] == [
        "sft: 8 rows do not fill one batch of 64. Lower batch_size or bring more data."
    ]
    assert done.stderr == "palate: mine.yaml: 1 fault. Mend what is named and check again.\n"


def test_data_and_errors(lab: Path) -> None:
    assert json.loads(palate("check", "demonstrations.jsonl", "--json", cwd=lab).stdout)["report"]["records"] == 8
    lost = palate("check", "demonstration.jsonl", cwd=lab)
    assert lost.returncode == 2
    assert lost.stderr.startswith("palate: demonstration.jsonl: no such file. Did you mean 'demonstrations.jsonl'?")


@pytest.mark.parametrize("no_color", [False, True])
def test_a_real_terminal(lab: Path, no_color: bool) -> None:
    """Colour where there is some; NO_COLOR is heard."""
    ours, theirs = pty.openpty()
    environment = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "FORCE_COLOR")}
    environment |= {"TERM": "xterm-256color", "COLUMNS": "90"} | ({"NO_COLOR": "1"} if no_color else {})
    command = [sys.executable, "-m", "palate", "check", "mine.yaml", "--quick"]
    with subprocess.Popen(command, cwd=lab, stdout=theirs, stderr=theirs, env=environment):
        os.close(theirs)
        said = b""
        while True:
            try:
                piece = os.read(ours, 65536)
            except OSError:  # the other end is closed: Linux says so with an error
                break
            if not piece:
                break
            said += piece
    os.close(ours)
    assert (b"\x1b[1;32m" in said) != no_color
    assert (b"[[" in said) == no_color


def test_help_loads_no_torch() -> None:
    program = (
        "import sys\nfrom palate.cli import main\n"
        "try:\n    main(['check', '--help'])\nexcept SystemExit:\n    print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "Example:" in done.stdout
    assert done.stdout.endswith("False\n")


def test_the_documented_keys_are_those_of_the_document(lab: Path) -> None:
    page = (Path(__file__).resolve().parents[1] / "docs" / "check.md").read_text(encoding="utf-8")
    found = json.loads(palate("check", "mine.yaml", "--json", "--quick", cwd=lab).stdout)
    stage = found["stages"][0]
    named = [*found, *stage, *(f"seen.{key}" for key in stage["seen"]), *stage["state"]]
    named += [key for one in stage["seen"]["examples"][:1] for key in (*one, *one["counts"], *one["pieces"][0])]
    assert [key for key in named if f"`{key}`" not in page and key != "seen"] == []
