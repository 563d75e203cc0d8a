"""Behaviour on the random walks: how good the walks are that each method teaches, from the same start.

    python -m bench.walks [--seeds 2] [--out bench/walks.md] [METHOD ...]

A network that imitated all walks (score about .35) is taught by each method for the published number of steps. The
score is the mean optimality of sampled walks in [0, 1]; greedy decoding, pair accuracy and Δ log π(chosen) stand
beside it, because accuracy alone says nothing: the collapsed run has the highest.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click

import palate
from palate.worlds import random_walks

WORLD = "world:random_walks"
STARTS = [letter for letter in random_walks.LETTERS if letter != random_walks.LETTERS[random_walks.GOAL]]
SAMPLES = 50
ADAM = {"betas": (0.9, 0.999), "eps": 1e-8, "microbatch_size": 128}
FALLING = {"schedule": "linear", "warmup_steps": 20}
"""The rate of pair methods rises over 20 steps and falls to zero, that of the others stays."""
PAIRS = {"path": f"{WORLD}/pairs", "rows": 2022}


@dataclass(frozen=True)
class Method:
    """One row of the table: an algorithm's settings, its data, and the least score a right implementation reaches."""

    settings: Mapping[str, Any]
    least: float | None = None
    data: Mapping[str, Any] = field(default_factory=lambda: PAIRS)
    rate: float = 3e-4
    steps: int = 300
    batch: int = 64
    fresh: bool = False
    """Taught from a network that has walked nowhere, not from the imitator."""
    decode: float = 0.0
    """ILQL's β when walks are drawn."""


def _dpo(least: float | None, rate: float = 3e-4, **settings: Any) -> Method:
    return Method({"kind": "dpo", **settings}, least, rate=rate)


_RATED = {"path": f"{WORLD}/rated", "rows": 1000}
_ILQL = {"kind": "ilql", "beta": 0.0, "tau": 0.8, "alpha": 0.1}
_PPO = {"kind": "ppo", "num_ppo_epochs": 4, "num_mini_batches": 1, "vf_coef": 1.0}

METHODS: dict[str, Method] = {
    "bc, best 30 %": Method(
        {"kind": "sft"},
        0.75,
        {"path": f"{WORLD}/demonstrations", "rows": 300, "options": {"best": 0.3}},
        1e-3,
        batch=100,
        fresh=True,
    ),
    "ppo, no KL": Method({**_PPO, "kl_coef": 0.0}, 0.95, {"path": f"{WORLD}/prompts", "rows": 128}, 1e-3, 40, 128),
    "ppo, β .1": Method({**_PPO, "kl_coef": 0.1}, 0.90, {"path": f"{WORLD}/prompts", "rows": 128}, 1e-3, 40, 128),
    "dpo β .1, rate 3e-4 (collapses)": _dpo(None, beta=0.1),
    "dpo β .1, rate 3e-5": _dpo(0.60, 3e-5, beta=0.1),
    "dpo β .5": _dpo(None, beta=0.5),
    "cdpo β .1 ε .1": _dpo(None, beta=0.1, label_smoothing=0.1),
    "dpo + nll of chosen (rpo)": _dpo(0.60, beta=0.1, sft_weight=1.0),
    "dpop λ 5": _dpo(None, beta=0.1, dpop_lambda=5.0),
    "dpo per token, β 5": _dpo(0.75, beta=5.0, logp_reduce="mean"),
    "ipo per token, β .5": _dpo(0.75, loss_type="ipo", beta=0.5),
    "ipo summed, β .1": _dpo(None, loss_type="ipo", beta=0.1, logp_reduce="sum"),
    "simpo β 2 γ 1": Method({"kind": "simpo", "beta": 2.0, "gamma": 1.0}, 0.65),
    "orpo λ 1": Method({"kind": "orpo", "beta": 1.0}, 0.70),
    "kto β .1": Method({"kind": "kto", "beta": 0.1}, 0.65),
    "ilql, decoded at β 0": Method(_ILQL, None, _RATED, 1e-3, 600, 128, True, 0.0),
    "ilql, decoded at β 1": Method(_ILQL, None, _RATED, 1e-3, 600, 128, True, 1.0),
    "ilql, decoded at β 4": Method(_ILQL, 0.85, _RATED, 1e-3, 600, 128, True, 4.0),
    "ilql, decoded at β 100": Method(_ILQL, 0.93, _RATED, 1e-3, 600, 128, True, 100.0),
}


@dataclass(frozen=True)
class Walked:
    """What became of one method with one seed."""

    sampled: float
    greedy: float
    invalid: float
    accuracy: float | None
    change: float | None
    seconds: float
    taught: palate.Trained


def imitator(home: Path, seed: int) -> palate.Trained:
    """The start: a network that imitated all walks, good and bad, for 300 steps."""
    every = {"path": f"{WORLD}/demonstrations", "rows": 1000}
    return _offline(home, "bc", Method({"kind": "sft"}, None, every, 1e-3, batch=100, fresh=True), seed)


def teach(home: Path, name: str, seed: int) -> Walked:
    """Run one method and let it walk."""
    method, started = METHODS[name], time.perf_counter()
    plain = name.partition(", decoded")[0]
    slug = "m-" + "".join(letter if letter.isascii() and letter.isalnum() else "-" for letter in plain)
    if method.settings["kind"] == "ppo":
        taught = _online(home, slug, method, seed)
    else:
        taught = _offline(home, slug, method, seed)
    return _walked(taught, seed, time.perf_counter() - started, method.decode)


def imitated(home: Path, seed: int) -> Walked:
    """How the start itself walks."""
    return _walked(imitator(home, seed), seed, 0.0)


def _walked(taught: palate.Trained, seed: int, seconds: float, beta: float = 0.0) -> Walked:
    more = {"beta": beta} if beta else {}
    sampled = [value for k in range(SAMPLES) for value in _walk(taught, seed=1000 * seed + k, **more)]
    greedy = _walk(taught, greedy=True, **more)
    last = taught.metrics[-1]
    return Walked(
        sampled=sum(sampled) / len(sampled),
        greedy=sum(greedy) / len(greedy),
        invalid=sum(value == 0 for value in sampled) / len(sampled),
        accuracy=last.get("rewards/accuracies"),
        change=last.get("logps/chosen_change"),
        seconds=seconds,
        taught=taught,
    )


def _walk(taught: palate.Trained, **how: Any) -> list[float]:
    said = taught.generate(STARTS, max_new_tokens=random_walks.LONGEST, **how)
    return [random_walks.optimality(start, walk) for start, walk in zip(STARTS, said, strict=True)]


def _start(home: Path, method: Method, seed: int) -> str:
    if not method.fresh:
        return imitator(home, seed).folder
    folder = home / f"fresh-{seed}"
    return str(folder if folder.exists() else random_walks.write_model(folder, seed))


def _offline(home: Path, name: str, method: Method, seed: int) -> palate.Trained:
    sizes = {"batch_size": method.batch, "max_steps": method.steps, "learning_rate": method.rate}
    return palate.train(
        _start(home, method, seed),
        data=dict(method.data),
        algorithm=dict(method.settings),
        name=f"{name}-{seed}",
        seed=seed,
        output_dir=str(home),
        logging_steps=50,
        **sizes,
        **ADAM,
        **(FALLING if method.settings["kind"] not in ("sft", "ilql") else {"schedule": "constant"}),
    )


def _online(home: Path, name: str, method: Method, seed: int) -> palate.Trained:
    sizes = {"rollout_batch_size": method.batch, "total_episodes": method.batch * method.steps}
    return palate.train(
        _start(home, method, seed),
        reward=random_walks.score,
        prompts=dict(method.data),
        algorithm=dict(method.settings),
        name=f"{name}-{seed}",
        seed=seed,
        output_dir=str(home),
        max_new_tokens=random_walks.LONGEST,
        learning_rate=method.rate,
        schedule="constant",
        **sizes,
        **ADAM,
    )


@click.command()
@click.argument("methods", nargs=-1)
@click.option("--seeds", default=2, help="How many seeds.")
@click.option("--out", type=click.Path(path_type=Path), help="The page to write.")
def main(methods: tuple[str, ...], seeds: int, out: Path | None) -> None:
    """Teach by every METHOD and print the table."""
    rows: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        for name in methods or METHODS:
            found = [teach(Path(folder), name, seed) for seed in range(1, seeds + 1)]
            rows.append(_row(name, found))
            click.echo(rows[-1])
    if out is not None:
        head = "| method | gate | sampled | greedy | invalid | pair accuracy | Δ log π(chosen), nats |"
        said = f"Seeds 1 to {seeds}; the gates are checked by `tests/gates/test_walks.py`.\n"
        out.write_text("\n".join([f"# {__doc__}", said, head, "|---" * 7 + "|", *rows, ""]), encoding="utf-8")


def _row(name: str, found: list[Walked]) -> str:
    def cell(values: list[float | None], form: str = ".2f") -> str:
        return " / ".join("–" if v is None else format(v, form) for v in values)

    gate = METHODS[name].least
    cells = [
        name,
        "–" if gate is None else f"≥ {gate:.2f}",
        cell([w.sampled for w in found]),
        cell([w.greedy for w in found]),
        cell([w.invalid for w in found]),
        cell([w.accuracy for w in found], ".3f"),
        cell([w.change for w in found], "+.1f"),
    ]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
