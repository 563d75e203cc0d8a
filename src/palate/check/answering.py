"""A stage that learns from its own answers, set up but not run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from palate.algorithms import protocol
from palate.batches import without_shown
from palate.cast import Cast
from palate.check import clock, examples, judges, memory
from palate.check.arithmetic import Online, typical
from palate.check.found import Example, Seen, Time
from palate.check.gathered import Gathered
from palate.check.rehearsal import Rehearsal
from palate.check.rollout import AT_ONCE, LONGEST, Rehearsed, rehearse
from palate.check.training import describe
from palate.check.update import Update
from palate.cutting import Microbatch, affordable
from palate.data.encode import PromptRow
from palate.models.load import Loaded
from palate.randomness import key
from palate.records import Record
from palate.rewards.reward import Scorer
from palate.settings import PalateError
from palate.stages import _rows, _seats
from palate.stages._judging import Judging
from palate.stages._order import Order
from palate.stages._pretraining import Mix
from palate.stages.online import Stage
from palate.step import Stepper
from palate.workspace import Workspace

_SHOWN = 2
_MOSTLY = 0.5


@dataclass(frozen=True)
class _Setup:
    """A stage with its prompts read and its models open."""

    stage: Stage
    here: Workspace
    policy: Loaded
    value: Loaded | None
    reward: Scorer
    watch: Scorer | None
    judges: Sequence[tuple[str, Loaded]]
    records: Sequence[Record]
    prompts: Sequence[PromptRow]
    numbers: Online
    most: Microbatch
    trained: bool
    """Whether the policy is what it will be, not a stand-in."""
    mix: Mix | None
    """Texts that are learnt beside the answers."""

    @property
    def algorithm(self) -> protocol.Online:
        """The stage's algorithm, as what it must be here."""
        return self.stage.algorithm  # pyright: ignore[reportReturnType]

    def first(self, count: int) -> list[PromptRow]:
        """The first prompts of the first rollout."""
        enough = _rows.enough(list(self.prompts), self.numbers.asked)
        order = Order([len(p.tokens) for p in enough], self.numbers.asked, False, (self.here.seed, self.stage.name))
        return [enough[i] for i in order.batch(0)[:count]]


def look(stage: Stage, index: int, rehearsal: Rehearsal, measure: bool) -> Seen:
    """What the stage would do; its policy's stand-in is left for later stages."""
    gathered, here = Gathered(stage.name), rehearsal.workspace(index)
    setup, seconds = clock.timed(lambda: _set_up(stage, here, rehearsal, gathered))
    gathered.warn(*rehearsal.warnings(here))
    if setup is None:
        return gathered.onto(Seen())
    seen = Seen(
        describe(setup.policy, stage.model, rehearsal.is_trained(stage.model)),
        setup.numbers.batches(),
        rules=tuple(_rules(setup)),
    )
    seen = replace(seen, examples=tuple(_plain(setup, p) for p in setup.first(_SHOWN)))
    if not gathered.faults:
        seen = gathered.ask(_with_cost, seen, setup, seconds, measure, gathered) or seen
    return gathered.onto(seen)


def first_update(stage: Stage, index: int, rehearsal: Rehearsal) -> Update:
    """The stage's first optimiser step, on real answers, as far as its gradient. PalateError for its first fault."""
    gathered, here = Gathered(stage.name), rehearsal.workspace(index)
    setup = _set_up(stage, here, rehearsal, gathered)
    if setup is None or gathered.faults:
        raise PalateError(gathered.faults[0])
    trains, counter = setup.algorithm.trains, key(here.seed, stage.name)
    cast = _seats.online_cast(setup.policy, setup.value, stage.layout, setup.algorithm, counter, here)
    judging = Judging(
        setup.reward,
        setup.watch,
        stage.shaping,
        stage.truncation,
        setup.policy.tokenizer,
        here.world,
        stage.sampling.stop,
    )
    prompts = setup.first(max(1, min(AT_ONCE, setup.numbers.minibatch) // setup.algorithm.group))
    done = rehearse(stage, here, cast, judging, setup.records, prompts, twice=False)
    batch = without_shown(done.experience)
    return Update(stage.name, cast, trains, batch, done.loss(cast), setup.most, stage.optimiser)


def _set_up(stage: Stage, here: Workspace, rehearsal: Rehearsal, gathered: Gathered) -> _Setup | None:
    read = gathered.ask(_rows.read, stage.prompts, here)
    policy = gathered.ask(rehearsal.open, stage.model, here, "policy", stage.loading)
    value = None
    if stage.value_model is not None:
        value = gathered.ask(rehearsal.open, stage.value_model, here, "value", stage.loading)
    reward, watch = (_seats.at_hand(asked, here) for asked in (stage.reward, stage.watch))
    found = gathered.ask(judges.reward_models, reward, watch)
    if policy is not None:
        plain = stage.loading.end_token is None and not stage.loading.make_causal
        rehearsal.leave(here, str(here.resolve(stage.model)), policy, judges=False, plain=plain)
    if policy is None or read is None or found is None:
        return None
    room = policy.trunk.context - stage.sampling.max_new_tokens
    prompts = gathered.ask(_prompts, stage, read[0], policy, room, here)
    if prompts is None:
        return None
    most = _seats.microbatch(stage, affordable(policy.trunk))
    numbers = _numbers(stage, prompts, most)
    mix = gathered.ask(Mix.of, stage.pretraining, policy, stage.name, here)
    setup = _Setup(
        stage,
        here,
        policy,
        value,
        reward or stage.reward,
        watch,
        found,
        read[0],
        prompts,
        numbers,
        most,
        rehearsal.is_trained(stage.model),
        mix,
    )
    _judge(setup, gathered)
    return setup


def _prompts(stage: Stage, records: Sequence[Record], policy: Loaded, room: int, here: Workspace) -> list[PromptRow]:
    if room < 1:
        raise PalateError(
            f"sampling.max_new_tokens: {stage.sampling.max_new_tokens} leaves no place for a prompt in the context of "
            f"{policy.trunk.context}. Lower it, or take a model with a longer context."
        )
    return _rows.prompts(records, policy.tokenizer, stage.encoding, room, here)


def _numbers(stage: Stage, prompts: Sequence[PromptRow], most: Microbatch) -> Online:
    algorithm: protocol.Online = stage.algorithm  # pyright: ignore[reportAssignmentType]
    mean = sum(len(p.tokens) for p in prompts) / len(prompts) + stage.sampling.max_new_tokens
    return Online(
        prompts=len(prompts),
        rollout=stage.rollout_batch_size,
        group=algorithm.group,
        passes=algorithm.passes,
        minibatches=algorithm.minibatches,
        microbatch=typical(most, -(-stage.rollout_batch_size // algorithm.minibatches), mean),
        episodes=stage.total_episodes,
        tokens=most.tokens,
    )


def _judge(setup: _Setup, gathered: Gathered) -> None:
    """Faults and warnings about prompts, batches and reward models."""
    stage, numbers, pad = setup.stage, setup.numbers, setup.policy.tokenizer.pad
    longest = max(len(p.tokens) for p in setup.prompts)
    for label, judge in setup.judges:
        gathered.ask(judges.fits, label, judge, setup.policy, longest, stage.sampling.max_new_tokens)
    ends = sum(p.tokens[-1] == pad for p in setup.prompts) if pad != setup.policy.tokenizer.eos else 0
    if ends:
        gathered.fault(
            f"prompts: {ends:,} of {len(setup.prompts):,} end in the padding token. Take the padding out of the data."
        )
    bos = setup.policy.tokenizer.bos
    double = sum(p.tokens.count(bos) > 1 for p in setup.prompts) if bos not in (None, setup.policy.tokenizer.eos) else 0
    if double:
        gathered.warn(f"prompts: {double:,} of {len(setup.prompts):,} hold the begin token more than once.")
    if stage.microbatch_size is not None and stage.microbatch_size > numbers.minibatch:
        gathered.warn(
            f"microbatch_size: {stage.microbatch_size:,} is larger than the {numbers.minibatch:,} answers of one step."
        )


def _rules(setup: _Setup) -> list[str]:
    """What is trained, read and scored, in sentences."""
    stage, lengths = setup.stage, [len(p.tokens) for p in setup.prompts]
    said = [
        f"prompts have {sum(lengths) / len(lengths):,.1f} tokens on average, {max(lengths):,} at most",
        f"an answer begins right behind its prompt and has "
        f"{'exactly' if stage.sampling.fixed_length else 'at most'} {stage.sampling.max_new_tokens:,} tokens",
        _landing(stage),
    ]
    if stage.truncation is not None:
        trained = "the cut answer" if stage.truncation.train_on_cut else "the whole answer"
        said.append(
            f"before it is scored an answer is cut after {stage.truncation.token!r} "
            f"at place {stage.truncation.after} or later; {trained} is trained"
        )
    if setup.mix is not None:
        said.append(setup.mix.rule)
    return said + [judges.rule(label, judge, setup.policy) for label, judge in setup.judges]


def _landing(stage: Stage) -> str:
    if getattr(stage.algorithm, "score_position", "last") == "after":
        return (
            "the score lands on the state after the last token of the answer; "
            "an answer of full length keeps it on its last token"
        )
    return "the score lands on the last token of the answer"


def _plain(setup: _Setup, prompt: PromptRow) -> Example:
    """A prompt without its answer."""
    return examples.example(
        f"prompt {prompt.key[:8]}",
        prompt.tokens,
        [False] * len(prompt.tokens),
        setup.policy.tokenizer,
        notes=[f"the answer begins at token {len(prompt.tokens) + 1}"],
    )


def _with_cost(seen: Seen, setup: _Setup, seconds: float, measure: bool, gathered: Gathered) -> Seen:
    """What was seen, with memory and time, and with real answers as examples."""
    stage, here, algorithm = setup.stage, setup.here, setup.algorithm
    cast = _seats.online_cast(setup.policy, setup.value, stage.layout, algorithm, key(here.seed, stage.name), here)
    parameters, held = memory.of_cast(cast, algorithm.trains, [judge for _, judge in setup.judges])
    held |= memory.of_average(cast, "policy", stage.ema)
    if not measure:
        return replace(seen, memory=memory.memory(parameters, held, "counted; nothing was measured (--quick)"))
    judging = Judging(
        setup.reward,
        setup.watch,
        stage.shaping,
        stage.truncation,
        setup.policy.tokenizer,
        here.world,
        stage.sampling.stop,
    )
    rows = min(AT_ONCE, stage.rollout_batch_size)
    prompts = setup.first(max(1, rows // algorithm.group))
    done = rehearse(stage, here, cast, judging, setup.records, prompts, twice=bool(setup.judges))
    if setup.trained and not done.shortened and done.cut > _MOSTLY and not stage.sampling.fixed_length:
        gathered.warn(f"sampling.max_new_tokens: {done.cut:.0%} of the answers written reach it without an end.")
    longest = max(len(p.tokens) for p in setup.prompts) + stage.sampling.max_new_tokens
    held["activations"] = int(
        done.activations(cast, min(setup.numbers.microbatch, setup.numbers.minibatch)) * longest / done.columns
    )
    held["keys and values"] = memory.cache_bytes(setup.policy.trunk) * longest * rows
    basis = f"weights counted; activations of one micro-batch of real answers, at {longest:,} tokens a row"
    return replace(
        seen,
        batch=done.counts(setup.policy.tokenizer),
        examples=tuple(done.examples(setup.policy.tokenizer, setup.judges, judging, algorithm)),
        memory=memory.memory(parameters, held, basis),
        time=_time(setup, cast, done, seconds),
    )


def _time(setup: _Setup, cast: Cast, done: Rehearsed, seconds: float) -> Time:
    stage, numbers = setup.stage, setup.numbers
    stepper = Stepper(cast.parameters(setup.algorithm.trains), stage.optimiser, setup.here.world)
    learnt, written = done.experience.size, done.rollouts.size  # pairs and chosen answers are fewer than the answers
    rows = max(1, round(numbers.minibatch * learnt / written))
    step = clock.of_step(stepper, done.experience, done.loss(cast), setup.most, rows)
    share = numbers.rollouts * numbers.rollout / written
    longer = stage.sampling.max_new_tokens / min(stage.sampling.max_new_tokens, LONGEST)
    spent = {"setting up": seconds}
    spent |= {part: taken * share * longer for part, taken in done.seconds.items()}
    spent["optimiser steps"] = step * longer * numbers.rollouts * numbers.passes * numbers.minibatches
    basis = (
        f"{written:,} answers of {done.length:.0f} tokens on average were written, scored and learnt from "
        f"once, × {share:,.0f}"
    )
    untrained = "" if setup.trained else "; the policy is not trained yet, and a trained one may end its answers sooner"
    return clock.total(spent, basis + untrained)
