"""An evaluation, set up but not run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from palate.cast import Cast, Seat
from palate.check import clock, examples, judges, memory
from palate.check.arithmetic import counted
from palate.check.found import Batches, Memory, Seen, Time
from palate.check.gathered import Gathered
from palate.check.rehearsal import Rehearsal
from palate.check.training import describe
from palate.data.encode import PromptRow
from palate.data.source import Data
from palate.models.load import Loaded
from palate.models.load import load as load_model
from palate.randomness import key
from palate.records import Record
from palate.rewards.reward import Answers, Scorer, answers_of
from palate.stages import _rows, _seats
from palate.stages.evaluate import Stage
from palate.workspace import Workspace

_SHOWN = 2
_WRITTEN = 64
"""Answers written to measure how long they take."""


@dataclass(frozen=True)
class _Setup:
    """An evaluation with its data read and its models opened once."""

    stage: Stage
    here: Workspace
    models: dict[str, Loaded]
    rewards: Sequence[Scorer]
    judges: Sequence[tuple[str, Loaded]]
    records: Sequence[Record]
    comparisons: int
    prompts: Sequence[PromptRow]


def look(stage: Stage, index: int, rehearsal: Rehearsal, measure: bool) -> Seen:
    """What the evaluation would do."""
    gathered, here = Gathered(stage.name), rehearsal.workspace(index)
    setup, seconds = clock.timed(lambda: _set_up(stage, here, gathered))
    gathered.warn(*rehearsal.warnings(here))
    if setup is None:
        return gathered.onto(Seen())
    seen = Seen(
        "; ".join(describe(m, n, rehearsal.is_trained(stage.models[n])) for n, m in setup.models.items()),
        _batches(setup),
        rules=tuple(_rules(setup)),
    )
    if setup.models and not gathered.faults:
        tokenizer = next(iter(setup.models.values())).tokenizer
        shown = [
            examples.example(f"prompt {p.key[:8]}", p.tokens, [False] * len(p.tokens), tokenizer)
            for p in setup.prompts[:_SHOWN]
        ]
        seen = replace(seen, examples=tuple(shown), memory=_memory(setup))
        if measure:
            time = gathered.ask(_time, setup, seconds)
            seen = replace(seen, time=time)
    return gathered.onto(seen)


def _set_up(stage: Stage, here: Workspace, gathered: Gathered) -> _Setup | None:
    records = _read(stage.prompts, here, gathered)
    comparisons = _read(stage.comparisons, here, gathered)
    models = {name: gathered.ask(_open, source, stage, here) for name, source in stage.models.items()}
    at_hand = [_seats.at_hand(reward, here) or reward for reward in stage.rewards.values()]
    found = gathered.ask(judges.reward_models, *at_hand)
    opened = {name: model for name, model in models.items() if model is not None}
    if gathered.faults or found is None:
        return None
    prompts: list[PromptRow] = []
    for name, model in opened.items():
        room = model.trunk.context - stage.sampling.max_new_tokens
        fitting = gathered.ask(_rows.prompts, records, model.tokenizer, stage.encoding, room, here)
        if fitting is not None and len(fitting) != len(records):
            gathered.fault(
                f"prompts: {len(records) - len(fitting):,} do not fit model {name}, and models can only be compared on "
                "the same prompts. Set encoding.long_prompts to keep_end, or filter the data."
            )
        prompts = prompts or fitting or []
    return _Setup(stage, here, opened, at_hand, found, records, len(comparisons), prompts)


def _open(source: str, stage: Stage, here: Workspace) -> Loaded:
    return load_model(here.resolve(source), "policy", stage.loading)


def _read(data: Data | None, here: Workspace, gathered: Gathered) -> list[Record]:
    """The held-out side where one is asked for, else everything; nothing where no data are named."""
    if data is None:
        return []
    side = "held_out" if data.held_out else "all"
    return gathered.ask(_rows.read_side, data, here, side) or []


def _batches(setup: _Setup) -> Batches:
    stage, prompts = setup.stage, len(setup.records)
    answers = prompts * stage.answers * len(stage.models)
    numbers = {
        "prompts": prompts,
        "answers_per_prompt": stage.answers,
        "models": len(stage.models),
        "answers": answers,
        "rewards": len(stage.rewards),
        "comparisons": setup.comparisons,
    }
    words: list[str] = []
    if stage.models:
        words.append(
            f"{counted(prompts, 'prompt')} × {counted(stage.answers, 'answer')} × "
            f"{counted(len(stage.models), 'model')} = {answers:,} answers, each judged by "
            f"{counted(len(stage.rewards), 'reward')}"
        )
    if setup.comparisons:
        words.append(f"{counted(setup.comparisons, 'comparison')} that rewards are held against")
    return Batches(numbers, tuple(words))


def _rules(setup: _Setup) -> list[str]:
    baseline = next(iter(setup.models.values()), None)
    if baseline is None:
        return []
    return [judges.rule(label, judge, baseline) for label, judge in setup.judges]


def _memory(setup: _Setup) -> Memory:
    """The baseline stays while the others come and go, beside every reward model."""
    models = list(setup.models.values())
    casts = [Cast({"policy": Seat(model.trunk, None, None)}) for model in models]
    sizes = [memory.of_cast(cast, ()) for cast in casts]
    largest = max(sizes[1:], key=lambda size: size[1]["frozen weights"], default=({"frozen": 0}, {"frozen weights": 0}))
    judged = memory.of_cast(casts[0], (), [judge for _, judge in setup.judges])
    longest = max((len(p.tokens) for p in setup.prompts), default=0) + setup.stage.sampling.max_new_tokens
    held = {
        "baseline": sizes[0][1]["frozen weights"],
        "the other model": largest[1]["frozen weights"],
        "reward models": judged[1].get("reward models", 0),
        "keys and values": memory.cache_bytes(models[0].trunk) * longest * min(_WRITTEN, max(1, len(setup.records))),
    }
    parameters = {"baseline": sizes[0][0]["frozen"], "the other model": largest[0]["frozen"]}
    return memory.memory(parameters, held, "weights counted; keys and values of the longest rows")


def _time(setup: _Setup, seconds: float) -> Time:
    stage, here = setup.stage, setup.here
    model = next(iter(setup.models.values()))
    prompts = list(setup.prompts[:_WRITTEN])
    engine = _seats.engine(
        Cast({"policy": Seat(model.trunk, None, None)}), model.tokenizer, stage.sampling, setup.records
    )
    keys = [key(here.seed, here.name, p.key, 0, "evaluate") for p in prompts]
    rollouts, writing = clock.timed(lambda: engine.generate([p.tokens for p in prompts], keys))
    answers = answers_of(rollouts, prompts, model.tokenizer, [p.said or p.text for p in prompts])
    judging = sum(_scoring(reward, answers) for reward in setup.rewards)
    written = len(setup.records) * stage.answers * len(setup.models)
    share, judged = written / len(prompts), (written + 2 * setup.comparisons) / len(prompts)
    spent = {"setting up": seconds, "writing answers": writing * share, "judging": judging * judged}
    return clock.total(spent, f"{len(prompts)} answers written and judged once, × {share:,.0f} and × {judged:,.0f}")


def _scoring(reward: Scorer, answers: Answers) -> float:
    """Seconds of one scoring, after one that opens the model where there is one."""
    if isinstance(getattr(reward, "model", None), str):
        reward.score(answers)
    return clock.timed(lambda: reward.score(answers))[1]
