"""A few answers token by token, for people: each token's own numbers, as the update used them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from palate.batches import Chosen, Duels, Experience, Graded, Learnt, Scored
from palate.data.encode import PromptRow
from palate.models.tokenizer import Tokenizer

_OF_SAID_TOKENS = ("sampled_logp", "old_logp", "reference_logp", "kl", "advantage")
"""Numbers that only a token the policy said can have; the place behind an answer has the others alone."""


def table(
    experience: Learnt, scored: Scored, prompts: Sequence[PromptRow], tokenizer: Tokenizer, rows: int = 4
) -> list[dict[str, Any]]:
    """The first answers of a rollout, the same that are samples, one mapping each with its `tokens`.

    Index t is the tensors' own. A token has its id and its text; an answer's token has its numbers too, a mask
    where it is True. What the algorithm did not compute is absent.
    """
    rollouts, found = scored.rollouts, list[dict[str, Any]]()
    if isinstance(experience, Duels | Chosen) or experience.size != rollouts.size:  # its rows are not the rollout's
        return found
    score, parts = _exact(scored.score_B), {name: _exact(part_B) for name, part_B in scored.parts.items()}
    for i in range(min(rows, experience.size)):
        about = {
            "row": i,
            "prompt": prompts[int(rollouts.prompt_B[i])].text,
            "score": score[i],
            "parts": {name: part[i] for name, part in parts.items()},
            "finished": bool(rollouts.finished_B[i]),
            "memory": dict(scored.memory),
        }
        found.append({**about, "tokens": list(_tokens(experience.select(torch.tensor([i])), tokenizer))})
    return found


def _tokens(row: Experience | Graded, tokenizer: Tokenizer) -> Iterator[dict[str, Any]]:
    """The cells of one row that anything is said about: its tokens, and the place behind them if it is learnt from."""
    valued_BT = row.value_mask_BT if isinstance(row, Experience) else torch.zeros_like(row.action_BT)
    real, action, value_mask = (mask[0].tolist() for mask in (row.real_BT, row.action_BT, valued_BT))
    numbers = {name: _exact(x_BT[0]) for name, x_BT in _numbers(row).items()}
    for t in range(len(real)):
        if not (real[t] or value_mask[t]):
            continue
        token: dict[str, Any] = {"t": t}
        if real[t]:
            number = int(row.tokens_BT[0, t])
            token |= {"id": number, "text": piece(tokenizer, number)}
        if action[t] or value_mask[t]:
            masks = {"action_mask": action[t], "value_mask": value_mask[t]}
            token |= {name: True for name, mask in masks.items() if mask}
            token |= {name: x[t] for name, x in numbers.items() if _has(name, x[t], action[t], value_mask[t])}
        yield token


def _numbers(row: Experience | Graded) -> Mapping[str, Tensor]:
    own = {"old_logp": row.logp_BT, "advantage": row.advantage_BT}
    if isinstance(row, Experience):
        own |= {"value": row.value_BT, "return": row.returns_BT}
    return {**own, **row.shown_BT}


def _has(name: str, value: float | bool, action: bool, valued: bool) -> bool:
    if name in ("value", "return"):
        return valued
    return value is not False and (action or name not in _OF_SAID_TOKENS)


def _exact(x_N: Tensor) -> list[Any]:
    """The numbers with as many digits as it takes to give the same number back in their own precision."""
    if x_N.dtype == torch.bool:
        return x_N.tolist()
    wide = x_N if x_N.dtype == torch.float64 else x_N.float()
    return [float(str(x)) for x in wide.cpu().numpy()]


def piece(tokenizer: Tokenizer, token: int) -> str:
    """What one token stands for: its text, a special token's name, or the bytes of a part of a character (`\\xe2`)."""
    spelling = tokenizer.inner.convert_ids_to_tokens(token) if 0 <= token < tokenizer.size else None
    if spelling is None:
        return f"<{token}>"
    text = tokenizer.decode([token], skip_special=False)
    if "\ufffd" in text and all(letter in _BYTE_OF for letter in spelling):
        return bytes(_BYTE_OF[letter] for letter in spelling).decode("utf-8", errors="backslashreplace")
    return spelling.replace("▁", " ") if "▁" in spelling else text or spelling


_PRINTED = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_OTHERS = [byte for byte in range(0x100) if byte not in _PRINTED]
_BYTE_OF = {chr(b): b for b in _PRINTED} | {chr(0x100 + i): b for i, b in enumerate(_OTHERS)}
"""The byte behind each letter in which byte-level vocabularies are spelled: printable bytes are themselves."""
