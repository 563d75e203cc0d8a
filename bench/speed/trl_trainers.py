"""TRL 1.16's trainers as a worker: `python -m bench.speed.trl_trainers ROW.json` in the peers' environment.

A callback waits for the runner before each optimiser step and reports after it. Data are handed over as token ids, in
their order; where a trainer wants text, its dataset is replaced behind its back once it is built. The clock starts when
a batch is collated already, which spares TRL that time.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import torch
import transformers
import trl
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

from bench.speed import gpu
from bench.speed.protocol import Link
from bench.speed.workloads import CLIP_NORM, EOS, PAD, Work, given_counts

ENDLESS = 10**6


class Turns(TrainerCallback):
    """One optimiser step, one turn."""

    def __init__(self, link: Link, report: Callable[[int], dict[str, Any]]) -> None:
        self.link, self.report = link, report

    def on_step_begin(self, *given: Any, **named: Any) -> None:
        """Wait to be asked."""
        if not self.link.wait():
            self.link.leave()

    def on_step_end(self, *given: Any, **named: Any) -> None:
        """Tell."""
        self.link.done(**self.report(self.link.turn))


def policy(work: Work) -> Any:
    """A fresh copy of the row's policy."""
    return AutoModelForCausalLM.from_pretrained(work.policy, dtype=torch.float32)


def settings(work: Work) -> dict[str, Any]:
    """What all trainers are told: no checkpointing, the data's order, one step per batch; weights are float32."""
    return {
        "output_dir": tempfile.mkdtemp(),
        "report_to": "none",
        "use_cpu": work.row.device == "cpu",
        "save_strategy": "no",
        "per_device_train_batch_size": work.row.batch,
        "gradient_accumulation_steps": 1,
        "max_steps": ENDLESS,
        "learning_rate": work.row.learning_rate,
        "lr_scheduler_type": "constant",
        "max_grad_norm": CLIP_NORM,
        "logging_steps": 1000,
        "disable_tqdm": True,
        "seed": 0,
        "bf16": work.row.precision == "bfloat16",
        "gradient_checkpointing": False,
    }


def sft(work: Work, common: dict[str, Any], words: Any) -> Any:
    """Plain texts, all tokens trained that have one before them: TRL's mean would count the first ones too."""
    said = work.data["sequences"]
    rows = Dataset.from_dict({"input_ids": said, "completion_mask": [[0] + [1] * (len(ids) - 1) for ids in said]})
    asked = trl.SFTConfig(
        max_length=256, packing=False, completion_only_loss=True, train_sampling_strategy="sequential", **common
    )
    return trl.SFTTrainer(model=policy(work), args=asked, train_dataset=rows, processing_class=words)


def joined(work: Work, name: str) -> list[list[int]]:
    """Prompts with the answers of this name."""
    return [[*p, *a] for p, a in zip(work.data["prompts"], work.data[name], strict=True)]


def reward(work: Work, common: dict[str, Any], words: Any) -> Any:
    """Bradley–Terry on pairs."""
    rows = Dataset.from_dict({"chosen_ids": joined(work, "chosen"), "rejected_ids": joined(work, "rejected")})
    asked = trl.RewardConfig(max_length=256, train_sampling_strategy="sequential", **common)
    model = AutoModelForSequenceClassification.from_pretrained(work.reward, dtype=torch.float32)
    return trl.RewardTrainer(model=model, args=asked, train_dataset=rows, processing_class=words)


def texts(work: Work, names: Sequence[str]) -> Dataset:
    """A stand-in of as many rows, from which a trainer may be built."""
    count = len(work.data["prompts"])
    more = {"label": work.data["labels"]} if "labels" in work.data else {}
    return Dataset.from_dict({name: [f" {name} {i}" for i in range(count)] for name in ("prompt", *names)} | more)


def dpo(work: Work, common: dict[str, Any], words: Any) -> Any:
    """Sigmoid loss, β = .1, a reference of its own."""
    asked = trl.DPOConfig(max_length=256, beta=0.1, train_sampling_strategy="sequential", **common)
    made = trl.DPOTrainer(
        model=policy(work),
        ref_model=policy(work),
        args=asked,
        train_dataset=texts(work, ("chosen", "rejected")),
        processing_class=words,
    )
    data = work.data
    made.train_dataset = Dataset.from_dict(
        {"prompt_ids": data["prompts"], "chosen_ids": data["chosen"], "rejected_ids": data["rejected"]}
    )
    return made


def kto(work: Work, common: dict[str, Any], words: Any) -> Any:
    """β = .1, a reference of its own; the KL term reads each prompt with the answer before it in the batch."""
    asked = trl.KTOConfig(max_length=256, beta=0.1, **common)
    made = trl.KTOTrainer(
        model=policy(work),
        ref_model=policy(work),
        args=asked,
        train_dataset=texts(work, ("completion",)),
        processing_class=words,
    )
    said, size = work.data["completions"], work.row.batch
    before = [said[i - 1 if i % size else i + size - 1] for i in range(len(said))]
    made.train_dataset = Dataset.from_dict(
        {
            "prompt_ids": work.data["prompts"],
            "completion_ids": said,
            "KL_completion_ids": before,
            "label": work.data["labels"],
        }
    )
    return made


def orpo(work: Work, common: dict[str, Any], words: Any) -> Any:
    """β = .1."""
    asked = ORPOConfig(max_length=256, beta=0.1, train_sampling_strategy="sequential", **common)
    pairs = texts(work, ("chosen", "rejected"))
    made = ORPOTrainer(model=policy(work), args=asked, train_dataset=pairs, processing_class=words)
    columns: dict[str, Any] = {"prompt_input_ids": work.data["prompts"]}
    columns["prompt_attention_mask"] = [[1] * len(p) for p in work.data["prompts"]]
    for name in ("chosen", "rejected"):
        whole, prompts = joined(work, name), work.data["prompts"]
        columns[f"{name}_input_ids"] = whole
        columns[f"{name}_attention_mask"] = [[1] * len(ids) for ids in whole]
        columns[f"{name}_labels"] = [[-100] * len(p) + ids[len(p) :] for p, ids in zip(prompts, whole, strict=True)]
    made.train_dataset = Dataset.from_dict(columns)
    return made


def grouped(work: Work, common: dict[str, Any], words: Any) -> Any:
    """GRPO or RLOO with TRL's defaults, eight answers a prompt, a reward that takes no time."""
    config, trainer = {"grpo": (trl.GRPOConfig, trl.GRPOTrainer), "rloo": (trl.RLOOConfig, trl.RLOOTrainer)}[
        work.row.kind
    ]
    most = work.row.answer[1]
    asked = config(num_generations=work.row.group, max_completion_length=most, shuffle_dataset=False, **common)
    return trainer(
        model=policy(work),  # its folder is where RLOO reads the reference from
        args=asked,
        train_dataset=Dataset.from_dict({"prompt": work.data["texts"]}),
        processing_class=words,
        reward_funcs=lambda completions, **more: [float(len(set(text))) for text in completions],
    )


MAKERS = {"sft": sft, "reward": reward, "dpo": dpo, "kto": kto, "orpo": orpo, "grpo": grouped, "rloo": grouped}


class Seen:
    """What a trainer said on its way through a step."""

    def __init__(self, trainer: Any, work: Work) -> None:
        self.trainer, self.work = trainer, work
        self.loss = float("nan")
        self.counts: dict[str, int] = {}
        self._compute = trainer.compute_loss
        trainer.compute_loss = self.compute_loss
        if work.row.kind in ("grpo", "rloo"):
            self._generate = trainer._generate_single_turn
            trainer._generate_single_turn = self.generate

    def compute_loss(self, *given: Any, **named: Any) -> Any:
        """The trainer's own, and its value kept."""
        found = self._compute(*given, **named)
        self.loss = float((found[0] if isinstance(found, tuple) else found).detach())
        return found

    def generate(self, prompts: Sequence[Sequence[int]], *given: Any, **named: Any) -> Any:
        """The trainer's own, and its tokens counted."""
        found = self._generate(prompts, *given, **named)
        answers = found[0] if isinstance(found, tuple) else found  # GRPO's come with their log-probabilities
        self.counts = {"asked": sum(map(len, prompts)), "drawn": sum(map(len, answers))}
        return found

    def report(self, turn: int) -> dict[str, Any]:
        """What a turn was."""
        kind = self.work.row.kind
        found: dict[str, Any] = {"loss": self.loss, "counts": self.counts or given_counts(self.work, turn)}
        if kind == "orpo":
            stored = self.trainer._stored_metrics["train"]
            found["log_odds_ratio"] = float(stored["log_odds_ratio"][-1])
        return found


def main(path: str) -> None:
    """Build the trainer, say so, train until the runner has had enough."""
    link, work = Link(), Work.read(Path(path))
    torch.set_num_threads(2)
    gpu.watch(link, work.row)
    words = AutoTokenizer.from_pretrained(work.policy)
    words.padding_side = "left"
    if (words.pad_token_id, words.eos_token_id) != (PAD, EOS):
        raise SystemExit(f"{work.policy}: its tokenizer is not the one that was written there.")
    trainer = MAKERS[work.row.kind](work, settings(work), words)
    seen = Seen(trainer, work)
    trainer.add_callback(Turns(link, seen.report))
    link.ready(trl=trl.__version__, torch=torch.__version__, transformers=transformers.__version__)
    trainer.train()


if __name__ == "__main__":
    main(sys.argv[1])
