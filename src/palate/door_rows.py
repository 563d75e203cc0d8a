"""What the Python door is given as values, as rows of a file: samples, dialogues, rewards, prompts with metadata."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from palate import ranks
from palate.settings import PalateError

Rows = str | Path | Mapping[str, Any] | Sequence[Any]
"""A file or hub id, the settings of data, or a list of rows."""


def write_rows(rows: Rows, path: Path) -> Any:
    """Rows given as values become a file of the run directory; anything else is left as it is."""
    if isinstance(rows, str | Path):
        return str(rows)
    if isinstance(rows, Mapping):
        return dict(rows)
    lines = [json.dumps(_row(row), ensure_ascii=False) + "\n" for row in rows]
    if not lines:
        raise PalateError(f"{path.stem}: the list is empty. Give at least one row.")
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".{path.name}.{ranks.rank()}")  # every rank writes the same rows
    fresh.write_text("".join(lines), encoding="utf-8")
    os.replace(fresh, path)
    return str(path)


def _row(row: Any) -> Any:
    return row if isinstance(row, Mapping) else {"prompt": row}


def demonstrations(samples: Rows, rewards: Sequence[float] | None = None) -> Rows:
    """trlX's samples as rows: a text, or a dialogue `[prompt, output, prompt, output, …]`; a mapping is one already.

    `rewards`, one number per sample, become each row's `rating`. Raises PalateError naming the sample at fault.
    """
    if isinstance(samples, str | Path | Mapping):
        if rewards is not None:
            raise PalateError("rewards: they go with a list of samples; rows of a file carry their own `rating`.")
        return samples
    if rewards is not None and len(rewards) != len(samples):
        raise PalateError(f"rewards: {len(rewards)} for {len(samples)} samples. Give one number per sample.")
    rows = [_demonstration(number, sample) for number, sample in enumerate(samples)]
    if rewards is None:
        return rows
    return [{**row, "rating": _number(n, r)} for n, (row, r) in enumerate(zip(rows, rewards, strict=True))]


def _demonstration(number: int, sample: Any) -> dict[str, Any]:
    if isinstance(sample, Mapping):
        return dict(cast(Mapping[str, Any], sample))
    if isinstance(sample, str):
        return {"prompt": "", "completion": sample}
    parts = list(cast(Sequence[Any], sample))
    if len(parts) < 2 or len(parts) % 2 or not all(isinstance(part, str) for part in parts):
        raise PalateError(
            f"samples[{number}]: a dialogue is a list of texts [prompt, output, prompt, output, …], an even number of "
            "them. A plain text to learn from is a string."
        )
    if len(parts) == 2:
        return {"prompt": parts[0], "completion": parts[1]}
    roles = ("user", "assistant")
    turns = [{"role": roles[i % 2], "content": part} for i, part in enumerate(parts)]
    return {"prompt": turns[:1], "completion": turns[1:]}


def _number(number: int, reward: Any) -> float:
    value = reward.tolist() if hasattr(reward, "tolist") else reward
    if not isinstance(value, int | float):
        raise PalateError(f"rewards[{number}]: {value!r} is not a number. Give one number per sample.")
    return float(value)


def is_dialogue(samples: Rows) -> bool:
    """Whether some sample has several turns, which are laid out one behind the other, without a chat template."""
    return not isinstance(samples, str | Path | Mapping) and any(
        not isinstance(one, str | Mapping) and len(one) > 2 for one in samples
    )
