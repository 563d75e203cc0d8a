"""A trained reward model as the reward, with the policy's tokenizer or its own."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import PrivateAttr
from torch import Tensor

from palate.batches import Tokens
from palate.cast import Cast, Seat
from palate.cutting import Microbatch, cut
from palate.data import collate
from palate.data.encode import Encoding, TokenRow, encode_rankings
from palate.models.load import Loaded, Loading, load
from palate.models.tokenizer import Tokenizer
from palate.parallel import World
from palate.records import Message, Ranking
from palate.rewards.reward import Answers, Verdict
from palate.rewards.steps import step_ends
from palate.settings import Choice, NotFinite, PalateError


class Reward(Choice):
    """The head of a reward model, read at the last token of prompt and answer (detail 18 of ppo_details.md).

    Where the reward model gives every id the meaning the policy gives it, it reads the sampled ids themselves.
    Where it does not, prompt and answer are encoded anew from their text, for this model only.
    """

    kind: str = "model"
    """A trained reward model."""
    model: str
    """A folder with a reward model, a hub id, or stage:NAME."""
    step_separator: str = ""
    """What stands between the steps of an answer, for a process reward model: each step is then scored at its last
    token, given there and not to the answer as a whole. Empty: one score at the end of the answer."""
    name: str = ""
    """What tables and metrics call it; empty is `model`."""

    loading: Loading = Loading()
    """How its weights come into memory: number format and device."""

    _loaded: Loaded | None = PrivateAttr(None)

    @property
    def label(self) -> str:
        """The given name, or `model`."""
        return self.name or "model"

    def score(self, answers: Answers) -> Verdict:
        """One score per answer. Raises PalateError where the head is untrained or an answer does not fit."""
        loaded = self._open()
        if self.step_separator:
            return self._of_steps(loaded, answers)
        score_B = _scores(loaded, tokens_for(loaded, answers), answers.world)
        broken_B = ~score_B.isfinite()
        if bool(broken_B.any()):
            row = int(broken_B.nonzero()[0])
            raise NotFinite(
                f"reward {self.label}: {self.model} gives {float(score_B[row])} to {answers.name(row)}. Its "
                f"weights have diverged or its precision overflows: train it again, or load it in float32."
            )
        score_B = score_B.to(answers.rollouts.tokens_BT.device)
        return Verdict(score_B, None, {self.label: score_B})

    def _of_steps(self, loaded: Loaded, answers: Answers) -> Verdict:
        """Scores of steps, as per-token rewards at their last tokens; `parts` has their sum."""
        if not reads_ids(loaded, answers):
            raise PalateError(
                f"reward {self.label}: step_separator: {self.model} has another tokenizer than the policy, so its "
                "steps do not end at the policy's tokens. Take a process reward model with the policy's tokenizer."
            )
        read = tokens_for(loaded, answers)
        score_BT = _scores(loaded, read, answers.world, "token_scores")
        rows = answers.rollouts
        here_BT = step_ends(rows, answers.tokenizer, self.step_separator)
        token_BT = score_BT.to(rows.tokens_BT.device).where(here_BT, 0.0)
        if not bool(token_BT.isfinite().all()):
            raise NotFinite(f"reward {self.label}: {self.model} gives numbers that are not finite. Train it again.")
        return Verdict(torch.zeros_like(token_BT[:, 0]), token_BT, {self.label: token_BT.sum(-1)})

    def _open(self) -> Loaded:
        """The model, loaded once."""
        if self._loaded is None:
            self._loaded = load(self.model, "reward", self.loading)
        return self._loaded


def reads_ids(loaded: Loaded, answers: Answers) -> bool:
    """Whether the reward model gives every id the meaning that the policy gives it."""
    mine, theirs = loaded.tokenizer, answers.tokenizer
    return mine.same_words(theirs) and mine.eos == theirs.eos


def tokens_for(loaded: Loaded, answers: Answers) -> Tokens:
    """What the reward model reads: the sampled ids, or texts encoded anew; `action_BT` is True on the answer."""
    rows = answers.rollouts
    if reads_ids(loaded, answers):
        tokens = Tokens(rows.tokens_BT, rows.real_BT, rows.action_BT)
    else:
        tokens = _encoded(loaded.tokenizer, answers)
    longest_B = tokens.real_BT.sum(-1)
    if int(longest_B.max()) > loaded.trunk.context:
        row = int(longest_B.argmax())
        raise PalateError(
            f"reward model: {answers.name(row)} has {int(longest_B[row])} tokens with its answer; the reward model's "
            f"context is {loaded.trunk.context}. Shorten prompts or answers, or take a model with a longer context."
        )
    return tokens.to(loaded.trunk.device)


def _encoded(tokenizer: Tokenizer, answers: Answers) -> Tokens:
    """Prompt and answer by another tokenizer, laid out as its training data were, an EOS after those that ended."""
    finished = answers.rollouts.finished_B.tolist()
    rows: dict[int, TokenRow] = {}
    for ended in (True, False):
        # an answer of which no text is left still needs a token to be read at
        mine = [i for i, done in enumerate(finished) if (done or not answers.completions[i]) == ended]
        if mine:
            records = [_record(answers, i) for i in mine]
            ranked = encode_rankings(records, tokenizer, Encoding(eos=ended)).rows
            rows |= {i: one.rows[0] for i, one in zip(mine, ranked, strict=True)}
    examples = collate.examples([rows[i] for i in range(answers.size)], tokenizer.pad)
    return Tokens(examples.tokens_BT, examples.real_BT, examples.action_BT)


def _record(answers: Answers, row: int) -> Ranking:
    """One answer as data; in a conversation it is the assistant's next turn, closed as the template closes turns."""
    said, completion = answers.said[row], answers.completions[row]
    answer = completion if isinstance(said, str) else (Message("assistant", completion),)
    return Ranking(prompt=said, completions=(answer,), ranks=(0,))


@torch.no_grad()
def _scores(
    loaded: Loaded,
    tokens: Tokens,
    world: World,
    each: Literal["scores", "token_scores"] = "scores",
) -> Tensor:
    """Scores in the order of the rows (B, or B×T for `token_scores`)."""
    cast = Cast({"reward": Seat(loaded.trunk, None, loaded.head)})
    most = Microbatch(tokens=world.first(lambda: cast.budget))
    parts = cut(tokens, most, world)
    if each == "scores":
        said = [cast.scores("reward", part.trimmed()) for part, _ in world.deal(parts)]
    else:
        said = [cast.token_scores("reward", part) for part, _ in world.deal(parts)]
    return world.gather_rows(said, [part.size for part in parts])
