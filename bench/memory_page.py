"""What bench/memory.md says besides what was measured: the arithmetic, and how it meets figures given elsewhere."""

from __future__ import annotations

from bench.sizes import (
    FLOAT32,
    GPT2,
    KINDS,
    MIXED,
    SEVEN,
    SEVENTY,
    Held,
    Kind,
    Precision,
    gigabytes,
    held,
    state,
)

_TOP = {GPT2.name: 2, SEVEN.name: 5, SEVENTY.name: 13}
"""Blocks that hydra trains: a sixth of them, as 2 of 12."""

READING = """
State is what exists right after Adam has moved the weights: weights (each storage once), gradients, two moments.
*Counted* adds up the tensors of a real PPO step; *on paper* multiplies parameter counts (`bench/sizes.py`), heads left
out. *Resident* is how far the process grew from before its model to that moment, *after trim* once more when the C
library has given back what it had kept of freed memory, *highest* the top until the end. The fourth role, the reward,
is a model of its own, as an online stage loads it (0.498 GB in every row).

- **Counted and paper** differ by the heads of value and reward: 769 numbers and two scalars each.
- **Resident above counted** is scratch: activations of earlier passes whose pages malloc keeps (what trimming returns),
  and the working memory of matrix products.
- **Adapters** hold two of rank 16 on all linear layers (value and policy); the reference is the bare trunk, so it costs
  nothing. **Hydra** trains the top 2 of 12 blocks; its reference shares the ten below and copies two.
"""

DESIGN = """
## The figures planned with

This library was planned with 4.8 GB for four full models, 1.06 GB for hydra and 0.66 GB for three adapters. The same
arithmetic gives them when less is counted:
"""


def rest() -> list[str]:
    """Everything below the measured table."""
    return [READING.strip("\n"), DESIGN.rstrip("\n"), "", *_design(), "", "## 7 B and 70 B", "", *_large()]


def total(found: Held, precision: Precision) -> int:
    """Bytes of the whole state."""
    return sum(state(found, precision).values())


def _design() -> list[str]:
    tables = FLOAT32.frozen * GPT2.tables
    four = total(held(GPT2, "separate"), FLOAT32)
    hydra = total(held(GPT2, "hydra", top=2), FLOAT32)
    own = total(held(GPT2, "adapters"), FLOAT32)
    sixteen = total(held(GPT2, "adapters", fourth="on the trunk"), FLOAT32)
    thirty_two = total(held(GPT2, "adapters", rank=32, fourth="on the trunk"), FLOAT32)
    return [
        "| | here | planned with | what makes the difference |",
        "|---|---|---|---|",
        f"| four full models | {four / 1e9:.2f} GB | 4.8 GB | without the reward model's embedding tables "
        f"({tables / 1e9:.3f} GB): {(four - tables) / 1e9:.2f} GB |",
        f"| hydra, 2 of 12 | {hydra / 1e9:.2f} GB | 1.06 GB | likewise: {(hydra - tables) / 1e9:.2f} GB |",
        f"| adapters | {own / 1e9:.2f} GB | 0.66 GB | the reward as a third, untrained adapter on the same trunk: "
        f"{sixteen / 1e9:.2f} GB at rank 16, {thirty_two / 1e9:.2f} GB at rank 32 |",
        "",
        "A PPO stage cannot yet seat the reward model on the policy's trunk: it loads a model of its own. That is the",
        "largest part of what adapters and hydra still hold, 0.498 of 1.07 and 1.22 GB.",
    ]


def _large() -> list[str]:
    rows = [
        "On paper, trained weights at 18 bytes (float32 weights, gradient and moments, and a copy in bfloat16), frozen",
        "ones at 2. Hydra trains a sixth of the blocks, adapters have rank 16.",
        "",
        "| layout | 7 B | with the reward on the trunk | 70 B | with the reward on the trunk | planned with |",
        "|---|---|---|---|---|---|",
    ]
    given = {"separate": "280 GB / 2.8 TB", "shared": "–", "adapters": "~16 / ~150 GB", "hydra": "~50 / ~500 GB"}
    for kind in KINDS:
        rows.append(f"| {kind} | {' | '.join(_sizes(kind))} | {given[kind]} |")
    return [*rows, "", "The adapters planned with have the reward on the trunk, the hydra has not.", ""]


def _sizes(kind: Kind) -> list[str]:
    cells: list[str] = []
    for model in (SEVEN, SEVENTY):
        top = _TOP[model.name]
        own = total(held(model, kind, top), MIXED)
        beside = total(held(model, kind, top, fourth="on the trunk"), MIXED)
        cells += [gigabytes(own), "–" if beside == own else gigabytes(beside)]
    return cells
