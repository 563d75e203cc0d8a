"""Evaluation: models compared on held prompts under given rewards, and reward models held against comparisons."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from palate.data.encode import Encoding
from palate.data.source import Data
from palate.engines.engine import Sampling
from palate.engines.steering import Steering
from palate.evaluation import outcome
from palate.evaluation.outcome import ModelOutcome, Outcome
from palate.evaluation.reward_accuracy import RewardAccuracy
from palate.models.load import Loaded, Loading
from palate.models.load import load as load_model
from palate.models.tokenizer import Tokenizer
from palate.records import Record
from palate.rewards.reward import AnyReward, Scorer, stages_read
from palate.settings import Choice, PalateError, nearest
from palate.stages import _answering, _comparing, _rows, _seats
from palate.stages._judging import Truncation
from palate.workspace import Workspace


class Stage(Choice):
    """Compare models on prompts none of them was trained on, and reward models on held comparisons."""

    kind: str = "evaluate"
    """Evaluation."""
    name: str = "evaluate"
    """The stage's name."""
    models: dict[str, str] = Field(default_factory=dict)
    """Name: folder, hub id or `stage:NAME`. The first is the baseline that the others are compared with."""
    prompts: Data | None = None
    """Held prompts; the held-out side when `held_out` is set. Demonstrations also serve as ROUGE references."""
    rewards: dict[str, AnyReward] = Field(default_factory=dict)
    """Name: reward. Every answer is scored under each."""
    gold: str | None = None
    """Which of the rewards is known to be true; left out, one of kind `gold` is."""
    judge: str | None = None
    """Which of the rewards decides who wins; left out, gold, else the first."""
    comparisons: Data | None = None
    """Held pairs or rankings that every reward but gold is held against."""
    answers: int = Field(default=1, ge=1)
    """Answers per prompt and model."""
    sampling: Sampling = Sampling()
    """How answers are drawn, the same for every model."""
    steering: Steering = Steering()
    """How decoding leaves the policy's own distribution: by learnt values of actions, and what may follow what."""
    truncation: Truncation | None = None
    """Cut answers after a token before they are judged, as the training stage did."""
    encoding: Encoding = Encoding()
    """How prompts and comparisons become tokens."""
    loading: Loading = Loading()
    """How models come into memory."""
    rouge: bool = True
    """Compute ROUGE where the prompts bring reference answers."""

    @model_validator(mode="after")
    def _has_work(self) -> Stage:
        if any(self.steering.betas) and not self.models:
            raise ValueError("steering: there is no model to steer.")
        for name in (self.gold, self.judge):
            if name is not None and name not in self.rewards:
                known = ", ".join(self.rewards) or "none"
                raise ValueError(f"no reward is called {name!r}.{nearest(name, self.rewards)} Known: {known}.")
        if bool(self.models) != (self.prompts is not None):
            raise ValueError("models need prompts to answer, and prompts need models: give both or neither.")
        if not self.models and not (self.rewards and self.comparisons):
            raise ValueError("nothing to evaluate: give models and prompts, or rewards and comparisons.")
        if self.comparisons is not None and not self.rewards:
            raise ValueError("comparisons are there to judge rewards: give at least one.")
        return self

    def references(self) -> list[str]:
        """Earlier stages this one reads."""
        read = [name for reward in self.rewards.values() for name in stages_read(reward)]
        return _seats.references(*self.models.values()) + read

    def files(self) -> list[str]:
        """Files whose content counts for the cache."""
        data = [file for source in (self.prompts, self.comparisons) if source for file in source.files()]
        return data + _seats.files(*self.models.values(), *_seats.judges(*self.rewards.values()))

    @property
    def true_reward(self) -> str | None:
        """The reward known to be true: the one named, else the first of kind `gold`."""
        known = (n for n, r in self.rewards.items() if isinstance(r, Choice) and r.kind == "gold")
        return self.gold or next(known, None)

    def run(self, here: Workspace) -> None:
        """Answer, judge, compare; leave evaluation.json and samples.jsonl."""
        judges = {name: _seats.at_hand(reward, here) or reward for name, reward in self.rewards.items()}
        notes: list[str] = []
        with here.progress(len(self.models) + bool(self.comparisons), self.name) as bar:
            said, tokenizer = self._listen(here, judges, bar.advance)
            pages = self._judge_rewards(here, judges, tokenizer, notes)
            if self.comparisons:
                bar.advance({})
        found = self._outcome(here, said, pages, notes)
        outcome.write(found, here.folder)
        here.log(0, dict(_flat(found)))
        if said:
            here.sample(0, _comparing.sample_rows(said, _comparing.world_of(self.prompts)))

    def _listen(
        self, here: Workspace, judges: Mapping[str, Scorer], advance: Any
    ) -> tuple[dict[str, _answering.Said], Tokenizer | None]:
        """What every model says; the baseline stays in memory as the reference, the others come and go."""
        said: dict[str, _answering.Said] = {}
        baseline: Loaded | None = None
        if self.prompts is None:
            return said, None
        asking = self._asking(_held(self.prompts, here))
        for name, source in self.models.items():
            model = load_model(here.resolve(source), "policy", self.loading)
            baseline = baseline or model
            if any(self.steering.betas) and not model.heads:
                here.warn(f"{name} has learnt no values of its actions, so it answers unsteered")
            for title, beta in self._ways(name, model):
                said[title] = asking.hear(here, model, baseline, judges, beta)
            del model
            _answering.release()
            advance({})
        return said, baseline.tokenizer if baseline else None

    def _ways(self, name: str, model: Loaded) -> list[tuple[str, float]]:
        """The names under which a model answers, and the β of each; one that learnt no values has only its own way."""
        betas = self.steering.betas if model.heads else (0.0,)
        return [(name if len(betas) == 1 else f"{name} beta {beta:g}", beta) for beta in betas]

    def _asking(self, records: Sequence[Record]) -> _answering.Asking:
        return _answering.Asking(
            records,
            self.encoding,
            self.sampling,
            self.truncation,
            self.answers,
            self.steering.legal_bigrams,
        )

    def _judge_rewards(
        self, here: Workspace, judges: Mapping[str, Scorer], tokenizer: Tokenizer | None, notes: list[str]
    ) -> dict[str, RewardAccuracy]:
        if self.comparisons is None:
            return {}
        tokenizer = tokenizer or self._tokenizer_of_a_reward(judges)
        records = _held(self.comparisons, here)
        rankings, answers, left_out = _answering.given_answers(records, tokenizer, self.encoding)
        if left_out:
            notes.append(
                f"{len(left_out)} of {len(records)} comparisons were left out, the first because: {left_out[0]}"
            )
        pages = _comparing.judge_rewards(judges, self.true_reward, rankings, answers, self.comparisons, here.seed)
        return dict(pages)

    def _tokenizer_of_a_reward(self, judges: Mapping[str, Scorer]) -> Tokenizer:
        folders = [getattr(judge, "model", None) for judge in judges.values()]
        source = next((f for f in folders if isinstance(f, str)), None)
        if source is None:
            raise PalateError(f"{self.name}: rewards without a model need a tokenizer: name one model in `models`.")
        return load_model(Path(source), "reward", self.loading).tokenizer

    def _outcome(
        self,
        here: Workspace,
        said: Mapping[str, _answering.Said],
        pages: Mapping[str, RewardAccuracy],
        notes: list[str],
    ) -> Outcome:
        world = _comparing.world_of(self.prompts)
        first = next(iter(said.values()), None)
        rouge = self.rouge and first is not None and bool(first.references) and all(first.references)
        models: dict[str, ModelOutcome] = {}
        if first is not None:
            for name, one in said.items():
                models[name] = _comparing.model_outcome(one, first, world, rouge, here.seed)
                if one is not first and one.kl is None:
                    notes.append(f"No KL for {name}: its tokens are not those of the baseline.")
        return Outcome(
            baseline=next(iter(said), ""),
            judge=self.judge or self.true_reward or next(iter(self.rewards), None),
            gold=self.true_reward,
            prompts=len(set(first.owners)) if first else 0,
            answers=self.answers,
            models=models,
            reward_models=pages,
            notes=tuple(notes),
        )


def _held(data: Data, here: Workspace) -> list[Record]:
    """The held-out side where one is asked for, else everything."""
    return _rows.read_side(data, here, "held_out" if data.held_out else "all")


def _flat(found: Outcome) -> Iterator[tuple[str, float]]:
    """The outcome as metrics, `evaluate/MEASURE/MODEL` and `evaluate/MEASURE/REWARD`."""
    for name, model in found.models.items():
        yield from ((f"evaluate/score/{name}/{r}", s.mean.estimate) for r, s in model.scores.items())
        yield from ((f"evaluate/win_rate/{name}/{r}", w.rate.estimate) for r, w in model.win_rate.items())
        yield from ((f"evaluate/world/{name}/{part}", value) for part, value in model.world.items())
        yield f"evaluate/length_mean/{name}", model.text.length_mean
        yield f"evaluate/eos_rate/{name}", model.text.eos_rate
        if model.kl:
            yield f"evaluate/kl/{name}", model.kl.mean
    for name, page in found.reward_models.items():
        yield f"evaluate/accuracy/{name}", page.accuracy
        yield f"evaluate/calibration_error/{name}", page.calibration.error
