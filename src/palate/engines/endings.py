"""Where an answer ends: at EOS, at a stop token, or with the token that completes a stop text."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from palate.engines.engine import Sampling
from palate.models.tokenizer import Tokenizer
from palate.settings import PalateError


class Endings:
    """What ends answers under some settings. `ids` are the tokens that do; none where answers never stop."""

    def __init__(self, tokenizer: Tokenizer, sampling: Sampling, device: torch.device) -> None:
        """Raises PalateError for a stop token that does not exist and where no answer could end."""
        self.tokenizer, self.texts, self.device = tokenizer, sampling.stop, device
        stops, eos = sampling.stop_token_ids, tokenizer.eos
        unknown = [i for i in stops if not 0 <= i < tokenizer.size]
        if unknown:
            raise PalateError(
                f"sampling.stop_token_ids: there is no token {unknown[0]}; ids run from 0 to {tokenizer.size - 1}."
            )
        if eos is None and not stops and not sampling.fixed_length:
            raise PalateError(
                "sampling: the tokenizer has no EOS, so no answer could end. Name stop_token_ids, set "
                "fixed_length: true, or name one of its tokens as the end with the model's end_token."
            )
        ends = [] if sampling.fixed_length else [*stops, *([] if eos is None else [eos])]
        self.ids = torch.tensor(ends, dtype=torch.long, device=device)
        self.window = max((len(text.encode()) for text in self.texts), default=0)
        """Tokens before the last in which a stop text may begin: every token has at least one byte."""

    def reached(self, tokens_RM: Tensor, row_B: Tensor, count_B: Tensor) -> Tensor:
        """Whether the answers `row_B` of all R end with their newest token, the last of `count_B`.

        Only answers whose newest token may complete a stop text are read as text.
        """
        last_B = tokens_RM[row_B, count_B - 1]
        ended_B = torch.isin(last_B, self.ids)
        if not self.texts:
            return ended_B
        maybe_B = self._completes_V[last_B] & ~ended_B
        for place in maybe_B.nonzero()[:, 0].tolist():
            end = int(count_B[place])
            tail = tokens_RM[row_B[place], max(0, end - self.window - 1) : end]
            said = self.tokenizer.decode(tail.tolist())
            ended_B[place] = any(text in said for text in self.texts)
        return ended_B

    @cached_property
    def _completes_V(self) -> Tensor:
        """The tokens that may bring the last character of a stop text.

        Those that hold it, and those whose own text is not known: parts of characters, and such as are nothing alone.
        A text that ends in white space may be completed by any token, since decoders move and drop spaces.
        """
        last = {text[-1] for text in self.texts}
        if any(letter.isspace() for letter in last):
            return torch.ones(self.tokenizer.size, dtype=torch.bool, device=self.device)
        alone = (self.tokenizer.decode([i]) for i in range(self.tokenizer.size))
        held = [not said or "�" in said or not last.isdisjoint(said) for said in alone]
        return torch.tensor(held, device=self.device)
