"""TRL beside ours: the same reference, reward, data and budget, scored by the same enumeration.

    python -m venv peers
    peers/bin/pip install torch==2.13.0 trl==1.16.0 transformers==5.23.0 accelerate==1.15.0 datasets==5.2.0 pydantic
    PYTHONPATH=src:. peers/bin/python -m bench.optimum_trl

trl is no part of palate; this runs in an environment of its own. Rows go to bench/optimum.json.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from palate.randomness import key
from palate.records import Ranking
from palate.worlds import enumerable

KEPT = Path("bench/optimum.json")
BATCH, STEPS, PAIRS, PAIR_STEPS, BETA, SEED = 256, 640, 20_000, 640, 0.5, 1
COMMON = {
    "use_cpu": True,
    "bf16": False,
    "report_to": "none",
    "save_strategy": "no",
    "logging_steps": 200,
    "lr_scheduler_type": "linear",
    "max_grad_norm": 1.0,
    "adam_epsilon": 1e-8,
    "gradient_checkpointing": False,
    "seed": SEED,
    "beta": BETA,
    "disable_tqdm": True,
}
ONLINE = {
    **COMMON,
    "learning_rate": 3e-3,
    "adam_beta2": 0.99,
    "per_device_train_batch_size": BATCH // 2,
    "steps_per_generation": 2,
    "num_iterations": 2,
    "max_steps": STEPS,
    "max_completion_length": 4,
}
ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "RLOO": ("rloo", {"num_generations": 4}),
    "Dr. GRPO, its default KL": (
        "dr grpo, k3 x ratio loss",
        {"num_generations": 8, "loss_type": "dr_grpo", "scale_rewards": "none", "use_bias_correction_kl": True},
    ),
    "Dr. GRPO, k3": (
        "dr grpo, k3 loss",
        {"num_generations": 8, "loss_type": "dr_grpo", "scale_rewards": "none", "use_bias_correction_kl": False},
    ),
    "GRPO, k3, mean of each answer": (
        "grpo, k3 loss",
        {"num_generations": 8, "loss_type": "grpo", "scale_rewards": "group", "use_bias_correction_kl": False},
    ),
    "DPO": ("dpo", {}),
}
"""TRL's row → ours with the same objective, and TRL's settings."""


def reward(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
    """The world's reward."""
    return enumerable.score(prompts, completions)


def trainer(name: str, folder: Path, out: str) -> Any:
    """A trainer of TRL on the reference in `folder`."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    given = ROWS[name][1]
    if name == "DPO":
        pairs = [p for p in enumerable.records("pairs", PAIRS, key("data", SEED)) if isinstance(p, Ranking)]
        rows = [{"prompt": p.prompt, "chosen": p.completions[0], "rejected": p.completions[1]} for p in pairs]
        settings = {"learning_rate": 1e-3, "per_device_train_batch_size": BATCH, "max_steps": PAIR_STEPS}
        config = DPOConfig(out, **COMMON, **settings, warmup_steps=20, max_length=5)
        return DPOTrainer(model, args=config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    prompts = Dataset.from_list([{"prompt": enumerable.LETTERS[i % 4]} for i in range(1024)])
    kinds = (RLOOConfig, RLOOTrainer) if name == "RLOO" else (GRPOConfig, GRPOTrainer)
    config = kinds[0](out, **ONLINE, **given)
    return kinds[1](model, reward_funcs=reward, args=config, train_dataset=prompts, processing_class=tokenizer)


def measure(name: str) -> dict[str, float]:
    """Train one row and score it."""
    with tempfile.TemporaryDirectory() as home:
        folder = enumerable.write_reference(Path(home) / "reference", 1)
        teacher = trainer(name, folder, home)
        started = time.process_time(), time.perf_counter()
        teacher.train()
        seconds = time.process_time() - started[0], time.perf_counter() - started[1]
        network = teacher.model.eval()
        found = enumerable.world(1).score_network(lambda ids_RT: network(ids_RT).logits.log_softmax(-1), BETA)
    return {
        "share": round(found.share, 5),
        "kl_from_best": round(found.kl_from_best, 5),
        "cpu_seconds": round(seconds[0], 1),
        "seconds": round(seconds[1], 1),
    }


def keep(name: str, found: dict[str, float]) -> None:
    """Add one measurement to the file, whole or not at all."""
    known = json.loads(KEPT.read_text(encoding="utf-8")) if KEPT.exists() else {}
    fresh = KEPT.with_suffix(".new")
    text = json.dumps({**known, name: found}, indent=1, sort_keys=True, ensure_ascii=False)
    fresh.write_text(text + "\n", encoding="utf-8")
    os.replace(fresh, KEPT)


def main() -> None:
    """Measure the rows that are named, or all."""
    torch.set_num_threads(1)
    for name in sys.argv[1:] or ROWS:
        found = measure(name)
        keep(f"trl | {name} | {ROWS[name][0]}", found)
        print(f"TRL {name}: {found['share']:.4f}  {found['seconds']:.0f} s", flush=True)


if __name__ == "__main__":
    main()
