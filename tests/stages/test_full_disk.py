"""A disk that really is full, a small one made for the purpose: one message, nothing torn, and the same command goes on
to the very same model once there is room.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from hashlib import sha256
from pathlib import Path

import pytest
import yaml

from palate.models import linear

IN_A_SMALL_DISK = """
mount -t tmpfs -o size=$1 none "$2" || exit 99
disk=$2
shift 2
"$@"
code=$?
(cd "$disk" && find . -type f -exec sha256sum {} +)
mount -o remount,size=64m "$disk"
"$@" >/dev/null 2>&1
echo "codes $code $?"
(cd "$disk" && sha256sum runs/full/1-sft/model/model.safetensors)
"""
"""Mount, run, list what is there, make room, run again. Mounts of this shell end with it."""


def _may_mount() -> bool:
    try:
        words = ["unshare", "-rm", "sh", "-c", "mount -t tmpfs none /mnt"]
        return subprocess.run(words, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        return False


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recipe")
    rows = [{"prompt": f"Number {n}:", "completion": " yes"} for n in range(16)]
    (folder / "demos.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = {"architecture": "llama", "hidden_size": 32, "layers": 1, "heads": 2, "vocabulary": 280, "context": 32}
    stage = {"kind": "train", "name": "sft", "model": model, "data": str(folder / "demos.jsonl")}
    stage |= {"algorithm": {"kind": "sft"}, "batch_size": 4, "save_steps": 1}
    path = folder / "full.yaml"
    one = linear.backend()  # processes that measured for themselves might choose, and round, differently
    path.write_text(yaml.safe_dump({"name": "full", "linear": one, "stages": [stage]}))
    return path


def _command(recipe: Path, *words: str) -> list[str]:
    return [sys.executable, "-m", "palate", "run", str(recipe), *words]


@pytest.fixture(scope="module")
def undisturbed(recipe: Path) -> str:
    """The digest of the model of a run that had room."""
    home = recipe.parent / "runs"
    subprocess.run(_command(recipe, f"output_dir={home}"), capture_output=True, check=True)
    return sha256((home / "full" / "1-sft" / "model" / "model.safetensors").read_bytes()).hexdigest()


@pytest.mark.slow
@pytest.mark.skipif(not _may_mount(), reason="this system lets no user mount a disk of his own")
@pytest.mark.parametrize(
    ("size", "words", "message"),
    [
        ("700k", (), r"checkpoint of step 3 .*: the disk is full\. The checkpoint of step 2 is untouched\. Make room"),
        ("84k", ("stages.0.save_steps=9",), r"1-sft/model: the disk is full\. .* Make room and run the same command"),
    ],
    ids=["in a checkpoint", "in the model"],
)
def test_a_full_disk(
    recipe: Path, undisturbed: str, tmp_path: Path, size: str, words: tuple[str, ...], message: str
) -> None:
    inner = _command(recipe, f"output_dir={tmp_path / 'runs'}", *words)
    outer = ["unshare", "-rm", "sh", "-c", IN_A_SMALL_DISK, "sh", size, str(tmp_path), *inner]
    done = subprocess.run(outer, capture_output=True, text=True, check=False)
    assert "codes 2 0" in done.stdout, done.stdout + done.stderr
    assert re.search(message, done.stderr)
    assert "Traceback" not in done.stderr
    before, _, after = done.stdout.partition("codes")
    assert not re.search(r"1-sft/(DONE|model/)", before), "nothing that looks finished"
    assert undisturbed in after, "and then the same model as without the interruption"
