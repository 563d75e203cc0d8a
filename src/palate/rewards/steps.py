"""Where the steps of an answer end: what a process reward model is read at."""

from __future__ import annotations

import torch
from torch import Tensor

from palate.batches import Rollouts
from palate.models.tokenizer import Tokenizer


def step_ends(rollouts: Rollouts, tokenizer: Tokenizer, separator: str) -> Tensor:
    """True (B×T) on the last token of each step; a step is what stands between two separators, and is not empty.

    The token is the last one that begins before the separator does, so that where a step's end and the separator are
    one token, it is that one. The end token belongs to no step.
    """
    ends = torch.zeros(rollouts.tokens_BT.shape, dtype=torch.bool)
    tokens, action = rollouts.tokens_BT.cpu(), rollouts.action_BT.cpu()
    for row in range(rollouts.size):
        places: list[int] = action[row].nonzero()[:, 0].tolist()
        if places and int(tokens[row, places[-1]]) == tokenizer.eos:
            places.pop()
        for t in _ends([int(tokens[row, place]) for place in places], tokenizer, separator):
            ends[row, places[t]] = True
    return ends.to(rollouts.tokens_BT.device)


def _ends(ids: list[int], tokenizer: Tokenizer, separator: str) -> list[int]:
    found: list[int] = []
    first, starts = 0, list[int]()
    for t in range(len(ids)):
        starts.append(len(tokenizer.decode(ids[first:t])))
        text = tokenizer.decode(ids[first : t + 1])
        cut = text.find(separator)
        if cut >= 0 or t + 1 == len(ids):
            said = text[:cut] if cut >= 0 else text
            if said.strip():
                found.append(first + max(i for i, start in enumerate(starts) if start < len(said)))
            first, starts = t + 1, []
    return found
