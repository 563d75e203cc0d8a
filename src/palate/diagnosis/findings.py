"""What a run amounts to, in words: one verdict, and the findings behind it, worst first.

A finding is a sentence with a level. Its thresholds are named here with their reasons; none of them stops a
run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from palate.diagnosis.curves import end_of, noise_of, smooth, start_of
from palate.diagnosis.run_folder import Points, Row, RunFolder, StageFolder, at, mapping
from palate.diagnosis.svg import short

Level = Literal["alarm", "warning", "good", "note"]
_ORDER: Mapping[Level, int] = {"alarm": 0, "warning": 1, "good": 2, "note": 3}

_FALL = 0.25
"""Gold has turned when it loses this share of what it had gained at its best: less is the noise of a batch."""
_NOISE = 5.0
"""And so many deviations of a smoothed point: the best of a hundred wavering points lies two or three above."""
_KL_FAR = 30.0
"""Nats per answer beyond which the reference hardly constrains the policy (published runs settle at 2 to 10)."""
_KL_BELOW = -0.5
"""KL is never negative; its estimate below this means that sampling and training disagree."""
_ENTROPY_LEFT = 0.15
"""Share of the starting entropy below which answers have all but stopped to vary."""
_LENGTH_FACTOR = 1.6
"""Growth or shrinkage of the answers that deserves a look."""
_ENDS = 0.5
"""Share of answers that end by themselves below which most are cut off."""
_CLIPPED = 0.3
"""Share of clipped tokens beyond which updates are larger than PPO's bound allows for."""

_CHOSEN_FELL = -5.0
"""Nats per answer that log π(chosen) may fall before it is said. Methods that fall to −12 and −19 can still do well, so
this alone is a warning."""
_BROKEN = 0.1
"""Rise in the share of empty, endless or repeating answers that makes the same fall an alarm."""


@dataclass(frozen=True)
class Finding:
    """One thing to know about a run: what was seen, and what it means or what to do."""

    level: Level
    title: str
    text: str


@dataclass(frozen=True)
class Verdict:
    """The answer to "did it get better?", with its level and the evidence in one sentence."""

    level: Level
    title: str
    text: str


def verdict(run: RunFolder) -> Verdict:
    """The run in one sentence: by its evaluation, else by its curves, else by how far it came."""
    if stage := run.evaluated:
        return _by_evaluation(mapping(stage.evaluation))
    if (stage := run.online) and len(stage.series("objective/scores")) > 1:
        return _by_curves(stage)
    done = [s.name for s in run.stages if s.finished]
    if not run.stages:
        return Verdict("note", "Nothing has run yet.", "The run directory holds no stage.")
    if judged := [text for stage in run.stages if stage.evaluation for text in _judged(stage.evaluation)]:
        return Verdict("note", "Reward models were measured.", f"{'; '.join(judged)}.")
    reached = f"Finished: {', '.join(done)}." if done else "No stage has finished."
    return Verdict("note", "No evaluation yet.", f"{reached} Add an evaluate stage to learn whether it got better.")


def _judged(found: Row) -> Iterator[str]:
    """What an evaluation without policies says of each of its reward models."""
    for name in mapping(found, "reward_models"):
        accuracy, low, high = (at(found, "reward_models", name, "interval", k) for k in ("estimate", "low", "high"))
        pairs = at(found, "reward_models", name, "pairs")
        if accuracy is not None and low is not None and high is not None and pairs is not None:
            yield f"{name} orders {accuracy:.1%} of {pairs:.0f} held pairs (95 % interval {low:.1%} to {high:.1%})"


def _by_evaluation(found: Row) -> Verdict:
    name = last_model(found)
    judge = judge_of(found)
    duel = mapping(found, "models", name, "win_rate", judge or "")
    rate, low, high = (at(duel, "rate", key) for key in ("estimate", "low", "high"))
    if rate is None or low is None or high is None or judge is None:
        return Verdict("note", "Measured, not compared.", "The evaluation holds one model, so there is no win rate.")
    baseline, prompts = str(found.get("baseline")), at(found, "prompts") or 0
    under = "the true utility" if judge == found.get("gold") else f"the judge “{judge}”"
    evidence = (
        f"{name} wins {rate:.1%} against {baseline} on {prompts:.0f} held prompts under {under} "
        f"(95 % interval {low:.1%} to {high:.1%}, {_probability(at(duel, 'rate', 'p_value'))})."
    )
    if overuse(found):
        return Verdict("alarm", "The proxy was over-optimised.", f"The reward went up, the truth did not. {evidence}")
    if low > 0.5:
        return Verdict("good", "It got better.", evidence)
    if high < 0.5:
        return Verdict("alarm", "It got worse.", evidence)
    return Verdict("warning", "No clear difference.", evidence)


def _by_curves(stage: StageFolder) -> Verdict:
    watched = "gold/mean" if len(stage.series("gold/mean")) > 1 else "objective/scores"
    points = smooth(stage.series(watched))
    began, ended = start_of(points), end_of(points)
    what = "gold utility" if watched == "gold/mean" else "reward"
    moved = f"During training the {what} went from {short(began)} to {short(ended)}."
    return Verdict("note", "Trained, not evaluated.", f"{moved} Only an evaluate stage on held prompts can tell more.")


def last_model(found: Row) -> str:
    """The model an evaluation is about: the last of its list."""
    return str(list(mapping(found, "models"))[-1])


def judge_of(found: Row) -> str | None:
    """The reward that decides: the named judge, else gold, else the first the last model was scored with."""
    names = list(mapping(found, "models", last_model(found), "scores"))
    for wished in (found.get("judge"), found.get("gold"), *names[:1]):
        if isinstance(wished, str):
            return wished
    return None


def overuse(found: Row) -> tuple[str, float, float] | None:
    """(proxy, its gain, gold's gain) where a proxy surely rose while gold surely fell, else None."""
    gold = found.get("gold")
    gains = mapping(found, "models", last_model(found), "gain")
    high = at(gains, str(gold), "mean", "high")
    if not isinstance(gold, str) or high is None or high >= 0:
        return None
    for name in gains:
        low = at(gains, name, "mean", "low")
        if name != gold and low is not None and low > 0:
            return name, at(gains, name, "mean", "estimate") or low, at(gains, gold, "mean", "estimate") or high
    return None


def findings(run: RunFolder) -> list[Finding]:
    """Everything worth saying beside the verdict, worst first."""
    seen = [*_of_evaluation(run), *(f for stage in run.stages for f in _of_stage(stage))]
    seen += [f for stage in run.stages for f in _unlearnt(stage, _broken(run, stage))]
    return sorted(seen, key=lambda f: _ORDER[f.level])


def _of_evaluation(run: RunFolder) -> Iterator[Finding]:
    found = mapping(run.evaluated.evaluation) if run.evaluated else {}
    if found:
        yield from _overused(found)
        yield from _variety(found)
        for name in mapping(found, "reward_models"):
            yield from _reward_model(name, mapping(found, "reward_models", name))
    for note in found.get("notes") or ():
        yield Finding("note", "Noted by the evaluation", str(note))


def _overused(found: Row) -> Iterator[Finding]:
    if seen := overuse(found):
        proxy, gained, lost = seen
        yield Finding(
            "alarm",
            "Reward over-optimisation",
            f"On held prompts the proxy “{proxy}” gained {short(gained)} while gold lost {short(-lost)}. The policy "
            "found what the reward model likes and people would not. Raise the KL coefficient, stop earlier, or "
            "train the reward model on more comparisons.",
        )


def _variety(found: Row) -> Iterator[Finding]:
    name = last_model(found)
    share = at(found, "models", name, "text", "distinct_answers")
    if share is not None and share < 0.5:
        text = f"Only {share:.0%} of the answers of {name} differ from one another."
        yield Finding("warning", "Few different answers", text)


def _reward_model(name: str, page: Row) -> Iterator[Finding]:
    accuracy, low = at(page, "accuracy"), at(page, "by_prompt", "low")
    longer, share = at(page, "longer_wins"), at(page, "truth", "share")
    if accuracy is None or low is None:
        return
    if low <= 0.5:
        text = f"{accuracy:.1%} of held pairs, and its interval reaches ½. What it rewards is mostly noise."
        yield Finding("alarm", f"Reward model “{name}” is not surely better than chance", text)
    elif longer is not None and max(longer, 1 - longer) >= accuracy:
        wins = "longer" if longer >= 0.5 else "shorter"
        text = f"It agrees with {accuracy:.1%} of held pairs; preferring the {wins} answer agrees with as many."
        yield Finding("warning", f"Reward model “{name}” is no better than counting words", text)
    elif share is not None:
        text = f"{accuracy:.1%} of held pairs: {share:.0%} of the way from chance to what the raters' noise allows."
        yield Finding("note", f"Reward model “{name}”", text)


def _of_stage(stage: StageFolder) -> Iterator[Finding]:
    yield from _numbers_lost(stage)
    if "objective/kl" in stage.metric_names:
        yield from _turned(stage)
        yield from _distance(stage)
        yield from _answers(stage)
        yield from _updates(stage)
    if not stage.finished:
        steps = f" It reached step {short(float(stage.metrics[-1]['step']))}." if _has_step(stage) else ""
        text = f"There is no DONE file.{steps} The same command resumes it."
        yield Finding("warning", f"Stage {stage.name} has not finished", text)


def _has_step(stage: StageFolder) -> bool:
    return bool(stage.metrics) and at(stage.metrics[-1], "step") is not None


def _numbers_lost(stage: StageFolder) -> Iterator[Finding]:
    lost = {name: steps[0] for name in stage.metric_names if (steps := stage.broken(name))}
    if lost:
        name, step = min(lost.items(), key=lambda item: item[1])
        more = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
        text = f"{name}{more} stopped being a finite number at step {step:.0f}. Lower the rate, or use float32."
        yield Finding("alarm", f"Numbers were lost in {stage.name}", text)


def _turned(stage: StageFolder) -> Iterator[Finding]:
    turn = turning_point(stage.series("gold/mean"), stage.series("objective/scores"))
    if turn is not None:
        step, best, end = turn
        yield Finding(
            "alarm",
            f"Gold turned down in {stage.name} while the proxy rose",
            f"Gold was best near step {step:.0f} ({short(best)}) and ended at {short(end)}. The checkpoint of about "
            "that step is the better model; a higher KL coefficient or fewer episodes would have stopped there.",
        )


def turning_point(gold: Points, proxy: Points) -> tuple[float, float, float] | None:
    """(step, gold at its best, gold at the end) where gold fell after its best while the proxy rose, else None."""
    wavers = noise_of(gold)
    gold, proxy = smooth(gold), smooth(proxy)
    if len(gold) < 5 or len(proxy) < 5:
        return None
    step, best = max(gold, key=lambda point: point[1])
    began, ended = start_of(gold), end_of(gold)
    spread = max(best - began, 0.5 * (best - min(v for _, v in gold)))
    fell = best - ended > max(_FALL * spread, _NOISE * wavers)
    proxy_then = min(proxy, key=lambda point: abs(point[0] - step))[1]
    rose = end_of(proxy) > max(proxy_then, start_of(proxy))
    return (step, best, ended) if fell and rose and step < gold[-1][0] else None


def _distance(stage: StageFolder) -> Iterator[Finding]:
    kl = smooth(stage.series("objective/kl"))
    if not kl:
        return
    if min(v for _, v in kl) < _KL_BELOW:
        text = f"It fell to {short(min(v for _, v in kl))} nats. Sampling and training use different distributions."
        yield Finding("alarm", f"Negative KL in {stage.name}", text)
    if end_of(kl) > _KL_FAR:
        text = f"{short(end_of(kl))} nats per answer at the end: the policy has left what the reference would say."
        yield Finding("warning", f"Far from the reference in {stage.name}", text)


def unlearning(change: float, broken: Mapping[str, tuple[float, float]]) -> Level | None:
    """What a fall of log π(chosen), in nats per answer, amounts to beside shares of broken answers (before, after).

    A policy trained on pairs can order every one of them and yet unlearn the chosen answers with the rejected ones.
    Whether it then says anything of use shows in its answers alone.
    """
    if change >= _CHOSEN_FELL:
        return None
    return "alarm" if any(after - before > _BROKEN for before, after in broken.values()) else "warning"


def _unlearnt(stage: StageFolder, broken: Mapping[str, tuple[float, float]]) -> Iterator[Finding]:
    change = chosen_change(stage)
    level = None if change is None else unlearning(change, broken)
    if change is None or level is None:
        return
    accuracy = smooth(stage.series("rewards/accuracies"))
    beside = f" at a pair accuracy of {end_of(accuracy):.1%}" if accuracy else ""
    text = f"log π(chosen) lies {short(-change)} nats per answer below where it began{beside}. "
    rose = [f"{name} from {a:.0%} to {b:.0%}" for name, (a, b) in broken.items() if b - a > _BROKEN]
    if level == "alarm":
        text += f"Its answers broke with it: {', '.join(rose)}. "
    else:
        text += "Accuracy cannot tell whether its answers are still good: evaluate them. "
    text += "A lower rate, a larger β or a share of cross-entropy on the chosen answers keeps it up."
    title = "collapsed" if level == "alarm" else "unlearns the chosen answers"
    yield Finding(level, f"The policy of {stage.name} {title}", text)


def chosen_change(stage: StageFolder) -> float | None:
    """Nats per answer that log π(chosen) has moved by, against the reference or, without one, since the first log.

    None where the stage does not log it, or moved by no more than its noise.
    """
    if points := stage.series("logps/chosen_change"):
        return end_of(smooth(points))
    points = stage.series("logps/chosen")
    if len(points) < 2:
        return None
    moved = end_of(smooth(points)) - start_of(smooth(points))
    return moved if abs(moved) > _NOISE * noise_of(points) else None


def _broken(run: RunFolder, stage: StageFolder) -> dict[str, tuple[float, float]]:
    """Shares of broken answers (before, after), as the stage itself saw them or as the run's evaluation did."""
    found: dict[str, tuple[float, float]] = {}
    if ends := smooth(stage.series("response/eos_rate")):
        found["answers cut off"] = (1 - start_of(ends), 1 - end_of(ends))
    page = mapping(run.evaluated.evaluation) if run.evaluated else {}
    first, last = (mapping(page, "models", str(name), "text") for name in (page.get("baseline"), _last(page)))
    for name, key in (("empty answers", "empty_rate"), ("repeated words", "self_repetition")):
        before, after = at(first, key), at(last, key)
        if before is not None and after is not None:
            found[name] = (before, after)
    before, after = at(first, "eos_rate"), at(last, "eos_rate")
    if before is not None and after is not None:
        found.setdefault("answers cut off", (1 - before, 1 - after))
    return found


def _last(page: Row) -> str:
    return last_model(page) if mapping(page, "models") else ""


def _answers(stage: StageFolder) -> Iterator[Finding]:
    entropy, length = (smooth(stage.series(m)) for m in ("objective/entropy", "response/length_mean"))
    if entropy and end_of(entropy) < _ENTROPY_LEFT * start_of(entropy):
        text = f"From {short(start_of(entropy))} to {short(end_of(entropy))} nats: answers hardly vary any more."
        yield Finding("warning", f"Entropy is nearly gone in {stage.name}", text)
    factor = end_of(length) / max(start_of(length), 1e-9) if length else 1.0
    if not 1 / _LENGTH_FACTOR <= factor <= _LENGTH_FACTOR:
        text = f"From {short(start_of(length))} to {short(end_of(length))} tokens. See whether length is what pays."
        yield Finding("warning", f"Answers changed length in {stage.name}", text)
    ends = smooth(stage.series("response/eos_rate"))
    if ends and end_of(ends) < _ENDS and end_of(ends) < start_of(ends):
        text = f"Only {end_of(ends):.0%} end by themselves (at the start {start_of(ends):.0%}); the rest are cut."
        yield Finding("warning", f"Answers stopped ending in {stage.name}", text)


def _updates(stage: StageFolder) -> Iterator[Finding]:
    clipped, foreseen = (smooth(stage.series(m)) for m in ("policy/clipfrac_avg", "val/explained_variance"))
    if clipped and max(v for _, v in clipped) > _CLIPPED:
        text = f"Up to {max(v for _, v in clipped):.0%} of the tokens. Lower the learning rate or the epochs."
        yield Finding("warning", f"Much was clipped in {stage.name}", text)
    if foreseen and end_of(foreseen) < 0:
        text = f"Explained variance ends at {short(end_of(foreseen))}: worse than a constant guess."
        yield Finding("warning", f"The value network foresees nothing in {stage.name}", text)


def _probability(value: float | None) -> str:
    if value is None:
        return "p unknown"
    return "p < 0.001" if value < 0.001 else f"p = {value:.3f}"
