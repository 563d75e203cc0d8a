"""The example of docs/extending.md runs as it stands."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

from palate.live import Display
from palate.models.make import Make, make
from palate.models.save import Card, save
from palate.run import execute, plan

PAGE = Path(__file__).resolve().parents[2] / "docs" / "extending.md"
PROMPTS = [f"Number {n}:" for n in range(8)]


def test_the_pages_algorithm_trains_a_policy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    algorithm, reward = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    (tmp_path / "my_lab").mkdir()
    (tmp_path / "my_lab" / "reinforce.py").write_text(algorithm)
    (tmp_path / "my_lab" / "taste.py").write_text(reward)
    monkeypatch.syspath_prepend(tmp_path)
    made = make(Make(hidden_size=32, layers=1, heads=2, vocabulary=280, context=48), PROMPTS, 1)
    save(tmp_path / "model", made.trunk, made.tokenizer, Card("tiny", "nothing"))
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in PROMPTS))
    stage = {
        "kind": "online",
        "name": "rlhf",
        "model": str(tmp_path / "model"),
        "reward": {"kind": "function", "function": "my_lab.taste:polite"},
        "prompts": str(tmp_path / "prompts.jsonl"),
        "algorithm": {"kind": "my_lab.reinforce:Algorithm", "kl_coef": 0.1},
        "sampling": {"max_new_tokens": 6},
        "rollout_batch_size": 8,
        "total_episodes": 16,
    }
    done = execute(plan({"name": "mine", "output_dir": str(tmp_path / "runs"), "stages": [stage]}), Display(quiet=True))
    rows = [json.loads(line) for line in (done.folder / "1-rlhf" / "metrics.jsonl").read_text().splitlines()]
    assert [row["episode"] for row in rows] == [8, 16]
    assert rows[0]["objective/kl"] == pytest.approx(0.0, abs=1e-5)
    assert rows[0]["grad_norm"] == pytest.approx(0.0, abs=1e-6)  # nobody says please: all advantages are 0
    for name in [n for n in sys.modules if n.startswith("my_lab")]:
        del sys.modules[name]
