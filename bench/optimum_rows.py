"""The rows of bench/optimum.md: every method's settings, its protocol, and where it should end."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

BATCH, EPISODES, PAIRS, STEPS = 256, 40_960, 20_000, 640
"""Answers of a rollout and pairs of a batch; answers and pairs in all; optimiser steps of an offline method."""
Settings = Mapping[str, Any]


@dataclass(frozen=True)
class Row:
    """One method. `algorithm` gives its settings for a β; `bands` the scores that are right in world 1."""

    algorithm: Callable[[float], Settings]
    bands: Mapping[float, tuple[float, float]]
    """β: (least, most) of the trained score in world 1."""
    why: str = ""
    """What is known of where it ends, in a few words."""
    shape: str = "prompts"
    """The world's records it learns from: prompts is online."""
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])
    rows: int = PAIRS
    rate: float = 3e-3
    around: tuple[float, float] | None = None
    """In another world: how far from its own computed fixed point the score may lie, at β .5 and .1."""
    finite: bool = False
    """Whether what it reaches hangs on how well a fixed number of pairs covers π*: then `bands` are world 1's alone."""


def _sides(k: int = 1) -> Settings:
    """Two passes over a rollout, two minibatches each."""
    passes = {"num_iterations": 2, "num_mini_batches": 2}
    return {**passes, "num_generations": k} if k > 1 else passes


def _grpo(**settings: Any) -> Callable[[float], Settings]:
    return lambda beta: {"kind": "grpo", "beta": beta, **_sides(8), **settings}


def _dr(**settings: Any) -> Callable[[float], Settings]:
    return _grpo(scale_rewards="none", loss_type="dr_grpo", **settings)


def _loss(estimator: str) -> dict[str, Any]:
    return {"kl_in": "loss", "kl_estimator": estimator}


def _ppo(beta: float) -> Settings:
    passes = {"num_ppo_epochs": 2, "num_mini_batches": 2}
    return {"kind": "ppo", "kl_coef": beta, "lam": 1.0, "vf_coef": 0.5, "cliprange_value": 1.0, **passes}


def _online_dpo(label: str) -> Callable[[float], Settings]:
    return lambda beta: {"kind": "online_dpo", "beta": beta, "label": label, **_sides(2)}


def _dpo(**settings: Any) -> Callable[[float], Settings]:
    return lambda beta: {"kind": "dpo", "beta": beta, **settings}


def _best(beta: float) -> Settings:
    return {"kind": "best_of_n", "num_generations": best_n(beta), "num_epochs": 8, "num_mini_batches": 20}


def best_n(beta: float) -> int:
    """n in the place of β."""
    return 64 if beta < 0.3 else 4


_HIGH = {0.5: (0.980, 1.0), 0.1: (0.985, 1.0)}
_PAIRS = {"shape": "pairs", "rate": 1e-3, "finite": True}

ROWS: dict[str, Row] = {
    "rloo": Row(
        lambda beta: {"kind": "rloo", "kl_coef": beta, **_sides(4)}, {0.5: (0.985, 1.0), 0.1: (0.990, 1.0)}, "unbiased"
    ),
    "ppo": Row(_ppo, {0.5: (0.980, 1.0), 0.1: (0.990, 1.0)}, "unbiased"),
    "reinforce++": Row(
        lambda beta: {"kind": "reinforce", "kl_coef": beta, **_sides()},
        {0.5: (0.965, 1.0), 0.1: (0.970, 1.0)},
        "unbiased, no baseline",
        rate=1e-3,
    ),
    "grpo, kl in reward": Row(_grpo(), _HIGH, "unbiased: every advantage is 0 at π*"),
    "grpo 1/len, kl in reward": Row(_grpo(loss_type="grpo"), _HIGH, "unbiased, likewise"),
    "dr grpo, kl in reward": Row(_dr(), _HIGH, "unbiased"),
    "dr grpo, k2 loss": Row(
        _dr(**_loss("k2")), {0.5: (0.94, 0.985), 0.1: (0.975, 0.995)}, "KL of later tokens lost", around=(0.038, 0.01)
    ),
    "dr grpo, k3 x ratio loss": Row(
        _dr(**_loss("k3_ratio")), {0.5: (0.94, 0.985), 0.1: (0.975, 0.995)}, "as k2", around=(0.038, 0.01)
    ),
    "dr grpo, k3 loss": Row(
        _dr(**_loss("k3")), {0.5: (0.88, 0.93), 0.1: (0.92, 0.96)}, "KL the other way round", around=(0.033, 0.017)
    ),
    "grpo, k3 loss": Row(
        _grpo(loss_type="grpo", **_loss("k3")),
        {0.5: (0.74, 0.84), 0.1: (0.86, 0.93)},
        "as published: k3, and β over the group's spread",
        around=(0.065, 0.055),
    ),
    "online dpo, sampled labels": Row(
        _online_dpo("sampled"), {0.5: (0.90, 1.0), 0.1: (0.93, 1.0)}, "unbiased, noisy labels", rate=3e-4
    ),
    "online dpo, soft labels": Row(_online_dpo("soft"), {0.5: (0.90, 1.0), 0.1: (0.93, 1.0)}, "unbiased", rate=3e-4),
    "online dpo, argmax labels": Row(
        _online_dpo("argmax"), {0.5: (-1.8, 0.3), 0.1: (0.80, 0.93)}, "one answer alone", rate=3e-4
    ),
    "dpo": Row(_dpo(), {0.5: (0.90, 1.0), 0.1: (0.88, 1.0)}, "unbiased, noisy labels", **_PAIRS),
    "dpo, soft labels": Row(_dpo(), {0.5: (0.98, 1.0), 0.1: (0.93, 1.0)}, "unbiased", options={"soft": True}, **_PAIRS),
    "cdpo .1": Row(_dpo(label_smoothing=0.1), {0.5: (0.89, 0.97), 0.1: (0.88, 0.95)}, "margins shrunk", **_PAIRS),
    "ipo, sum": Row(
        _dpo(loss_type="ipo", logp_reduce="sum"),
        {0.5: (0.38, 0.47), 0.1: (0.70, 0.80)},
        "bounded utility",
        around=(0.043, 0.047),
        **_PAIRS,
    ),
    "ipo, mean": Row(_dpo(loss_type="ipo"), {0.5: (0.82, 0.90), 0.1: (0.88, 0.94)}, "τ over the length", **_PAIRS),
    "kto": Row(
        lambda beta: {"kind": "kto", "beta": beta},
        {0.5: (0.72, 0.82), 0.1: (0.75, 0.84)},
        "not Bradley–Terry",
        shape="labelled",
        rows=2 * PAIRS,
        rate=1e-3,
    ),
    "orpo .1": Row(
        lambda beta: {"kind": "orpo", "beta": 0.1},
        {0.5: (0.42, 0.50), 0.1: (0.24, 0.31)},
        "no reference, no β",
        **_PAIRS,
    ),
    "simpo 2, .5": Row(
        lambda beta: {"kind": "simpo", "beta": 2.0, "gamma": 0.5},
        {0.5: (-0.2, 0.1), 0.1: (0.48, 0.65)},
        "no reference, no β",
        **_PAIRS,
    ),
    "best of n": Row(
        _best, {0.5: (0.82, 0.922), 0.1: (0.934, 0.994)}, "the law of best-of-n", rate=1e-3, around=(0.05, 0.05)
    ),
}
"""By name. Bands of world 1 come from an independent prototype, not from these runs; of others, from `fixed`."""


def stage(row: Row, beta: float, model: Path, world: int, part: float = 1.0) -> dict[str, Any]:
    """The palate stage of a row, or one with a part of its budget."""
    optimiser = {"learning_rate": row.rate, "schedule": "linear", "betas": (0.9, 0.99), "eps": 1e-8}
    optimiser["max_grad_norm"] = 1.0
    common = {
        "model": str(model),
        "algorithm": dict(row.algorithm(beta)),
        "encoding": {"max_length": 5},
        "microbatch_size": BATCH,
        "save_steps": 100_000,
        "logging_steps": 40,
    }
    options = {"world": world, **row.options}
    if row.shape != "prompts":
        source = {"path": f"world:enumerable/{row.shape}", "rows": row.rows, "options": options}
        batch = BATCH * (2 if row.shape == "labelled" else 1)
        sizes = {"batch_size": batch, "max_steps": round(STEPS * part), "num_train_epochs": 100}
        optimiser |= {"warmup_steps": 20, "betas": (0.9, 0.999)}
        known = {"precompute_reference": True} if common["algorithm"]["kind"] == "dpo" else {}
        return {"kind": "train", "name": "o", "data": source, "optimiser": optimiser, **common, **sizes, **known}
    group = int(row.algorithm(beta).get("num_generations", 1))
    alone = row.algorithm(beta)["kind"] == "best_of_n"
    rollout = EPISODES * max(1, group // 16) if alone else BATCH
    source = {"path": "world:enumerable/prompts", "rows": rollout // group, "options": options}
    sizes = {
        "total_episodes": rollout if alone else round(EPISODES * part),
        "rollout_batch_size": rollout,
        "sample_steps": 100_000,
    }
    reward = {"kind": "gold", "world": "enumerable"}
    found = {"kind": "online", "name": "o", "reward": reward, "prompts": source, "sampling": {"max_new_tokens": 4}}
    if alone:
        optimiser["schedule"] = "constant"  # one rollout is one point of the schedule
    return {**found, "optimiser": optimiser, "shaping": {"missing_eos_penalty": None}, **common, **sizes}
