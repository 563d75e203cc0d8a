"""The presets say what was published, setting by setting: each line of a preset has its source beside it."""

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
    _says(rlhf["algorithm"], {"score_position": "after"})
    assert (rlhf["model"], rlhf["value_model"]) == ("stage:sft", "stage:reward")
    assert (rlhf["total_episodes"], rlhf["rollout_batch_size"], rlhf["microbatch_size"]) == (1_000_000, 512, 16)
    _says(rlhf["sampling"], {"temperature": 0.7, "max_new_tokens": 53, "top_k": 0, "top_p": 1.0})
    _says(rlhf["shaping"], {"missing_eos_penalty": -1.0, "missing_eos": "replace"})


def test_tulu_dpo() -> None:
    """Lambert et al. 2024 (2411.15124) and the command of open-instruct's docs/tulu3.md."""
    (dpo, _) = _stages("tulu_dpo").values()
    _says(dpo["algorithm"], {"kind": "dpo", "loss_type": "sigmoid_norm", "beta": 5.0, "label_smoothing": 0.0})
    _says(dpo["optimiser"], {"learning_rate": 5e-7, "schedule": "linear", "weight_decay": 0.0})
    assert dpo["optimiser"]["warmup_steps"] == 273_000 // 128 // 10
    assert (dpo["batch_size"], dpo["num_train_epochs"], dpo["encoding"]["max_length"]) == (128, 1, 2_048)
    assert dpo["model"] == "allenai/Llama-3.1-Tulu-3-8B-SFT"
    assert dpo["data"]["path"] == "allenai/llama-3.1-tulu-3-8b-preference-mixture"


def test_grpo_r1() -> None:
    """DeepSeek-AI 2025 (2501.12948) with the objective of Shao et al. 2024 (2402.03300), eq. 3 and 4."""
    rlhf = _stages("grpo_r1")["rlhf"]
    _says(rlhf["algorithm"], {"num_generations": 16, "num_iterations": 1, "num_mini_batches": 16, "epsilon": 10.0})
    _says(rlhf["algorithm"], {"beta": 0.001, "kl_in": "loss", "kl_estimator": "k3"})
    _says(rlhf["algorithm"], {"scale_rewards": "group", "loss_type": "grpo", "surrogate": "clip"})
    _says(rlhf["algorithm"], {"ref_model_sync_steps": 400, "ref_model_mixup_alpha": 1.0})
    assert rlhf["optimiser"]["learning_rate"] == 3e-6
    _says(rlhf["sampling"], {"temperature": 1.0, "max_new_tokens": 32_768})
    assert (rlhf["rollout_batch_size"], rlhf["total_episodes"]) == (8_192, 10_400 * 512)
    assert rlhf["rollout_batch_size"] // rlhf["algorithm"]["num_mini_batches"] == 32 * 16


def test_trlx_ppo() -> None:
    """default_ppo_config of trlX, trlx/data/default_configs.py."""
    rlhf = _stages("trlx_ppo")["rlhf"]
    _says(rlhf["algorithm"], {"num_ppo_epochs": 4, "num_mini_batches": 128 // 32, "kl_coef": 0.001, "target_kl": None})
    _says(rlhf["algorithm"], {"horizon": 10_000.0, "gamma": 1.0, "lam": 0.95, "vf_coef": 1.0})
    _says(rlhf["algorithm"], {"cliprange": 0.2, "cliprange_value": 0.2, "scale_scores": "ignored"})
    _says(rlhf["layout"], {"kind": "hydra", "unfrozen_blocks": 2, "value_head": "mlp"})
    adam = {"betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 1e-6, "schedule": "constant", "max_grad_norm": None}
    _says(rlhf["optimiser"], {**adam, "learning_rate": 3e-5})
    _says(rlhf["sampling"], {"max_new_tokens": 40, "top_k": 0, "top_p": 1.0})
    assert (rlhf["rollout_batch_size"], rlhf["shaping"]["score_clip"]) == (128, 10.0)
    steps_of_a_rollout = rlhf["algorithm"]["num_ppo_epochs"] * rlhf["algorithm"]["num_mini_batches"]
    assert rlhf["total_episodes"] // 128 * steps_of_a_rollout == 1_600, "min(100 epochs, 10,000 steps)"


def test_trlx_ilql() -> None:
    """default_ilql_config of trlX, trlx/data/default_configs.py."""
    stages = _stages("trlx_ilql")
    ilql, evaluate = stages["ilql"], stages["evaluate"]
    _says(ilql["algorithm"], {"tau": 0.7, "gamma": 0.99, "cql_scale": 0.1, "awac_scale": 1.0, "alpha": 0.001})
    _says(ilql["algorithm"], {"beta": 0.0, "steps_for_target_q_sync": 5, "two_qs": True})
    adam = {"betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 1e-6, "schedule": "constant", "max_grad_norm": None}
    _says(ilql["optimiser"], {**adam, "learning_rate": 5e-5})
    assert (ilql["model"], ilql["batch_size"], ilql["max_steps"]) == ("gpt2", 128, 1_000)
    assert ilql["encoding"]["max_length"] == 64
    _says(evaluate["sampling"], {"max_new_tokens": 56, "top_k": 20, "temperature": 1.0})
    assert evaluate["steering"]["beta"] == 1.0


def test_coati() -> None:
    """ColossalChat's scripts of April 2023."""
    stages = _stages("coati")
    sft, reward, rlhf = (stages[name] for name in ("sft", "reward", "rlhf"))
    assert (sft["num_train_epochs"], sft["batch_size"], sft["encoding"]["max_length"]) == (3, 4 * 8, 512)
    _says(sft["optimiser"], {"learning_rate": 5e-6, "schedule": "cosine", "warmup_steps": 147})
    assert (reward["num_train_epochs"], reward["batch_size"], reward["encoding"]["max_length"]) == (1, 1, 512)
    _says(reward["optimiser"], {"learning_rate": 5e-6, "schedule": "cosine"})
    assert reward["layout"]["reward_init"] == "coati"
    _says(rlhf["algorithm"], {"num_ppo_epochs": 5, "kl_coef": 0.1, "cliprange": 0.2, "cliprange_value": 0.4})
    _says(rlhf["algorithm"], {"vf_coef": 1.0, "whiten_advantages": False})
    _says(rlhf["pretraining"], {"mode": "convex", "coef": 0.9, "batch_size": 1})
    assert rlhf["optimiser"]["learning_rate"] == 1e-7
    assert (rlhf["total_episodes"], rlhf["rollout_batch_size"]) == (10 * 10 * 8, 10 * 8)
    assert rlhf["rollout_batch_size"] // rlhf["algorithm"]["num_mini_batches"] == 8
    assert rlhf["encoding"]["max_prompt_length"] + rlhf["sampling"]["max_new_tokens"] == 128


def test_instructgpt() -> None:
    """Ouyang et al. 2022 (2203.02155), appendix C, the 1.3B model."""
    stages = _stages("instructgpt")
    sft, start, reward, rlhf = (stages[name] for name in ("sft", "start", "reward", "rlhf"))
    assert (sft["num_train_epochs"], sft["batch_size"], sft["optimiser"]["learning_rate"]) == (16, 32, 9.65e-6)
    assert (start["num_train_epochs"], start["batch_size"], start["optimiser"]["learning_rate"]) == (2, 32, 5e-6)
    assert [part["weight"] for part in start["data"]["mixture"]] == [0.9, 0.1]
    assert (reward["num_train_epochs"], reward["batch_size"], reward["optimiser"]["learning_rate"]) == (1, 64, 9e-6)
    _says(reward["normalise"], {"before": False, "after": True, "over": "demonstrations", "mean": 0.0, "std": None})
    assert {stage["optimiser"]["schedule"] for stage in (sft, start, reward)} == {"cosine"}
    assert {stage["optimiser"]["final_rate"] for stage in (sft, start, reward)} == {0.1}
    assert all(stage["optimiser"]["betas"] == [0.9, 0.95] for stage in (sft, start, reward, rlhf))
    _says(rlhf["algorithm"], {"num_ppo_epochs": 1, "num_mini_batches": 512 // 64, "kl_coef": 0.02, "cliprange": 0.2})
    _says(rlhf["algorithm"], {"gamma": 1.0, "target_kl": None})
    _says(rlhf["pretraining"], {"mode": "add", "coef": 27.8, "batch_size": 8 * 64})
    _says(rlhf["optimiser"], {"learning_rate": 9e-6, "schedule": "constant", "warmup_steps": 10})
    assert (rlhf["ema"], rlhf["total_episodes"], rlhf["rollout_batch_size"]) == (0.992, 256_000, 512)
    assert (rlhf["value_model"], rlhf["model"], rlhf["sampling"]["temperature"]) == ("stage:reward", "stage:start", 1.0)


def test_every_preset_names_its_sources_and_what_is_ours() -> None:
    """A number without a source beside it is said to be ours."""
    for path in sorted(PRESETS.glob("*.yaml")):
        text = path.read_text(encoding="utf-8")
        head = text.partition("name:")[0].lower()
        assert "ours on purpose" in head or "reproduced" in head, path.name
        assert text.count("[") > 10, path.name
