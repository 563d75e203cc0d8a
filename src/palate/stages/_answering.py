"""Answers to judge: what models say to held prompts, and what data say, both as rewards see them."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from palate.batches import Rollouts
from palate.cast import Cast, Seat
from palate.data import collate
from palate.data.encode import Encoding, PromptRow, RankedRow, encode_rankings
from palate.engines.engine import Sampling
from palate.engines.steering import Steer
from palate.evaluation.kl import SequenceKL, kl_to_reference
from palate.models.load import Loaded
from palate.models.tokenizer import Tokenizer
from palate.randomness import key
from palate.records import Demonstration, Prompt, Ranking, Record, text_of
from palate.rewards.reward import Answers, Scorer, answers_of
from palate.rewards.shaping import cut_after, stop_token
from palate.settings import PalateError
from palate.stages import _rows, _seats
from palate.stages._judging import Truncation
from palate.workspace import Workspace

REFERENCE = "reference"
"""The column that carries a demonstrated answer to rewards and to ROUGE."""


@dataclass(frozen=True)
class Said:
    """One model's answers to all prompts, every reward's score of each (NaN: none), and the KL to the baseline."""

    prompts: Sequence[str]
    completions: Sequence[str]
    references: Sequence[str]
    owners: Sequence[int]
    lengths: Sequence[int]
    finished: Sequence[bool]
    scores: Mapping[str, Sequence[float]]
    kl: SequenceKL | None


@dataclass(frozen=True)
class Asking:
    """What every model is asked, and how: the same prompts, sampling and random keys for all."""

    records: Sequence[Record]
    encoding: Encoding
    sampling: Sampling
    truncation: Truncation | None
    answers: int
    legal_bigrams: Sequence[tuple[int, int]] = ()

    def hear(
        self, here: Workspace, model: Loaded, baseline: Loaded, judges: Mapping[str, Scorer], beta: float = 0.0
    ) -> Said:
        """One model's answers, judged; `beta` is how much it is steered by the values it learnt."""
        prompts = self._prompts(here, model)
        rollouts = self._rollouts(here, model, prompts, beta)
        judged = self._cut(rollouts, model.tokenizer)
        asked = [record.prompt or prompt.text for record, prompt in zip(self.records, prompts, strict=True)]
        answers = answers_of(judged, prompts, model.tokenizer, asked, stop=self.sampling.stop)
        return Said(
            prompts=answers.prompts,
            completions=answers.completions,
            references=[str(text or "") for text in answers.columns.get(REFERENCE, ())],
            owners=judged.prompt_B.tolist(),
            lengths=judged.length_B.tolist(),
            finished=judged.finished_B.tolist(),
            scores={name: judge.score(answers).score_B.tolist() for name, judge in judges.items()},
            kl=None if model is baseline and not beta else _distance(model, baseline, rollouts),
        )

    def _prompts(self, here: Workspace, model: Loaded) -> list[PromptRow]:
        records = [_as_prompt(record) for record in self.records]
        room = model.trunk.context - self.sampling.max_new_tokens
        found = _rows.prompts(records, model.tokenizer, self.encoding, room, here)
        if len(found) != len(records):
            raise PalateError(
                f"{here.name}.prompts: {len(records) - len(found)} do not fit {model.source}, and models can only be "
                "compared on the same prompts. Set encoding.long_prompts to keep_end, or filter the data."
            )
        return found

    def _rollouts(self, here: Workspace, model: Loaded, prompts: Sequence[PromptRow], beta: float) -> Rollouts:
        """Keys do not name the model: every model faces the same draws, which narrows paired differences."""
        per_prompt = range(self.answers)
        keys = [key(here.seed, here.name, p.key, k, "evaluate") for p in prompts for k in per_prompt]
        seats = Cast({"policy": Seat(model.trunk, None, None)})
        steer = Steer(model.trunk, model.heads, beta, self.legal_bigrams)
        engine = _seats.engine(seats, model.tokenizer, self.sampling, self.records, steer)
        return engine.generate([p.tokens for p in prompts], keys)

    def _cut(self, rollouts: Rollouts, tokenizer: Tokenizer) -> Rollouts:
        if self.truncation is None:
            return rollouts
        stop = stop_token(self.truncation.token, tokenizer, "truncation.token")
        return cut_after(rollouts, stop, self.truncation.after, tokenizer.pad)


def _as_prompt(record: Record) -> Prompt:
    """The prompt alone; a demonstrated answer goes along as a column. Of a plain text the encoding makes a prompt."""
    if not record.prompt:
        return record
    columns = dict(record.columns)
    if isinstance(record, Demonstration) and record.completion:
        columns.setdefault(REFERENCE, text_of(record.completion))
    return Prompt(record.prompt, columns, record.group)


def _distance(model: Loaded, baseline: Loaded, rollouts: Rollouts) -> SequenceKL | None:
    """KL to the baseline; None between models that do not share their tokens."""
    if not model.tokenizer.same_words(baseline.tokenizer):
        return None
    seats = Cast({"reference": Seat(baseline.trunk, None, None)})
    return kl_to_reference(seats, rollouts.to(seats.device))


def release() -> None:
    """Give back the memory of a model that is no longer needed."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def given_answers(
    records: Sequence[Record], tokenizer: Tokenizer, encoding: Encoding
) -> tuple[list[Ranking], Answers, list[str]]:
    """The rankings among records and all their answers, flat, as rewards see them; and why others were left out.

    Texts are the record's own; ids are what the tokenizer makes of them, for rewards that read ids.
    """
    kept: list[Ranking] = []
    rows: list[RankedRow] = []
    left_out: list[str] = []
    for record, row in _encoded(records, tokenizer, encoding):
        if isinstance(row, str):
            left_out.append(row)
        else:
            kept.append(record)
            rows.append(row)
    if not kept:
        raise PalateError(left_out[0] if left_out else "comparisons: no record is a pair or a ranking.")
    return kept, _answers(kept, rows, tokenizer), left_out


def _encoded(
    records: Sequence[Record], tokenizer: Tokenizer, encoding: Encoding
) -> Iterator[tuple[Ranking, RankedRow | str]]:
    """Each ranking with its rows, or with the reason why it has none."""
    for record in records:
        if isinstance(record, Ranking):
            try:
                yield record, encode_rankings([record], tokenizer, encoding).rows[0]
            except PalateError as fault:
                yield record, str(fault)


def _answers(rankings: Sequence[Ranking], rows: Sequence[RankedRow], tokenizer: Tokenizer) -> Answers:
    flat = [token_row for row in rows for token_row in row.rows]
    examples = collate.examples(flat, tokenizer.pad)
    owner = [i for i, ranking in enumerate(rankings) for _ in ranking.completions]
    rollouts = Rollouts(
        tokens_BT=examples.tokens_BT,
        real_BT=examples.real_BT,
        action_BT=examples.action_BT,
        logp_BT=torch.zeros(examples.tokens_BT.shape),
        finished_B=torch.tensor([row.tokens[-1] == tokenizer.eos for row in flat]),
        prompt_B=torch.tensor(owner),
        version=0,
    )
    asked = [PromptRow([], r.key, text_of(r.prompt), r.columns) for r in rankings]
    answers = answers_of(rollouts, asked, tokenizer, [r.prompt for r in rankings])
    return replace(answers, completions=[text_of(c) for r in rankings for c in r.completions])
