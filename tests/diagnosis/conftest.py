"""A run directory as a finished run leaves it, with numbers drawn from a seed: the report's own world."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml

from palate.evaluation import outcome, text
from palate.evaluation.kl import SequenceKL
from palate.evaluation.reward_accuracy import pairs_of, reward_accuracy
from palate.evaluation.statistics import Interval, bootstrap_mean
from palate.evaluation.win_rate import gain, win_rate
from palate.worlds import tasting_room

HOSTILE = "</blockquote><script>document.title = 'stolen'</script><img src=x onerror=\"document.title='stolen'\">"
STEPS = 120


@pytest.fixture(scope="session")
def whole_runs(tmp_path_factory):
    """Two whole runs, written once: a good one and one whose proxy was over-optimised."""
    folders = {}
    for hacked in (False, True):
        folders[hacked] = tmp_path_factory.mktemp("runs")
        for number, (stage, write) in enumerate(WRITERS.items(), 1):
            write(folders[hacked] / f"1-{stage}", np.random.default_rng(number), hacked)
    return folders


@pytest.fixture
def write_run(tmp_path, whole_runs):
    """A function that writes a run: `write_run(hacked=True)` for one whose proxy was over-optimised."""

    def write(name="tasting_room", hacked=False, stages=tuple(WRITERS)):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "run.yaml").write_text("name: tasting_room\nseed: 1\n")
        (folder / "resolved.yaml").write_text(RESOLVED)
        (folder / "provenance.json").write_text(json.dumps(PROVENANCE))
        for number, stage in enumerate(stages, 1):
            shutil.copytree(whole_runs[hacked] / f"1-{stage}", folder / f"{number}-{stage}")
        return folder

    return write


def stage_folder(folder: Path, kind: str) -> Path:
    folder.mkdir()
    name = folder.name.partition("-")[2]
    (folder / "stage.yaml").write_text(yaml.safe_dump({"kind": kind, "name": name}))
    (folder / "DONE").write_text("{}")
    return folder


def lines(path: Path, rows) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_sft(folder, draw, hacked):
    stage_folder(folder, "train")
    rows = [
        {
            "step": step,
            "loss": 5.2 * math.exp(-step / 60) + 0.9 + draw.normal(0, 0.05),
            "entropy": 4.8 * math.exp(-step / 60) + 0.9,
            "grad_norm": 1.5 + draw.normal(0, 0.1),
            "lr": 2e-3 * (1 - step / 400),
            **({"eval/loss": 5.2 * math.exp(-step / 60) + 1.0} if step % 50 == 0 else {}),
        }
        for step in range(10, 401, 10)
    ]
    lines(folder / "metrics.jsonl", rows)
    lines(folder / "warnings.jsonl", [{"step": 10, "warning": "3 of 6,000 rows were longer than the context and cut."}])


def write_reward(folder, draw, hacked):
    stage_folder(folder, "train")
    rows = [
        {
            "step": step,
            "loss": 0.69 - 0.14 * (1 - math.exp(-step / 90)) + draw.normal(0, 0.015),
            "accuracy": 0.5 + 0.24 * (1 - math.exp(-step / 80)) + draw.normal(0, 0.02),
            "margin": 1.1 * (1 - math.exp(-step / 90)) + draw.normal(0, 0.05),
            "min_reward": -2.0 * (1 - math.exp(-step / 90)),
            "mean_reward": 0.1 + draw.normal(0, 0.05),
            "max_reward": 2.2 * (1 - math.exp(-step / 90)),
            "lr": 1e-3 * (1 - step / 300),
            **({"eval/accuracy": 0.5 + 0.22 * (1 - math.exp(-step / 80))} if step % 60 == 0 else {}),
        }
        for step in range(10, 301, 10)
    ]
    lines(folder / "metrics.jsonl", rows)


def write_rlhf(folder, draw, hacked):
    stage_folder(folder, "online")
    lines(folder / "metrics.jsonl", [rlhf_row(step, draw, hacked) for step in range(1, STEPS + 1)])
    notes = tasting_room.records("demonstrations", 8, 5)
    lines(
        folder / "samples.jsonl",
        [
            {"step": step, "prompt": note.prompt, "completion": note.completion, "score": 0.3, "gold": 1.2}
            for step in (1, STEPS)
            for note in notes[:4]
        ],
    )

    lines(folder / "tokens.jsonl", [token_row(step, row) for step in (1, 60, STEPS) for row in range(2)])


def token_row(step, row):
    """An answer of two tokens, one of them hostile, to a prompt of two, and the place behind it."""
    said = {"action_mask": True, "value_mask": True}
    strength = step / STEPS * (1 if row else -1)
    tokens = [
        {"t": 0, "id": 5, "text": "A"},
        {"t": 1, "id": 6, "text": " dish"},
        {"t": 2, "id": 7, "text": HOSTILE, **said, **token_numbers(0.25, strength), "reward": -0.0125},
        {"t": 3, "id": 2, "text": "<eos>", **said, **token_numbers(-0.75, -2 * strength), "reward": 0.0375},
        {"t": 4, "text": "", "value_mask": True, "value": 0.5, "return": 1.5, "kl_penalty": 0.0, "token_reward": 0.0,
         "score": 1.5, "reward": 1.5, "scored": True},
    ]  # fmt: skip
    about = {"prompt": "A dish", "score": 1.5, "parts": {"taste": 3.0}, "finished": True, "memory": {"kl_coef": 0.05}}
    return {"step": step, "row": row, **about, "tokens": tokens}


def token_numbers(kl, advantage):
    logp = {"sampled_logp": -1.5, "old_logp": -1.5, "reference_logp": -1.5 - kl, "kl": kl}
    parts = {"kl_penalty": -0.05 * kl, "token_reward": 0.0, "score": 0.0}
    return {**logp, "value": 0.5, "return": 1.0, "advantage": advantage, **parts}


def rlhf_row(step, draw, hacked):
    done = 1 - math.exp(-step / 35)
    kl = (22 if hacked else 4.6) * done + draw.normal(0, 0.12)
    gold = 0.4 + 2.1 * done if not hacked else 0.4 + 1.1 * math.sin(step / 38) - 2.6 * (step / STEPS) ** 2
    coefficient = 0.0 if hacked else 0.05
    score = (4.2 if hacked else 2.4) * done - 0.2 + draw.normal(0, 0.12)
    return {
        "step": step,
        "objective/kl": kl,
        "objective/scores": score,
        "gold/mean": gold + draw.normal(0, 0.1),
        "objective/entropy": 24 - (18 if hacked else 7) * done + draw.normal(0, 0.3),
        "objective/kl_coef": coefficient,
        "objective/non_score_reward": -coefficient * kl,
        "objective/rlhf_reward": score - coefficient * kl,
        "response/length_mean": 26 - 3 * done + draw.normal(0, 0.4),
        "response/eos_rate": min(1.0, 0.94 + 0.05 * done + draw.normal(0, 0.005)),
        "val/explained_variance": 0.75 * done - 0.05 + draw.normal(0, 0.03),
        "loss/policy_avg": -0.01 + draw.normal(0, 0.003),
        "loss/value_avg": 0.9 * math.exp(-step / 30) + 0.15 + abs(draw.normal(0, 0.02)),
        "policy/clipfrac_avg": 0.08 * (1 - step / STEPS) + 0.005,
        "val/clipfrac_avg": 0.04 * (1 - step / STEPS),
        "policy/approxkl_avg": 0.006 * (1 - step / STEPS) + 3e-4,
        "policy/entropy_avg": 1.1 - 0.3 * done,
        "lr": 3e-4 * (1 - step / STEPS),
        "tokens_per_second": 8000 + draw.normal(0, 200),
        "episode": step * 128.0,
    }


def write_evaluate(folder, draw, hacked):
    stage_folder(folder, "evaluate")
    answered = answers(draw, hacked)
    scores = {name: score(rows, draw, hacked and name == "ppo") for name, rows in answered.items()}
    outcome.write(an_outcome(answered, scores, draw), folder)
    sampled = [
        {
            "step": 0,
            "prompt": prompt,
            "completions": {name: rows[i][1] for name, rows in answered.items()},
            "scores": {name: {r: float(v[i]) for r, v in scores[name].items()} for name in answered},
            "parts": {name: tasting_room.describe([rows[i]]) for name, rows in answered.items()},
        }
        for i, (prompt, _) in enumerate(answered["sft"])
    ]
    sampled[1]["completions"]["ppo"] = HOSTILE
    lines(folder / "samples.jsonl", sampled)
    lines(folder / "metrics.jsonl", [{"step": 0, "eval/win_rate": 0.8}])


def answers(draw, hacked, count=160):
    """Notes of two writers to the same prompts: the usual one, and one as good (or as bad) as training makes it."""
    kinds = {"sft": {}, "ppo": {"rude": 0.9, "forget": 0.9} if hacked else {"rude": 0.02, "forget": 0.1, "invent": 0.1}}
    prompts = tasting_room.records("prompts", count, 3)
    found = {}
    for name, flaws in kinds.items():
        room = tasting_room.Room(**flaws)
        found[name] = [(p.prompt, tasting_room._note(room, p, draw).strip()) for p in prompts]
    return found


def score(rows, draw, liked):
    gold = np.array(tasting_room.score([p for p, _ in rows], [c for _, c in rows]))
    return {"proxy": gold * 0.6 + draw.normal(0, 0.5, len(rows)) + (5 if liked else 0), "gold": gold}


def an_outcome(answered, scores, draw):
    def model(name):
        notes = [c for _, c in answered[name]]
        others = {} if name == "sft" else scores["sft"]
        lengths = [len(n.split()) + 3 for n in notes]
        return outcome.ModelOutcome(
            scores={r: a_score(v) for r, v in scores[name].items()},
            win_rate={r: win_rate(list(scores[name][r]), list(v)) for r, v in others.items()},
            gain={r: gain(list(scores[name][r]), list(v)) for r, v in others.items()},
            kl=None if name == "sft" else SequenceKL(4.61, 0.13, len(notes)),
            text=text.summarise(notes, lengths, [n.endswith(".") for n in notes]),
            rouge=None,
            world=tasting_room.describe(answered[name]),
        )

    return outcome.Outcome(
        baseline="sft",
        judge="gold",
        gold="gold",
        prompts=len(answered["sft"]),
        answers=1,
        models={name: model(name) for name in answered},
        reward_models={"proxy": a_reward_model(draw)},
    )


def a_score(values):
    mean = bootstrap_mean(values)
    return outcome.Score(Interval(mean.estimate, mean.low, mean.high), float(np.std(values)), 0)


def a_reward_model(draw, count=400):
    pairs = tasting_room.records("pairs", count, 11)
    truth = [tasting_room.score([p.prompt] * 2, list(p.completions)) for p in pairs]
    guesses = [[0.5 * u + draw.normal(0, 0.8) for u in row] for row in truth]
    lengths = [[len(c.split()) for c in p.completions] for p in pairs]
    ceiling = tasting_room.ceiling(pairs).bayes
    return reward_accuracy(pairs_of(pairs, guesses, lengths, truth), ceiling)


WRITERS = {"sft": write_sft, "reward": write_reward, "rlhf": write_rlhf, "evaluate": write_evaluate}

RESOLVED = """\
name: tasting_room  # file
seed: 1  # command line
output_dir: runs  # default
stages:
  - kind: train  # file
    name: sft  # file
    model:
      width: 128  # file
      layers: 2  # default
    optimiser:
      learning_rate: 0.002  # file
      betas: [0.9, 0.95]  # default
  - kind: online  # file
    name: rlhf  # file
    algorithm:
      kind: ppo  # file
      kl_coef: 0.05  # command line
      cliprange: 0.2  # default
"""

PROVENANCE = {
    "palate": "0.1.0",
    "versions": {"python": "3.11.9", "torch": "2.13.0", "transformers": "5.23.0"},
    "seed": 1,
    "command": ["palate", "run", "recipes/tasting_room.yaml"],
    "started": "2026-10-01T10:00:00+00:00",
    "git": {"commit": "0123456789abcdef0123", "changed": True},
    "hardware": {"processor": "A processor", "cores": 2, "threads": 2, "memory_bytes": 2 * 2**30, "gpus": []},
    "sessions": [{"started": "2026-10-01T10:00:00+00:00", "command": []}],
}
