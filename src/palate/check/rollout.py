"""One micro-batch of an online stage for real: answers written, scored and prepared, each part timed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from palate.algorithms import protocol
from palate.batches import Duels, Experience, Learnt, Rollouts
from palate.cast import Cast
from palate.check import clock, examples, judges, memory
from palate.check.found import Counts, Example
from palate.data.encode import PromptRow
from palate.models.load import Loaded
from palate.models.tokenizer import Tokenizer
from palate.randomness import key
from palate.records import Record
from palate.rewards.reward import answers_of
from palate.rewards.shaping import cut_after
from palate.stages import _greedy, _seats
from palate.stages._judging import Judging
from palate.stages.online import Stage
from palate.workspace import Workspace

LONGEST = 64
"""Answers are written to at most so many tokens while measuring; longer ones are multiplied out."""
AT_ONCE = 64
"""Answers that are written together, as the engine does."""
_SHOWN = 2


@dataclass(frozen=True)
class Rehearsed:
    """What came of one micro-batch."""

    stage: Stage
    prompts: Sequence[PromptRow]
    rollouts: Rollouts
    experience: Learnt
    seconds: Mapping[str, float]

    @property
    def columns(self) -> int:
        """Tokens of the longest row."""
        return int(self.rollouts.real_BT.sum(-1).max())

    @property
    def shortened(self) -> bool:
        """Whether answers were written to fewer tokens than the stage allows."""
        return self.stage.sampling.max_new_tokens > LONGEST

    @property
    def cut(self) -> float:
        """Share of the answers that did not end by themselves."""
        return 1 - float(self.rollouts.finished_B.float().mean())

    @property
    def length(self) -> float:
        """Tokens of an answer on average."""
        return float(self.rollouts.length_B.float().mean())

    @property
    def _trained_BT(self) -> Tensor:
        """The trained tokens of the rollout's rows; what learns from chosen answers marks all that were written."""
        learnt = self.experience
        if isinstance(learnt, Duels) or learnt.size != self.rollouts.size:
            return self.rollouts.action_BT
        return learnt.action_BT

    def loss(self, cast: Cast) -> Callable[[Any], Any]:
        """The stage's loss on a part of the experience."""
        algorithm: protocol.Online = self.stage.algorithm  # pyright: ignore[reportAssignmentType]
        return lambda part: algorithm.loss(cast, part)

    def counts(self, tokenizer: Tokenizer) -> Counts:
        """The cells of the answers and their prompts."""
        return examples.of_batch(self.rollouts, tokenizer)

    def activations(self, cast: Cast, rows: int) -> int:
        """Bytes kept by the forward pass over a micro-batch of `rows`."""
        part = self.experience.select(torch.arange(min(rows, self.experience.size)))
        weights = [p for seat in cast.roles.values() for p in seat.trunk.parameters()]
        return memory.activations(lambda: self.loss(cast)(part.trimmed()), weights)

    def examples(
        self, tokenizer: Tokenizer, models: Sequence[tuple[str, Loaded]], judging: Judging, algorithm: protocol.Online
    ) -> Iterator[Example]:
        """The first answers, with the place where each begins, is scored and is read."""
        judged = self.rollouts
        if judging.truncation is not None:
            judged = cut_after(judged, judging.stop, judging.truncation.after, tokenizer.pad)
        group = algorithm.group
        for row in list(range(0, self.rollouts.size, group))[:_SHOWN]:
            prompt = self.prompts[int(self.rollouts.prompt_B[row])]
            real = self.rollouts.real_BT[row]
            ids, trained = self.rollouts.tokens_BT[row][real].tolist(), self._trained_BT[row][: len(real)]
            one = judged.select(torch.tensor([row]))
            answers = answers_of(one, self.prompts, tokenizer, [p.said or p.text for p in self.prompts])
            notes = [*self._notes(row, one, tokenizer), *judges.read_at(models, answers)]
            reads = int(one.real_BT[0].nonzero()[-1])
            pads = int((~real).sum())
            yield examples.example(
                f"prompt {prompt.key[:8]} and an answer", ids, trained[real].tolist(), tokenizer, pads, reads, notes
            )

    def _notes(self, row: int, judged: Rollouts, tokenizer: Tokenizer) -> Iterator[str]:
        action = self.rollouts.action_BT[row].nonzero()[:, 0].tolist()
        ended = bool(judged.finished_B[0])
        limit = f"{LONGEST} tokens, the most that a check writes" if self.shortened else "max_new_tokens"
        how = "ends by itself" if ended else f"is cut at {limit}"
        yield f"the answer begins at token {action[0] + 1}, has {len(action)} tokens and {how}"
        last = int(self._trained_BT[row].nonzero()[-1])
        learnt = self.experience
        place = int(learnt.value_mask_BT[row].nonzero()[-1]) if isinstance(learnt, Experience) else last
        spelled = examples.spelling(tokenizer, int(self.rollouts.tokens_BT[row, last]))
        if place > last:
            yield f"the score lands on the state after token {last + 1}: {spelled}"
        else:
            yield f"the score lands on token {last + 1}: {spelled}"


def rehearse(
    stage: Stage,
    here: Workspace,
    cast: Cast,
    judging: Judging,
    records: Sequence[Record],
    prompts: list[PromptRow],
    twice: bool,
) -> Rehearsed:
    """Write, score and prepare one answer a prompt and place of the group, as the first rollout would.

    `twice`: the first scoring only opens the reward models, and is not timed.
    """
    algorithm: protocol.Online = stage.algorithm  # pyright: ignore[reportAssignmentType]
    shorter = stage.sampling.model_copy(update={"max_new_tokens": min(stage.sampling.max_new_tokens, LONGEST)})
    engine = _seats.engine(cast, judging.tokenizer, shorter, records)
    per_prompt = range(algorithm.group)
    keys = [key(here.seed, stage.name, 1, p.key, k, "sample") for p in prompts for k in per_prompt]
    rollouts, writing = clock.timed(lambda: engine.generate([p.tokens for p in prompts], keys))
    if twice:
        judging.score(rollouts, prompts, algorithm.memory())
    (scored, _), scoring = clock.timed(lambda: judging.score(rollouts, prompts, algorithm.memory()))
    (scored, _), measuring = clock.timed(lambda: _greedy.with_baseline(scored, prompts, algorithm, engine, judging))
    with torch.no_grad():
        experience, preparing = clock.timed(lambda: algorithm.prepare(cast, scored))
    if isinstance(algorithm, protocol.Rests):  # what a usual rollout costs, not one that the policy rests in
        experience = replace(experience, memory={})
    seconds = {"writing answers": writing, "scoring": scoring + measuring, "references and values": preparing}
    return Rehearsed(stage, prompts, scored.rollouts, experience, seconds)
