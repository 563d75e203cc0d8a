"""Every method in the tasting room: the same start, the same 12,000 comparisons, three seeds, judged by the truth.

    python -m bench.methods [--seeds 3] [--home runs/methods] [METHOD ...]     go on where it stopped
    python -m bench.methods --table                                             write what there is into docs/methods.md

Each seed has one SFT model and one reward model. Offline methods learn from the comparisons themselves, online ones
from 7,680 answers of their own, scored by the reward model that was made of them. All see the comparisons once. What
the answers are truly worth is only looked at, on 400 prompts that nobody was trained on.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

import click

from palate.live import Display
from palate.run import execute, plan

ROOM = "world:tasting_room"
PAGE = Path("docs/methods.md")
START, END = "<!-- results:start -->", "<!-- results:end -->"
ADAM: dict[str, Any] = {"schedule": "linear", "max_grad_norm": 1.0, "betas": [0.9, 0.98]}
MADE = {
    "architecture": "llama",
    "hidden_size": 96,
    "layers": 2,
    "heads": 4,
    "intermediate_size": 192,
    "vocabulary": 1024,
    "context": 128,
    "rope_theta": 100,
    "initializer_range": 0.08,
}
COMPARISONS = {"path": f"{ROOM}/pairs", "rows": 12000, "options": {"invent": 0.5}}
"""More invented facts than demonstrations have: raters must see what is bad."""


@dataclass(frozen=True)
class Method:
    """One row: the algorithm's settings, the rate, and for offline methods the data where they are not the pairs."""

    algorithm: Mapping[str, Any]
    rate: float
    online: bool = False
    data: Mapping[str, Any] | None = None
    note: str = ""


def _direct(kind: str, rate: float = 3e-4, **settings: Any) -> Method:
    return Method({"kind": kind, **settings}, rate)


def _own(kind: str, rate: float = 3e-4, **settings: Any) -> Method:
    return Method({"kind": kind, **settings}, rate, online=True)


METHODS: dict[str, Method] = {
    "ppo": _own("ppo", num_ppo_epochs=2, num_mini_batches=4, kl_coef=0.08, score_position="after"),
    "rloo": _own("rloo", num_generations=4, num_mini_batches=4, num_iterations=2, kl_coef=0.08),
    "grpo": _own("grpo", num_generations=8, num_mini_batches=4, num_iterations=2, beta=0.08),
    "grpo, as published": _own(
        "grpo",
        num_generations=8,
        num_mini_batches=4,
        num_iterations=2,
        beta=0.08,
        loss_type="grpo",
        kl_in="loss",
        kl_estimator="k3",
    ),
    "dr_grpo": _own(
        "grpo",
        num_generations=8,
        num_mini_batches=4,
        num_iterations=2,
        beta=0.08,
        scale_rewards="none",
        loss_type="dr_grpo",
    ),
    "reinforce++": _own("reinforce", num_mini_batches=4, num_iterations=2, kl_coef=0.08),
    "remax": _own("reinforce", num_mini_batches=4, num_iterations=2, kl_coef=0.08, baseline="greedy"),
    "online_dpo": _own("online_dpo", num_mini_batches=4, num_iterations=2, beta=0.08),
    "best_of_n": _own("best_of_n", num_generations=8, num_epochs=2),
    "dpo": _direct("dpo", beta=0.1),
    "dpo per token": _direct("dpo", beta=5.0, logp_reduce="mean"),
    "dpo + nll": _direct("dpo", beta=0.1, sft_weight=1.0),
    "ipo": _direct("dpo", loss_type="ipo", beta=0.5),
    "simpo": _direct("simpo", beta=2.0, gamma=0.5),
    "cpo": _direct("cpo", beta=0.1),
    "orpo": _direct("orpo", beta=0.5),
    "kto": _direct("kto", beta=0.1),
    "ddpo": Method(
        {"kind": "ddpo", "beta": 0.5},
        3e-5,
        data={"path": f"{ROOM}/corrections", "rows": 12000},
        note="learns from 12,000 corrections instead",
    ),
}


def base(home: Path, seed: int) -> Path:
    """The run with a seed's SFT and reward model."""
    sft = {
        "kind": "train",
        "name": "sft",
        "model": MADE,
        "data": {"path": f"{ROOM}/demonstrations", "rows": 40000},
        "algorithm": {"kind": "sft"},
        "optimiser": {"learning_rate": 4e-3, "weight_decay": 0.01, **ADAM, "schedule": "cosine", "warmup_steps": 30},
        "batch_size": 32,
        "microbatch_size": 32,
        "group_by_length": True,
    }
    sampled = {"max_new_tokens": 48}
    reward = {
        "kind": "train",
        "name": "reward",
        "model": "stage:sft",
        "data": COMPARISONS,
        "algorithm": {"kind": "reward"},
        "optimiser": {"learning_rate": 2e-3, "weight_decay": 0.01, **ADAM, "schedule": "cosine", "warmup_steps": 10},
        "batch_size": 64,
        "microbatch_size": 64,
        "group_by_length": True,
        "normalise": {"before": False, "over": "answers", "model": "stage:sft", "rows": 256, "sampling": sampled},
    }
    return _run(home, f"base-{seed}", seed, [sft, reward])


def teach(home: Path, name: str, seed: int) -> dict[str, float]:
    """Run one method and its evaluation; what the table needs of it."""
    made = base(home, seed)
    sft, reward = (str(made / folder / "model") for folder in ("1-sft", "2-reward"))
    stage = _online(METHODS[name], sft, reward) if METHODS[name].online else _offline(METHODS[name], sft)
    judged = {
        "kind": "evaluate",
        "name": "evaluate",
        "models": {"sft": sft, "taught": "stage:taught"},
        "prompts": {"path": f"{ROOM}/prompts", "rows": 400, "options": {"split": "test"}},
        "rewards": {"gold": {"kind": "gold"}, "proxy": reward},
        "sampling": {"max_new_tokens": 48},
    }
    slug = "".join(letter if letter.isalnum() else "-" for letter in name)
    known = home / f"{slug}-{seed}.json"
    started = time.perf_counter()
    run = _run(home, f"{slug}-{seed}", seed, [stage, judged])
    seconds = time.perf_counter() - started
    found = _numbers(json.loads((run / "2-evaluate" / "evaluation.json").read_text()))
    if not known.exists():
        known.write_text(json.dumps({**found, "seconds": seconds}))
    return json.loads(known.read_text())


def _online(method: Method, sft: str, reward: str) -> dict[str, Any]:
    start = {"value_model": reward} if method.algorithm["kind"] == "ppo" else {}
    return {
        "kind": "online",
        "name": "taught",
        "model": sft,
        **start,
        "reward": reward,
        "prompts": {"path": f"{ROOM}/prompts", "rows": 4000},
        "algorithm": dict(method.algorithm),
        "optimiser": {"learning_rate": method.rate, **ADAM, "betas": [0.9, 0.999]},
        "sampling": {"max_new_tokens": 48},
        "shaping": {"missing_eos_penalty": -2.0},
        "rollout_batch_size": 128,
        "microbatch_size": 32,
        "total_episodes": 7680,
    }


def _offline(method: Method, sft: str) -> dict[str, Any]:
    return {
        "kind": "train",
        "name": "taught",
        "model": sft,
        "data": dict(method.data or COMPARISONS),
        "algorithm": dict(method.algorithm),
        "optimiser": {"learning_rate": method.rate, **ADAM, "warmup_steps": 20},
        "batch_size": 64,
        "microbatch_size": 64,
        "group_by_length": True,
    }


def _run(home: Path, name: str, seed: int, stages: list[dict[str, Any]]) -> Path:
    given = {"name": name, "seed": seed, "output_dir": str(home), "stages": stages}
    execute(plan(given, source="python"), Display(quiet=True), ["python", "-m", "bench.methods"])
    return home / name


def _numbers(page: Mapping[str, Any]) -> dict[str, float]:
    taught, start = page["models"]["taught"], page["models"]["sft"]
    return {
        "gold": taught["scores"]["gold"]["mean"]["estimate"],
        "gold_before": start["scores"]["gold"]["mean"]["estimate"],
        "proxy": taught["scores"]["proxy"]["mean"]["estimate"],
        "win": taught["win_rate"]["gold"]["rate"]["estimate"],
        "kl": taught["kl"]["mean"],
        "covered": taught["world"]["coverage"],
        "invented": taught["world"]["invented"],
        "length": taught["text"]["length_mean"],
    }


def table(home: Path) -> str:
    """The page's table from whatever has been run, best true utility first."""
    found = {name: _found(home, name) for name in METHODS}
    rows = sorted(((n, f) for n, f in found.items() if f), key=lambda row: -mean(o["gold"] for o in row[1]))
    seeds = max(len(f) for _, f in rows)
    before = mean(o["gold_before"] for _, f in rows for o in f)
    lines = [
        f"True utility of the SFT model: {before:.2f}. Mean ± error of {seeds} seeds, `python -m bench.methods`;",
        "time is the median, training and evaluation together, one thread.",
        "",
        "| method | true utility | wins over SFT | reward model | KL, nats | covered | invented | tokens | time, s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, outcomes in rows:
        few = f" ({len(outcomes)} of {seeds} seeds)" if len(outcomes) < seeds else ""
        note = f"; {METHODS[name].note}" if METHODS[name].note else ""
        cells = [
            f"{name}{few}{note}",
            _cell(outcomes, "gold"),
            _cell(outcomes, "win", 100, 0) + " %",
            _cell(outcomes, "proxy"),
            _cell(outcomes, "kl", digits=1),
            _cell(outcomes, "covered"),
            _cell(outcomes, "invented"),
            _cell(outcomes, "length", digits=0),
            f"{median(one['seconds'] for one in outcomes):.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _found(home: Path, name: str) -> list[dict[str, float]]:
    slug = "".join(letter if letter.isalnum() else "-" for letter in name)
    return [json.loads(path.read_text()) for path in sorted(home.glob(f"{slug}-[0-9].json"))]


def _cell(outcomes: list[dict[str, float]], name: str, times: float = 1, digits: int = 2) -> str:
    numbers = [times * one[name] for one in outcomes]
    spread = f" ± {stdev(numbers) / math.sqrt(len(numbers)):.{digits}f}" if len(numbers) > 1 else ""
    return f"{mean(numbers):.{digits}f}{spread}"


@click.command()
@click.argument("methods", nargs=-1)
@click.option("--seeds", default=3, help="How many seeds.")
@click.option("--home", type=click.Path(path_type=Path), default=Path("runs/methods"), help="Where the runs are.")
@click.option("--table", "only_table", is_flag=True, help="Run nothing; write the table into docs/methods.md.")
def main(methods: tuple[str, ...], seeds: int, home: Path, only_table: bool) -> None:
    """Teach by every METHOD with every seed, one after the other, and print the table."""
    if not only_table:
        for seed in range(1, seeds + 1):
            for name in methods or METHODS:
                found = teach(home, name, seed)
                shown = "  ".join(f"{key} {value:.3g}" for key, value in found.items())
                click.echo(f"{name}, seed {seed}: {shown}")
    text = table(home)
    click.echo(text)
    if only_table:
        page = PAGE.read_text(encoding="utf-8")
        before, rest = page.split(START)
        PAGE.write_text(f"{before}{START}\n\n{text}\n\n{END}{rest.split(END)[1]}", encoding="utf-8")


if __name__ == "__main__":
    main()
