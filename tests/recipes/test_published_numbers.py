"""The presets say what was published: Ziegler et al. 2019 (launch.py) and Huang et al. 2024, setting by setting."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from palate.run import plan_file

PRESETS = Path(__file__).resolve().parents[2] / "recipes" / "presets"

ADAM = {"betas": [0.9, 0.999], "eps": 1e-5, "warmup_steps": 0, "max_grad_norm": None}
PPO = {
    "num_ppo_epochs": 4,
    "num_mini_batches": 1,
    "cliprange": 0.2,
    "cliprange_value": 0.2,
    "vf_coef": 0.1,
    "gamma": 1.0,
    "lam": 0.95,
    "whiten_advantages": True,
}

BOOKS = {
    "query": 64,
    "temperature": 0.7,
    "length": 24,
    "stop": (".", 16),
    "labels": (4_992, 32, 5e-5, 512),
    "rlhf": (512, 1e-5, 0.15, 6.0, True),
}
NEWS = {"query": 500, "length": 75, "stop": ("\n", 55), "labels": (46_000, 16, 2.5e-5, 256)}
TASKS: dict[str, dict[str, Any]] = {
    "sentiment": BOOKS,
    "descriptiveness": BOOKS,
    "cnndm": {**NEWS, "temperature": 0.5, "rlhf": (32, 2e-6, 0.01, None, False)},
    "tldr": {**NEWS, "temperature": 0.7, "rlhf": (32, 2e-6, 0.03, None, False)},
}


def _stages(preset: str) -> dict[str, Any]:
    resolved = plan_file(PRESETS / f"{preset}.yaml").resolved
    return {stage["name"]: stage for stage in resolved["stages"]}


def _says(settings: Any, expected: dict[str, Any]) -> None:
    assert {name: settings[name] for name in expected} == expected


@pytest.mark.parametrize("task", TASKS)
def test_the_tasks_of_2019(task: str) -> None:
    expected, stages = TASKS[task], _stages(f"lm_human_preferences_{task}")
    reward, rlhf = stages["reward"], stages["rlhf"]
    rows, batch, rate, normalised = expected["labels"]
    assert (reward["data"]["rows"], reward["batch_size"], reward["normalise"]["rows"]) == (rows, batch, normalised)
    assert (reward["model"], reward["algorithm"]["loss_type"], reward["num_train_epochs"]) == ("gpt2", "best_of", 1)
    _says(reward["normalise"], {"before": True, "after": True, "over": "answers", "mean": 0.0, "std": 1.0})
    adam = {**ADAM, "schedule": "linear", "variant": "tensorflow", "weight_decay": 0.0}
    _says(reward["optimiser"], {**adam, "learning_rate": rate})
    batch, rate, kl_coef, target, whiten = expected["rlhf"]
    assert (rlhf["model"], rlhf["total_episodes"], rlhf["rollout_batch_size"]) == ("gpt2", 1_000_000, batch)
    _says(rlhf["optimiser"], {**adam, "learning_rate": rate})
    _says(rlhf["algorithm"], {**PPO, "kl_coef": kl_coef, "target_kl": target, "horizon": 10_000.0})
    _says(rlhf["algorithm"], {"whiten_rewards": whiten, "score_position": "last"})
    _says(rlhf["layout"], {"kind": "shared", "value_init": "zero"})
    _says(rlhf["truncation"], {"token": expected["stop"][0], "after": expected["stop"][1], "train_on_cut": False})
    _says(rlhf["shaping"], {"missing_eos_penalty": -1.0, "missing_eos": "replace"})
    sampling = {"temperature": expected["temperature"], "max_new_tokens": expected["length"], "fixed_length": True}
    for stage in (reward["normalise"], rlhf, stages["evaluate"]):
        _says(stage["sampling"], sampling)
    assert {stage["encoding"]["query_length"] for stage in stages.values()} == {expected["query"]}


def test_the_tldr_work() -> None:
    stages = _stages("tldr")
    sft, reward, rlhf = (stages[name] for name in ("sft", "reward", "rlhf"))
    for stage, schedule in ((sft, "cosine"), (reward, "cosine"), (rlhf, "linear")):
        adam = {**ADAM, "variant": "torch", "weight_decay": 0.01, "learning_rate": 3e-6}
        _says(stage["optimiser"], {**adam, "schedule": schedule})
        _says(stage["encoding"], {"max_prompt_length": 512, "long_prompts": "cut_post"})
    assert (sft["batch_size"], sft["encoding"]["max_length"], sft["encoding"]["loss_on"]) == (128, 562, "all")
    assert (reward["batch_size"], reward["encoding"]["max_length"], reward["data"]["rows"]) == (64, 638, 92_832)
    _says(reward["normalise"], {"before": False, "after": True, "over": "demonstrations", "mean": 0.0, "std": None})
    _says(rlhf["algorithm"], {**PPO, "kl_coef": 0.05, "target_kl": None, "whiten_rewards": False})
    _says(rlhf["algorithm"], {"score_position": "after", "rollout_forward_batch_size": 64})
    assert (rlhf["model"], rlhf["value_model"]) == ("stage:sft", "stage:reward")
    assert (rlhf["total_episodes"], rlhf["rollout_batch_size"], rlhf["microbatch_size"]) == (1_000_000, 512, 16)
    _says(rlhf["sampling"], {"temperature": 0.7, "max_new_tokens": 53, "top_k": 0, "top_p": 1.0})
    _says(rlhf["shaping"], {"missing_eos_penalty": -1.0, "missing_eos": "replace"})
