"""Reference log-probabilities of all rows, computed once before training and kept on disk."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from palate.batches import Tokens
from palate.cast import Cast
from palate.data import collate
from palate.data.encode import RankedRow, TokenRow
from palate.settings import PalateError
from palate.stages._rows import Row
from palate.workspace import Workspace

FILE = "reference_logp.safetensors"
"""The file of a stage's folder that holds them: `logp_N` of all tokens in a row after the other, `length_R` of each."""
_AT_ONCE = 256


def known(rows: Sequence[Row], cast: Cast, role: str, pad: int, here: Workspace) -> list[Row]:
    """The rows with the reference's log-probabilities of their trained tokens, read from disk or computed now.

    Asked before anything was trained, when `role`, the policy, *is* the reference. PalateError for rows that have none.
    """
    flat = [one for row in rows for one in _token_rows(row)]
    path = here.folder / FILE
    lengths = [len(row.tokens) for row in flat]
    logp_N = here.world.first(lambda: _read(path, lengths))
    if logp_N is None:
        logp_N = torch.cat(list(_computed(flat, cast, role, pad)))
        here.world.first(lambda: _write(path, logp_N, lengths))
    each = iter(logp_N.split(lengths))
    return [_with(row, each) for row in rows]


def _token_rows(row: Row) -> list[TokenRow]:
    if isinstance(row, TokenRow | RankedRow):
        raise PalateError("precompute_reference: this algorithm has no reference. Leave the setting out.")
    return row.rows


def _with(row: Row, each: Iterator[Tensor]) -> Row:
    assert not isinstance(row, TokenRow | RankedRow)
    return replace(row, reference=tuple(next(each).tolist() for _ in row.rows))


def _computed(flat: Sequence[TokenRow], cast: Cast, role: str, pad: int) -> Iterator[Tensor]:
    for start in range(0, len(flat), _AT_ONCE):
        part = flat[start : start + _AT_ONCE]
        batch: Tokens = collate.examples(part, pad).to(cast.device)
        with torch.no_grad():
            logp_BT = cast.chunked(batch, lambda rows: cast.logp(role, rows)).cpu()
        yield torch.cat([logp_T[: len(row.tokens)] for row, logp_T in zip(part, logp_BT, strict=True)])


def _read(path: Path, lengths: Sequence[int]) -> Tensor | None:
    """What an earlier start of the same stage left; None where there is nothing, or something of other rows."""
    try:
        found = load_file(path)
    except (OSError, SafetensorError):
        return None
    whole = {"logp_N", "length_R"} <= set(found)
    return found["logp_N"] if whole and found["length_R"].tolist() == list(lengths) else None


def _write(path: Path, logp_N: Tensor, lengths: Sequence[int]) -> None:
    fresh = path.with_name(f".{path.name}")
    save_file({"logp_N": logp_N, "length_R": torch.tensor(lengths)}, fresh)
    os.replace(fresh, path)
