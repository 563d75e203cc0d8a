"""TRL's PPO as a worker: `python -m bench.speed.trl_ppo ROW.json` with TRL 1.12 first on PYTHONPATH.

A turn begins where the trainer starts to draw answers and ends behind its last update. It is split by wrapping the
trainer's own functions: the first permutation of an iteration is where its updates begin.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import numpy
import torch
import transformers
import trl
import trl.experimental.ppo.ppo_trainer as inside
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback
from trl.experimental.ppo import PPOConfig, PPOTrainer

from bench.speed import gpu
from bench.speed.protocol import Link
from bench.speed.workloads import EOS, PAD, Work

ENDLESS = 10**6


class Turns(TrainerCallback):
    """One iteration, one turn."""

    def __init__(self, link: Link, work: Work) -> None:
        self.link, self.work = link, work
        self.generate = inside.batch_generation
        self.began = self.drawn = self.updates = 0.0
        self.counts: dict[str, int] = {}
        self.loss: float | None = None
        inside.batch_generation = self.batch_generation
        inside.np = self

    def __getattr__(self, name: str) -> Any:
        """Everything else of numpy, in whose place this object stands inside the trainer's module."""
        return getattr(numpy, name)

    @property
    def random(self) -> Turns:
        """Where the trainer looks for `permutation`."""
        return self

    def permutation(self, size: int) -> Any:
        """numpy's; the first one of an iteration marks the start of its updates."""
        self.updates = self.updates or time.perf_counter()
        return numpy.random.permutation(size)

    def batch_generation(self, model: Any, queries: Any, *given: Any, **named: Any) -> Any:
        """Wait to be asked, then the trainer's own."""
        if not self.link.wait():
            self.link.leave()
        self.began, self.updates = time.perf_counter(), 0.0
        answered = self.generate(model, queries, *given, **named)
        self.drawn = time.perf_counter()
        answers_BT = answered[0][:, queries.shape[1] :]
        whole = torch.full(answers_BT.shape[:1], answers_BT.shape[1])
        ends_BT = answers_BT == EOS
        lengths_B = torch.where(ends_BT.any(-1), ends_BT.long().argmax(-1) + 1, whole) if self.work.row.ends else whole
        self.counts = {"asked": int((queries != PAD).sum()), "drawn": int(lengths_B.sum())}
        return answered

    def on_log(self, *given: Any, logs: dict[str, Any], **named: Any) -> None:
        """Remember the policy loss, which is told just before the end."""
        self.loss = float(logs.get("loss/policy_avg", "nan"))

    def on_step_end(self, *given: Any, **named: Any) -> None:
        """Tell."""
        end = time.perf_counter()
        parts = {
            "generate": self.drawn - self.began,
            "score": self.updates - self.drawn,
            "train": end - self.updates,
        }
        self.link.done(parts=parts, counts=self.counts, loss=self.loss)


def settings(work: Work) -> PPOConfig:
    """No checkpointing, minibatches that are each one step (a batch of the whole rollout does that)."""
    row = work.row
    return PPOConfig(
        output_dir=tempfile.mkdtemp(),
        report_to="none",
        use_cpu=row.device == "cpu",
        save_strategy="no",
        seed=0,
        bf16=row.precision == "bfloat16",
        gradient_checkpointing=False,
        per_device_train_batch_size=row.batch,
        gradient_accumulation_steps=1,
        total_episodes=row.batch * ENDLESS,
        response_length=row.answer[1],
        stop_token="eos" if row.ends else None,
        num_ppo_epochs=row.epochs,
        num_mini_batches=row.minibatches,
        local_rollout_forward_batch_size=row.batch,
        temperature=1.0,
        num_sample_generations=0,
        learning_rate=row.learning_rate,
        disable_tqdm=True,
    )


def main(path: str) -> None:
    """Build the trainer, say so, train until the runner has had enough."""
    link, work = Link(), Work.read(Path(path))
    torch.set_num_threads(2)
    gpu.watch(link, work.row)
    words = AutoTokenizer.from_pretrained(work.policy)
    words.padding_side = "left"
    policy, reference = (AutoModelForCausalLM.from_pretrained(work.policy, dtype=torch.float32) for _ in range(2))
    value, reward = (
        AutoModelForSequenceClassification.from_pretrained(place, dtype=torch.float32)
        for place in (work.value, work.reward)
    )
    prompts = Dataset.from_dict({"input_ids": work.data["prompts"]})
    trainer = PPOTrainer(
        args=settings(work),
        processing_class=words,
        model=policy,
        ref_model=reference,
        reward_model=reward,
        value_model=value,
        train_dataset=prompts,
        eval_dataset=prompts.select(range(8)),
        callbacks=[Turns(link, work)],
    )
    # The trainer shuffles; batches of prompts are to be the same for everyone.
    trainer.dataloader = DataLoader(
        prompts, batch_size=work.row.batch, shuffle=False, collate_fn=trainer.data_collator, drop_last=True
    )
    link.ready(trl=trl.__version__, torch=torch.__version__, transformers=transformers.__version__)
    trainer.train()


if __name__ == "__main__":
    main(sys.argv[1])
