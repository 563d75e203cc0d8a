"""How much arithmetic a turn takes: what a system is credited with, the same for all of them. Standard library only.

Only matrix products with weights count: 2 for a forward pass, 4 more for a backward pass, per weight and token. The
blocks count for each real token, never for padding; the language-model head only where a token is drawn or scored.
Attention scores are left out (under 3 % at these lengths). Each answer is credited with its own prompt, also where
siblings share it. A system that computes more than this (padding, logits of prompts) gets nothing for it.
"""

from __future__ import annotations

from collections.abc import Mapping

from bench.speed.workloads import Row, Shape

GIGA = 1e9


def forward(shape: Shape, read: float, scored: float) -> float:
    """GFLOP of one forward pass that reads and scores so many tokens."""
    return 2 * (shape.blocks * read + shape.head * scored) / GIGA


def drawing(shape: Shape, rows: float, asked: float, drawn: float) -> float:
    """GFLOP of drawing answers: every token but the last of each row is read once."""
    return forward(shape, asked + drawn - rows, drawn)


def parts(row: Row, counts: Mapping[str, float]) -> dict[str, float]:
    """GFLOP of one turn, by its parts, from the tokens it had: `asked` and `drawn`, or `read` and `scored`."""
    shape = row.shape
    if row.kind == "generate":
        return {"generate": drawing(shape, row.batch, counts["asked"], counts["drawn"])}
    if row.kind in ("ppo", "grpo", "rloo"):
        return _online(row, counts["asked"], counts["drawn"])
    read, scored = counts["read"], counts["scored"]
    passes = {"sft": 3, "orpo": 3, "dpo": 4, "kto": 6, "reward": 3}[row.kind]
    return {"train": passes * forward(shape, read, 0 if row.kind == "reward" else scored)}


def _online(row: Row, asked: float, drawn: float) -> dict[str, float]:
    """Reference, value and reward read each rollout once, where the method has them; then come the updates."""
    shape, read = row.shape, asked + drawn
    speaking, judging = forward(shape, read, drawn), forward(shape, read, 0)
    found = {"generate": drawing(shape, row.batch, asked, drawn)}
    if row.kind == "ppo":
        found["score"] = speaking + 2 * judging
        found["train"] = 3 * row.epochs * (speaking + judging)
    else:
        found["score"] = speaking if row.kind == "rloo" else 0.0
        found["train"] = 3 * row.epochs * speaking
    return found
