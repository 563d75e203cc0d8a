"""The workloads: which model, which tokens, whose system, and what ratio is asked for. Standard library only.

Workers of every system import this module in their own environments, so it may not import any of them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

Kind = Literal["ppo", "grpo", "rloo", "sft", "reward", "dpo", "kto", "orpo", "generate"]
Peer = Literal["trl-ppo", "trl", "transformers", "vllm"]
Device = Literal["cpu", "cuda"]
Precision = Literal["float32", "bfloat16"]
ONLINE: tuple[str, ...] = ("ppo", "grpo", "rloo")
PAIRED: tuple[str, ...] = ("reward", "dpo", "orpo")

PAD, EOS = 0, 2
"""Ids of the tokenizers that palate trains: <pad>, <bos>, <eos>."""
CLIP_NORM = 1.0
"""Of Adam (.9, .999, 1e-8) without decay at a constant rate, for everyone. PPO does not clip, as TRL's does not."""
POOL = 512
"""Prompts or rows of a workload; batch n is the next consecutive part of them, for every system the same."""


@dataclass(frozen=True)
class Shape:
    """An architecture with random weights (seed 0)."""

    family: Literal["gpt2", "llama"]
    layers: int
    width: int
    heads: int
    vocabulary: int
    positions: int
    inside: int = 0
    """Width of the gated feed-forward part of a Llama."""

    @property
    def blocks(self) -> int:
        """Weights of all blocks that take part in a matrix product for each token."""
        square = self.width**2
        return self.layers * (12 * square if self.family == "gpt2" else 4 * square + 3 * self.width * self.inside)

    @property
    def head(self) -> int:
        """Weights of the language-model head."""
        return self.vocabulary * self.width


MODELS: Mapping[str, Shape] = {
    "small": Shape("gpt2", 4, 256, 4, 6000, 512),
    "mid": Shape("gpt2", 6, 512, 8, 16000, 512),
    "llama15m": Shape("llama", 6, 288, 6, 32000, 512, 768),
    "gpt2-124m": Shape("gpt2", 12, 768, 12, 50257, 1024),
    "llama-1b": Shape("llama", 16, 2048, 16, 32000, 2048, 5632),
}


@dataclass(frozen=True)
class Row:
    """One line of the table: what is done, on which model, against whom, and the ratio that is asked for."""

    name: str
    title: str
    kind: Kind
    model: str
    peer: Peer
    target: float | None = None
    batch: int = 16
    """Answers of a rollout, or rows (pairs, sequences) of an optimiser step."""
    group: int = 1
    """Answers to one prompt."""
    prompt: tuple[int, int] = (64, 64)
    """Shortest and longest prompt in tokens."""
    answer: tuple[int, int] = (64, 192)
    """Shortest and longest answer of given data; for answers that are drawn, the second is the most there may be."""
    ends: float = 0.0
    """Chance of each drawn token to be the end; 0: answers never end before their full length."""
    epochs: int = 4
    minibatches: int = 4
    layout: Mapping[str, Any] = field(default_factory=lambda: {"kind": "separate"})
    """Which weights palate's roles share. The peer always has full models."""
    agree: Literal["loss", "log_odds_ratio", ""] = ""
    """Which number of both systems has to be the same to 1e-4; nothing where the samples are each one's own."""
    agree_turns: int = 1_000
    """For how many optimiser steps; 1 where the losses differ elsewhere, so that weights part after the first."""
    memory: float | None = None
    """The most memory palate may take, as a share of the peer's."""
    note: str = ""
    device: Device = "cpu"
    precision: Precision = "float32"
    """Of all products; what learns keeps its weights, their gradients and Adam in float32 for everyone."""

    @property
    def shape(self) -> Shape:
        """The model's architecture."""
        return MODELS[self.model]

    @property
    def learning_rate(self) -> float:
        """A rate that moves no answer's length while the rounds go by, where answers are drawn."""
        return 1e-6 if self.kind in ONLINE else 1e-5

    @property
    def same_models(self) -> bool:
        """Whether palate trains the same full models as the peer."""
        return self.layout["kind"] == "separate"


def _ppo(name: str, title: str, target: float | None, **more: Any) -> Row:
    given = {"batch": 64, "prompt": (24, 24), "answer": (53, 53)} | more
    return Row(name, title, "ppo", given.pop("model", "small"), "trl-ppo", target, **given)


def _generate(
    name: str, title: str, model: str, peer: Peer = "transformers", target: float | None = None, **more: Any
) -> Row:
    given = {"batch": 64, "prompt": (32, 32), "answer": (53, 53)} | more
    return Row(name, title, "generate", model, peer, target, **given)


def _grouped(kind: Kind, title: str) -> Row:
    sizes: dict[str, Any] = {"batch": 64, "group": 8, "prompt": (24, 24), "answer": (53, 53)}
    return Row(f"{kind}-small", title, kind, "small", "trl", 3.5, **sizes, epochs=1, minibatches=1)


_RAGGED = "the final norm's bias leans on the end token, so that each drawn token is the end with chance 1/53"
_ODDS = "TRL's loss also fits the prompts, so the odds-ratio term is compared, before the first step"
_MIRROR = "palate gets each batch in reverse, so that both pair a prompt with the same other answer for the KL term"
_LONG: dict[str, Any] = {"batch": 256, "prompt": (128, 128), "answer": (256, 256)}
_EVEN: dict[str, Any] = {"prompt": (128, 128), "answer": (128, 128)}
_WHOLE: dict[str, Any] = {"batch": 64, "prompt": (0, 0), "answer": (128, 256)}
_SHARED = "different model: policy and value on one trunk"
_HYDRA = "different model: policy and value on one trunk, of which the upper half trains"

ROWS: Mapping[str, Row] = {
    row.name: row
    for row in (
        _ppo("ppo-small", "PPO small, no padding, 64 × (24 + 53)", 2.5, memory=0.5),
        _ppo(
            "ppo-small-ragged",
            "PPO small, ragged: prompts 10–200, geometric answers of at most 53",
            3.5,
            prompt=(10, 200),
            ends=1 / 53,
            note=_RAGGED,
        ),
        _ppo("ppo-mid", "PPO mid, 64 × (24 + 24)", 2.3, model="mid", answer=(24, 24), memory=0.5),
        _ppo("ppo-small-shared", "PPO small, shared trunk", 5.0, layout={"kind": "shared"}, note=_SHARED),
        _ppo(
            "ppo-small-hydra",
            "PPO small, hydra",
            8.0,
            layout={"kind": "hydra", "unfrozen_blocks": 2},
            note=_HYDRA,
        ),
        Row("dpo-small", "DPO small, 16 pairs of 128–256", "dpo", "small", "trl", 5.0, agree="loss"),
        Row("dpo-mid", "DPO mid, 16 pairs of 128–256", "dpo", "mid", "trl", 4.0, agree="loss"),
        Row(
            "sft-small",
            "SFT small, 16 × 128–256",
            "sft",
            "small",
            "trl",
            5.0,
            prompt=(0, 0),
            answer=(128, 256),
            agree="loss",
        ),
        Row("reward-small", "reward small, 16 pairs of 128–256", "reward", "small", "trl", 4.0, agree="loss"),
        Row("kto-small", "KTO small, 16 × 128–256", "kto", "small", "trl", 4.0, agree="loss", note=_MIRROR),
        Row(
            "orpo-small",
            "ORPO small, 16 pairs of 128–256",
            "orpo",
            "small",
            "trl",
            4.0,
            agree="log_odds_ratio",
            agree_turns=1,
            note=_ODDS,
        ),
        _grouped("grpo", "GRPO small, 8 × 8, 24 + 53"),
        _grouped("rloo", "RLOO small, 8 × 8, 24 + 53"),
        _generate("generate-small", "generate small, 64 × (32 + 53)", "small", "transformers", 4.0),
        _generate("generate-mid", "generate mid, 64 × (32 + 53)", "mid", "transformers", 3.0),
        _generate("generate-llama15m", "generate llama15m, 64 × (32 + 53)", "llama15m", "transformers", 4.0),
        _generate("generate-llama15m-vllm", "generate llama15m, 64 × (32 + 53)", "llama15m", "vllm", 1.3),
        _generate("generate-gpt2-124m", "generate GPT-2 124M, 64 × (32 + 53)", "gpt2-124m", "transformers", None),
    )
}
"""What `python -m bench.speed` measures, in the order of the table."""

_GPU: dict[str, Any] = {"device": "cuda", "precision": "bfloat16"}
GPU_ROWS: Mapping[str, Row] = {
    row.name: row
    for row in (
        _generate("gpu-generate-gpt2-124m", "generate GPT-2 124M, 256 × (128 + 256)", "gpt2-124m", **_GPU, **_LONG),
        _generate("gpu-generate-llama-1b", "generate Llama 0.9 B, 256 × (128 + 256)", "llama-1b", **_GPU, **_LONG),
        Row("gpu-sft-gpt2-124m", "SFT GPT-2 124M, 64 × 128–256", "sft", "gpt2-124m", "trl", **_GPU, **_WHOLE),
        Row("gpu-sft-llama-1b", "SFT Llama 0.9 B, 64 × 128–256", "sft", "llama-1b", "trl", **_GPU, **_WHOLE),
        _ppo("gpu-ppo-gpt2-124m", "PPO GPT-2 124M, 64 × (128 + 128)", None, model="gpt2-124m", **_GPU, **_EVEN),
    )
}
"""What `python -m bench.speed --gpu` measures: bfloat16 products on one GPU."""
EVERY: Mapping[str, Row] = {**ROWS, **GPU_ROWS}


@dataclass(frozen=True)
class Work:
    """A row as a worker finds it on disk: the row, its model folders, and its data as token ids (and as text).

    `data` holds for drawn answers `prompts` and `texts`; for given ones `sequences`, or `prompts` with `chosen` and
    `rejected`, or `prompts` with `completions` and `labels`.
    """

    row: Row
    policy: str
    value: str
    reward: str
    data: Mapping[str, Any]

    def write(self, path: Path) -> None:
        """As JSON."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> Work:
        """What `write` wrote."""
        given = json.loads(path.read_text(encoding="utf-8"))
        row = Row(**{k: tuple(v) if isinstance(v, list) else v for k, v in given.pop("row").items()})
        return cls(row, **given)

    def batch(self, turn: int) -> range:
        """The rows (or prompts) of turn `turn`, from 0."""
        size = self.row.batch // self.row.group
        start = turn % (POOL // size) * size
        return range(start, start + size)


def given_counts(work: Work, turn: int) -> dict[str, int]:
    """Tokens of one optimiser step on given data: all that are read, and those that are scored."""
    rows, data = work.batch(turn), work.data
    if work.row.kind == "sft":
        lengths = [len(data["sequences"][i]) for i in rows]
        return {"read": sum(lengths), "scored": sum(lengths) - len(lengths)}
    answers: Sequence[str] = ("completions",) if work.row.kind == "kto" else ("chosen", "rejected")
    said = [len(data[name][i]) for i in rows for name in answers]
    asked = [len(data["prompts"][i]) for i in rows for _ in answers]
    return {"read": sum(said) + sum(asked), "scored": sum(said)}
