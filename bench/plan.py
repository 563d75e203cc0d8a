"""What a PPO step of 7 B on 8 GPUs and of 70 B on 64 costs, by arithmetic: memory, bytes moved, seconds.

    python -m bench.plan                          prints the tables of bench/plan.md
    python -m bench.plan --page bench/plan.md     writes them into the page, between its two marks

Nothing here was measured on a GPU. Every figure follows from sizes (`bench/sizes.py`), a data sheet, and the shares of
its peaks that `Cluster` assumes; `published` applies the same functions to a step that a peer has published.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from bench.sizes import MIXED, SEVEN, SEVENTY, FourthRole, Kind, Model, held, state

HALF, WHOLE = 2, 4
"""Bytes of a number in bfloat16 and in float32."""
MARKS = ("<!-- tables: python -m bench.plan -->\n", "<!-- end of tables -->\n")


@dataclass(frozen=True)
class Cluster:
    """GPUs of one kind. Bandwidths in bytes a second, of one GPU and in one direction."""

    gpus: int
    memory: float = 80e9
    flops: float = 989e12
    """Peak of dense bfloat16 products (H100 SXM)."""
    reads: float = 3.35e12
    inside: float = 450e9
    """Between GPUs of one node of eight."""
    between: float = 50e9
    """Between nodes, 400 Gbit/s for each GPU."""
    busy: float = 0.40
    """Share of the peak that training and scoring reach, over the products really made."""
    read_share: float = 0.60
    """Share of the memory bandwidth that decoding reaches."""
    wire_share: float = 0.75
    """Share of a link's bandwidth that a large collective reaches."""
    hop: float = 15e-6
    """Seconds of one small all-reduce in a group of tensor-parallel GPUs; two for each block and token."""

    def wire(self, ranks: int) -> float:
        """Bytes a second that one GPU gets through in a collective of so many ranks."""
        return self.wire_share * (self.inside if ranks <= 8 else self.between)


@dataclass(frozen=True)
class Work:
    """One iteration: answers to prompts, their lengths in tokens, and passes over them."""

    answers: int = 1024
    prompt: int = 256
    mean: int = 1024
    longest: int = 4096
    passes: int = 1
    scorings: int = 3
    """Forward passes without gradient: reference, value, reward. The sampler's log-probabilities are the old ones."""
    updates: int = 2
    """Models that learn: policy and value."""
    micro: int = 16384
    """Real tokens of a micro-batch on one GPU."""

    @property
    def tokens(self) -> int:
        """Tokens of the whole batch, prompts included."""
        return self.answers * (self.prompt + self.mean)


def activations(model: Model, tokens: int, recompute: bool) -> int:
    """Bytes kept for the backward pass of a gated decoder in bfloat16, attention by a fused kernel.

    Of a token a block keeps: for each of two norms its input in float32 and, in half precision, what it gave before and
    after its weight (8·d); q and the attention's output (4·d), keys and values (4·kv); gate, its activation, up and
    their product (8·f). Recomputing keeps each block's input (2·d) and one block's inside. Logits are not in it.
    """
    inside = 2 * 8 * model.width + 4 * model.width + 4 * model.kv_width + 8 * model.inner + WHOLE * model.heads
    kept = model.layers * HALF * model.width + inside if recompute else model.layers * inside
    return tokens * kept


def logits(model: Model, rows: int = 1024) -> int:
    """Bytes of the vocabulary's rows that are alive at once: logits and their gradient in float32, in row blocks."""
    return 2 * WHOLE * rows * model.vocabulary


def cache(model: Model, tokens: int) -> int:
    """Bytes of keys and values."""
    return HALF * model.cache * tokens


def trainer_shares(model: Model, kind: Kind, ranks: int, fourth: FourthRole = "own") -> tuple[float, float]:
    """Bytes on one GPU that trains, whatever the batch: its shard of the state; gathered weights and logits.

    Gathered are two blocks (one computes, the next is on its way) and the head, in half precision.
    """
    shard = sum(state(held(model, kind, top=top_blocks(model), fourth=fourth), MIXED).values()) / ranks
    return shard, HALF * (2 * model.block + model.width * model.vocabulary) + logits(model)


def top_blocks(model: Model) -> int:
    """Blocks that hydra trains: a sixth of them."""
    return model.layers // 6


def largest_microbatch(
    model: Model, kind: Kind, ranks: int, cluster: Cluster, recompute: bool, kept: float = 0.9
) -> int:
    """Real tokens of the largest micro-batch that fits on a GPU of which `kept` may be filled; 0 where none does."""
    room = kept * cluster.memory - sum(trainer_shares(model, kind, ranks))
    return max(0, int(room // activations(model, 1, recompute)))


def sampler_slots(model: Model, cluster: Cluster, parallel: int, work: Work, kept: float = 0.9) -> int:
    """Answers that one replica of so many GPUs can write at a time, each at its mean length; 0 where none fits.

    `kept` is the share of memory that the sampler may fill.
    """
    room = kept * cluster.memory * parallel - HALF * model.total
    return max(0, int(room // cache(model, work.prompt + work.mean)))


def decode_seconds(model: Model, cluster: Cluster, parallel: int, live: float, context: float) -> float:
    """One token for each of `live` answers: weights and their keys and values are read once, or products dominate."""
    read = HALF * model.multiplied + cache(model, 1) * live * context
    reading = read / (parallel * cluster.reads * cluster.read_share)
    multiplying = 2 * model.multiplied * live / (parallel * cluster.flops * cluster.busy)
    meeting = 2 * model.layers * cluster.hop if parallel > 1 else 0.0
    return max(reading, multiplying) + meeting


def generation_seconds(model: Model, cluster: Cluster, gpus: int, parallel: int, work: Work) -> float:
    """Until the last answer is written. Lengths are geometric with the given mean, cut at the longest.

    While more answers wait than there are slots every slot is busy; then those left finish one after the other, and the
    last few take their time however many GPUs there are.
    """
    here = math.ceil(work.answers / max(1, gpus // parallel))
    slots = min(here, sampler_slots(model, cluster, parallel, work))
    if slots == 0:
        return math.inf
    reading = 2 * model.multiplied * here * work.prompt / (parallel * cluster.flops * cluster.busy)
    full = decode_seconds(model, cluster, parallel, slots, work.prompt + work.mean / 2)
    queue = (here - slots) * work.mean / slots * full
    stop, live, drain = 1 / _geometric(work.mean, work.longest), float(slots), 0.0
    for t in range(work.longest):
        drain += decode_seconds(model, cluster, parallel, max(live, 1.0), work.prompt + t)
        live *= 1 - stop
        if live < 0.5:
            break
    return reading + queue + drain


def _geometric(mean: float, longest: int) -> float:
    """The mean of the uncut distribution whose cut one has the mean asked for; it is cut at `longest`."""
    low, high = mean, 1e3 * longest
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if middle * (1 - (1 - 1 / middle) ** longest) < mean else (low, middle)
    return (low + high) / 2


def scoring_products(kind: Kind, work: Work) -> float:
    """Products a token and weight before the update, two for each whole forward pass.

    Hydra's reference is the top sixth on what the policy's pass left below it.
    """
    return 2 * (work.scorings - (5 / 6 if kind == "hydra" else 0))


def update_products(kind: Kind, work: Work, recompute: bool) -> float:
    """Products a token and weight in one pass of learning.

    A model is gone through forward (2), and backward for inputs (2) and weights (2); recomputing adds a forward (2). A
    frozen base has no gradient of weights. One trunk learns policy and value at once; of hydra's only the top sixth.
    """
    again = 2 if recompute else 0
    return {
        "separate": work.updates * (6 + again),
        "shared": 6 + again,
        "adapters": work.updates * (4 + again),
        "hydra": (6 + again) / 6,
    }[kind]


def wire_bytes(model: Model, kind: Kind, ranks: int, work: Work, micro: int) -> float:
    """Bytes that one GPU receives and sends in the updates of an iteration under zero3.

    For each micro-batch a model's weights are gathered twice in half precision; gradients of what trains are scattered
    once in float32. An adapter's are small enough to leave out.
    """
    models = work.updates if kind in ("separate", "adapters") else 1
    each = {"adapters": 2 * HALF, "hydra": (2 * HALF + WHOLE) / 6}.get(kind, 2 * HALF + WHOLE)
    parts = math.ceil(work.tokens / ranks / micro)
    return models * each * model.total * (ranks - 1) / ranks * parts * work.passes


def learning_seconds(
    model: Model, kind: Kind, cluster: Cluster, ranks: int, work: Work, again: bool
) -> tuple[float, float]:
    """(scoring, update) on so many GPUs, infinite where nothing fits; an update is no faster than its wire."""
    micro = min(work.micro, largest_microbatch(model, kind, ranks, cluster, again))
    if micro == 0:
        return math.inf, math.inf
    each = model.multiplied * work.tokens / (ranks * cluster.flops * cluster.busy)
    products = update_products(kind, work, again) * each * work.passes
    wire = wire_bytes(model, kind, ranks, work, micro) / cluster.wire(ranks)
    return scoring_products(kind, work) * each, max(products, wire)


def published_bytes(model: Model, kind: Kind, rank: int = 16) -> int:
    """What a sampler has to be sent after an update: every weight, the trained blocks, or an adapter."""
    numbers = {"adapters": model.adapter(rank), "hydra": model.top(top_blocks(model))}.get(kind, model.total)
    return HALF * numbers


@dataclass(frozen=True)
class Step:
    """Seconds of the parts of one iteration, on the GPUs that each has."""

    generate: float
    score: float
    update: float
    publish: float
    ahead: bool
    """Whether generation runs one step ahead, on GPUs of its own."""

    @property
    def total(self) -> float:
        """One after the other, or the longer of the two sides."""
        learn = self.score + self.update
        return self.publish + (max(self.generate, learn) if self.ahead else self.generate + learn)


def step(
    model: Model,
    cluster: Cluster,
    work: Work,
    samplers: int,
    parallel: int,
    kind: Kind = "separate",
    again: bool = True,
) -> Step:
    """An iteration with `samplers` GPUs of their own that write one step ahead; 0: all GPUs do both in turn.

    `again`: activations are recomputed.
    """
    ahead = samplers > 0
    writers, learners = (samplers, cluster.gpus - samplers) if ahead else (cluster.gpus, cluster.gpus)
    score, update = learning_seconds(model, kind, cluster, learners, work, again)
    generate = generation_seconds(model, cluster, writers, parallel, work)
    return Step(generate, score, update, published_bytes(model, kind) / cluster.wire(cluster.gpus), ahead)


def best_split(model: Model, cluster: Cluster, work: Work, parallel: int, kind: Kind = "separate") -> int:
    """How many GPUs should write, so that a step one ahead is shortest; replicas are whole."""
    choices = range(parallel, cluster.gpus, parallel)
    return min(choices, key=lambda samplers: step(model, cluster, work, samplers, parallel, kind).total)


EIGHT = replace(SEVEN, name="8 B", vocabulary=128256)
"""Llama 3.1 8B's sizes."""
NEMO = Work(answers=2048, prompt=132, mean=1060, longest=3964, scorings=2, updates=1)
"""NeMo RL's published GRPO step: 1,562 tokens/s·GPU · 97.7 s · 16 GPUs are 1,192 tokens a row, 1,060 of them new."""


def published() -> list[tuple[str, float, float]]:
    """(what, seconds published, seconds by these functions) of a peer's steps."""
    cluster = Cluster(gpus=16)
    together = step(EIGHT, cluster, NEMO, 0, 1)
    apart = step(EIGHT, cluster, NEMO, 8, 1)
    return [
        ("NeMo RL 0.4, Llama 3.1 8B, 16 H100, on policy", 97.7, together.total),
        ("the same, one step off policy", 74.6, apart.total),
    ]


CASES = ((SEVEN, Cluster(8), 1), (SEVENTY, Cluster(64), 4))
"""A model, its cluster, and GPUs of one sampler."""


def main(words: Sequence[str]) -> int:
    """Print the tables, or put them into the page; the exit code."""
    from bench.plan_page import tables

    parser = argparse.ArgumentParser(prog="python -m bench.plan")
    parser.add_argument("--page", type=Path)
    asked = parser.parse_args(words)
    text = tables()
    print(text)
    if asked.page:
        before, _, rest = asked.page.read_text(encoding="utf-8").partition(MARKS[0])
        asked.page.write_text(before + MARKS[0] + text + MARKS[1] + rest.partition(MARKS[1])[2], encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
