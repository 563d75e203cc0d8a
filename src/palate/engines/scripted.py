"""The scripted engine: answers already written, as rollouts; for tests and for judging texts off-line."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from palate.batches import Rollouts
from palate.engines.engine import answers_per_prompt, lay_out
from palate.engines.publication import Publication
from palate.models.tokenizer import Tokenizer
from palate.settings import PalateError


class ScriptedEngine:
    """Gives the k-th answer it was given to the k-th key, whatever the prompt says.

    It draws each token with probability 1, so `logp_BT` is 0. With `end` every text is finished by EOS;
    without, all count as cut by length.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        answers: Sequence[str | Sequence[int]],
        end: bool = True,
        device: str = "cpu",
    ) -> None:
        """`answers` are texts, or token ids where a test wants to say exactly which (their EOS included)."""
        self.tokenizer, self.device = tokenizer, torch.device(device)
        self._answers = [self._ids(a, end) for a in answers]

    def _ids(self, answer: str | Sequence[int], end: bool) -> list[int]:
        if not isinstance(answer, str):
            return list(answer)
        return [*self.tokenizer.encode(answer), *([self.tokenizer.end] if end else [])]

    def publish(self, publication: Publication) -> None:
        """Its answers are written already: no weights change them."""

    def generate(
        self, prompt_ids: Sequence[Sequence[int]], keys: Sequence[int], version: int = 0, greedy: bool = False
    ) -> Rollouts:
        """The written answers in order; as many keys as answers. `greedy` and the keys change nothing."""
        answers_per_prompt(len(prompt_ids), len(keys))
        if len(keys) != len(self._answers):
            raise PalateError(
                f"scripted engine: it holds {len(self._answers)} answers but {len(keys)} were asked for. "
                f"Give one answer per prompt and sample, in the order of the prompts."
            )
        eos = self.tokenizer.eos
        return lay_out(
            prompt_ids,
            self._answers,
            [[0.0] * len(ids) for ids in self._answers],
            [eos is not None and ids[-1:] == [eos] for ids in self._answers],
            pad=self.tokenizer.pad,
            version=version,
            temperature=1.0,
            device=self.device,
        )
