"""`palate rank` as a user meets it: the golden league from a file, its table, its document, its exports, its faults."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

import palate
from palate.cli import main

GOLDEN: dict[str, Any] = json.loads((Path(__file__).parent / "golden" / "losses.json").read_text())["elo_bradley_terry"]
VOTES = "".join(json.dumps({"a": f"p{a}", "b": f"p{b}", "score": s}) + "\n" for a, b, s in GOLDEN["matches_a_b_scoreA"])
RANKED = [
    {"prompt": "A?", "completions": ["x", "y"], "ranks": [0, 1], "players": ["ana", "bob"]},
    {"prompt": "B?", "completions": ["w", "z"], "ranks": [1, 0], "players": ["ana", "bob"]},
    {"prompt": "C?", "completions": ["u", "v"], "ranks": [1, 0], "players": ["ana", "bob"]},
]


def rank(*words: str, columns: int = 100) -> Result:
    return CliRunner(env={"COLUMNS": str(columns)}).invoke(main, ["rank", *words, "--resamples", "50"])


@pytest.fixture
def votes(tmp_path: Path) -> Path:
    path = tmp_path / "votes.jsonl"
    path.write_text(VOTES)
    return path


@pytest.fixture
def ranked(tmp_path: Path) -> Path:
    path = tmp_path / "ranked.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in RANKED))
    return path


def test_the_document_has_the_golden_ratings_in_both_orders(votes: Path) -> None:
    done = rank(str(votes), "--json", "--by", "elo")
    assert done.exit_code == 0, done.stderr
    found = json.loads(done.stdout)
    players = {line["player"]: line for line in found["players"]}
    expected = GOLDEN["expected"]
    columns = {"elo": "final", "elo_reversed": "final_reversed_order", "z": "zscore_reward_population_std"}
    for ours, golden in columns.items():
        assert [players[f"p{i}"][ours] for i in range(4)] == pytest.approx(expected[golden], abs=1e-9)
    assert (found["games"], found["units"], found["by"], found["pseudo_wins"]) == (8, 8, "elo", 0)


def test_the_golden_wins_give_the_golden_scores(tmp_path: Path) -> None:
    wins = GOLDEN["win_matrix"]
    lines = [f"p{i},p{j},a" for i in range(4) for j in range(4) for _ in range(int(wins[i][j]))]
    (tmp_path / "votes.csv").write_text("\n".join(["a,b,winner", *lines]) + "\n")
    for words, golden in (((), "bt_scores"), (("--l2", "0.1"), "bt_l2_0p1")):
        found = json.loads(rank(str(tmp_path / "votes.csv"), "--json", *words).stdout)
        scores = {line["player"]: line["score"] for line in found["players"]}
        assert [scores[f"p{i}"] for i in range(4)] == pytest.approx(GOLDEN["expected"][golden], abs=1e-9)
        if not words:
            assert found["nll"] == pytest.approx(GOLDEN["expected"]["bt_nll"], abs=1e-9)


@pytest.mark.parametrize("columns", [80, 140])
def test_the_table_fits_and_says_what_it_did(votes: Path, columns: int) -> None:
    done = rank(str(votes), columns=columns)
    assert done.exit_code == 0
    lines = done.stdout.splitlines()
    assert max(map(len, lines)) <= columns
    (first,) = [line.split() for line in lines if " p0 " in line]
    assert first[:2] == ["1", "p0"]
    assert first[-5:] == ["4", "0", "1", "1042", "1045"]
    said = " ".join(done.stdout.split())
    assert "95 % interval" in said
    assert "Bradley-Terry by maximum likelihood, 8 games" in said
    assert "Elo depends on the order of the games: reversed, it moves by up to 6 points" in said


def test_an_undefeated_player_is_told(tmp_path: Path) -> None:
    (tmp_path / "votes.csv").write_text("a,b,winner\nana,bob,a\nana,bob,a\n")
    done = rank(str(tmp_path / "votes.csv"))
    assert done.exit_code == 0
    said = " ".join(done.stdout.split())
    assert "with 0.5 pseudo-wins" in said
    assert "ana never lost to the others" in said
    refused = rank(str(tmp_path / "votes.csv"), "--pseudo-wins", "0")
    assert (refused.exit_code, refused.stdout) == (2, "")
    assert "no finite maximum" in refused.stderr


def test_an_export_teaches_a_reward_model(tmp_path: Path) -> None:
    """Votes to ratings to targets to a reward model that puts the players' answers in the order of their ratings."""
    said = {"ana": " yes.", "bob": " no no.", "cy": " perhaps not."}
    games = [("ana", "bob"), ("ana", "cy"), ("bob", "cy"), ("ana", "bob"), ("cy", "bob")]
    rows = [
        {"prompt": f"ask {i}:", "completions": [said[a], said[b]], "ranks": [0, 1], "players": [a, b]}
        for i in range(8)
        for a, b in games
    ]
    votes, targets = tmp_path / "votes.jsonl", tmp_path / "rated.jsonl"
    votes.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert rank(str(votes), "--export", str(targets)).exit_code == 0
    taught = palate.reward(
        {"hidden_size": 32, "layers": 1, "heads": 2, "vocabulary": 300, "context": 64},
        str(targets),
        loss_type="regression",
        output_dir=str(tmp_path / "runs"),
        num_train_epochs=8,
        batch_size=8,
        learning_rate=1e-2,
    )
    assert taught.metrics[-1]["loss"] < 0.1  # targets have variance 1
    assert taught.metrics[0]["loss"] > taught.metrics[-1]["loss"]


def test_an_export_is_read_as_ratings(ranked: Path, tmp_path: Path) -> None:
    target = tmp_path / "rated.jsonl"
    done = rank(str(ranked), "--export", str(target), "--json")
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["players"][0]["player"] == "bob"
    assert "6 answers" in done.stderr
    rows = [json.loads(line) for line in target.read_text().splitlines()]
    assert rows[0] == {"prompt": "A?", "completion": "x", "rating": -1.0, "player": "ana"}
    checked = CliRunner().invoke(main, ["data", "check", str(target)])
    assert "6 Rated" in checked.stdout
    again = rank(str(ranked), "--export", str(target))
    assert again.exit_code == 2
    assert "there is already a file of that name" in again.stderr


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["missing.jsonl"], "no such file"),
        (["someone/votes"], "no such file or folder"),
        (["VOTES", "--players", "p0, p1, p2, p33"], "'p3' is not among the players. Did you mean"),
        (["VOTES", "--export", "rated.csv"], "Name it rated.jsonl."),
        (["VOTES", "--export", "nowhere/rated.jsonl"], "there is no folder nowhere"),
        (["VOTES", "--export", "rated.jsonl"], "these games come without texts"),
        (["VOTES", "--k", "nan"], "k"),
        (["VOTES", "--k", "0"], "0.0 is not in the range"),
        (["VOTES", "--l2", "inf"], "l2"),
        (["VOTES", "--start", "nan"], "start"),
        (["VOTES", "--level", "1"], "1.0 is not in the range"),
        (["VOTES", "--by", "glicko"], "glicko"),
        (["VOTES", "--resample", "3"], "resample"),
        ([], "FILE"),
    ],
)
def test_a_fault_is_one_message_and_exit_code_2(
    words: list[str], told: str, votes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(votes.parent)
    done = rank(*(votes.name if word == "VOTES" else word for word in words))
    assert done.exit_code == 2, done.output
    assert done.stdout == ""
    assert told in done.stderr
    assert "Traceback" not in done.stderr
    assert not (votes.parent / "rated.jsonl").exists()


def test_neither_help_nor_ranking_imports_torch(votes: Path) -> None:
    code = (
        "import sys; from palate.cli import main\n"
        "main(['rank', *sys.argv[1:]], standalone_mode=False)\n"
        "assert 'torch' not in sys.modules and 'datasets' not in sys.modules"
    )
    for words in (["--help"], [str(votes)]):
        done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        assert "Bradley-Terry" in done.stdout


def test_the_page_runs_as_printed() -> None:
    page = (Path(__file__).parents[1] / "docs" / "rank.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    found: dict[str, Any] = {}
    exec(compile(code, "docs/rank.md", "exec"), found)
    assert found["scores"].argmax() == 0
    words = set(re.findall(r"--[a-z][a-z-]+", page))
    told = CliRunner().invoke(main, ["rank", "--help"]).output
    assert {word for word in words if word not in told} == set()
