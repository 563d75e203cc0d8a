"""Verdicts and findings: each alarm has a run that trips it and one that does not."""

import json
import random

import pytest

from palate.diagnosis.findings import chosen_change, findings, overuse, turning_point, unlearning, verdict
from palate.diagnosis.run_folder import read


def titles(run, level=None):
    return [f.title for f in findings(run) if level in (None, f.level)]


def rewrite(folder, change):
    """Pass every row of a metrics file through `change`."""
    path = folder / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(change(i, dict(row))) + "\n" for i, row in enumerate(rows)))


def test_a_good_run_is_called_better_without_alarms(write_run):
    run = read(write_run())
    judged = verdict(run)
    assert (judged.level, judged.title) == ("good", "It got better.")
    assert "160 held prompts under the true utility" in judged.text
    assert "p < 0.001" in judged.text
    assert titles(run, "alarm") == []


def test_a_hacked_run_is_called_over_optimised_loudly(write_run):
    run = read(write_run(hacked=True))
    judged = verdict(run)
    assert (judged.level, judged.title) == ("alarm", "The proxy was over-optimised.")
    assert titles(run, "alarm")[:2] == ["Reward over-optimisation", "Gold turned down in rlhf while the proxy rose"]


def an_evaluation(low, high, gold=(0.1, 0.5), proxy=(0.1, 0.5)):
    def gain(ends):
        return {"mean": {"estimate": sum(ends) / 2, "low": ends[0], "high": ends[1]}}

    rate = {"estimate": (low + high) / 2, "low": low, "high": high, "p_value": 0.04}
    scores = {"gold": {}, "proxy": {}}
    after = {"scores": scores, "win_rate": {"gold": {"rate": rate}}, "gain": {"gold": gain(gold), "proxy": gain(proxy)}}
    return {"baseline": "sft", "gold": "gold", "prompts": 9, "models": {"sft": {}, "ppo": after}}


@pytest.mark.parametrize(
    ("low", "high", "title"),
    [(0.51, 0.7, "It got better."), (0.3, 0.49, "It got worse."), (0.45, 0.6, "No clear difference.")],
)
def test_the_verdict_goes_by_the_interval_not_by_the_estimate(write_run, low, high, title):
    folder = write_run()
    (folder / "4-evaluate" / "evaluation.json").write_text(json.dumps(an_evaluation(low, high)))
    assert verdict(read(folder)).title == title


def test_over_optimisation_needs_both_to_be_sure():
    assert overuse(an_evaluation(0.4, 0.6, gold=(-0.5, -0.1))) == ("proxy", 0.3, -0.3)
    assert overuse(an_evaluation(0.4, 0.6, gold=(-0.5, 0.1))) is None
    assert overuse(an_evaluation(0.4, 0.6, gold=(-0.5, -0.1), proxy=(-0.1, 0.2))) is None
    assert overuse({**an_evaluation(0.4, 0.6, gold=(-0.5, -0.1)), "gold": None}) is None


def test_the_turning_point_is_where_gold_was_best():
    rising = [(i, i / 10) for i in range(100)]
    hill = [(i, -((i - 40) ** 2) / 400) for i in range(100)]
    step, best, end = turning_point(hill, rising)
    assert step == pytest.approx(40, abs=3)
    assert best > end
    assert turning_point(rising, rising) is None
    falling_proxy = [(i, -i / 10) for i in range(100)]
    assert turning_point(hill, falling_proxy) is None


def test_noise_about_a_level_gold_is_no_turning_point():
    rising = [(i, i / 10) for i in range(100)]
    for seed in range(100):
        draw = random.Random(seed)
        flat = [(i, draw.gauss(0, 1)) for i in range(100)]
        assert turning_point(flat, rising) is None


TRIPPED = [
    ("objective/kl", lambda i: -1.0, "Negative KL in rlhf"),
    ("objective/kl", lambda i: 0.5 * i, "Far from the reference in rlhf"),
    ("objective/entropy", lambda i: 20.0 / (i + 1), "Entropy is nearly gone in rlhf"),
    ("response/length_mean", lambda i: 20.0 + i, "Answers changed length in rlhf"),
    ("response/eos_rate", lambda i: 0.9 - i / 150, "Answers stopped ending in rlhf"),
    ("policy/clipfrac_avg", lambda i: 0.5, "Much was clipped in rlhf"),
    ("val/explained_variance", lambda i: -0.4, "The value network foresees nothing in rlhf"),
]


@pytest.mark.parametrize(("metric", "value", "title"), TRIPPED)
def test_each_curve_out_of_bounds_is_said(write_run, metric, value, title):
    folder = write_run()
    assert title not in titles(read(folder))
    rewrite(folder / "3-rlhf", lambda i, row: {**row, metric: value(i)})
    assert title in titles(read(folder))


def on_pairs(folder, change, accuracy=0.998, name="logps/chosen_change"):
    """The reward stage of a run as one that trained a policy on pairs."""
    rewrite(folder / "2-reward", lambda i, row: {"step": row["step"], name: change(i), "rewards/accuracies": accuracy})


def text_of(folder, **after):
    """An evaluation whose last model's answers are as said; a good model's are in `before`."""
    before = {"empty_rate": 0.0, "self_repetition": 0.02, "eos_rate": 0.98}
    models = {"sft": {"text": before}, "pairs": {"text": {**before, **after}}}
    page = {**an_evaluation(0.6, 0.7), "models": models}
    (folder / "4-evaluate" / "evaluation.json").write_text(json.dumps(page))


def about_chosen(folder):
    return [f for f in findings(read(folder)) if "The policy of reward" in f.title]


def test_a_fall_of_the_chosen_answers_is_a_warning_beside_the_accuracy(write_run):
    folder = write_run()
    on_pairs(folder, lambda i: -12.0 * i / 29)
    (found,) = about_chosen(folder)
    assert (found.level, found.title) == ("warning", "The policy of reward unlearns the chosen answers")
    assert "11.6 nats per answer below" in found.text
    assert "accuracy of 99.8%" in found.text


@pytest.mark.parametrize("change", [lambda i: -4.9 * i / 29, lambda i: 3.0, lambda i: 0.0])
def test_a_small_fall_or_a_rise_is_no_finding(write_run, change):
    folder = write_run()
    on_pairs(folder, change)
    text_of(folder, empty_rate=0.9)
    assert about_chosen(folder) == []


@pytest.mark.parametrize("broken", [{"empty_rate": 0.3}, {"self_repetition": 0.5}, {"eos_rate": 0.4}])
def test_it_is_an_alarm_where_answers_break_with_it(write_run, broken):
    folder = write_run()
    on_pairs(folder, lambda i: -40.0 * i / 29)
    text_of(folder)
    assert [f.level for f in about_chosen(folder)] == ["warning"]
    text_of(folder, **broken)
    (found,) = about_chosen(folder)
    assert (found.level, found.title) == ("alarm", "The policy of reward collapsed")
    assert "broke with it: " in found.text


def test_without_a_reference_the_fall_since_the_start_counts_beyond_its_noise(write_run):
    folder = write_run()
    draw = random.Random(1)
    noise = [draw.gauss(0, 6) for _ in range(30)]
    on_pairs(folder, lambda i: -60.0 + noise[i], name="logps/chosen")
    assert chosen_change(read(folder).stages[1]) is None
    on_pairs(folder, lambda i: -60.0 - i + noise[i] / 10, name="logps/chosen")
    assert chosen_change(read(folder).stages[1]) == pytest.approx(-27, abs=2)
    assert [f.level for f in about_chosen(folder)] == ["warning"]


def test_the_alarm_asks_for_both():
    assert unlearning(-39.4, {"invalid": (0.06, 0.90)}) == "alarm"
    assert unlearning(-14.5, {"invalid": (0.18, 0.19)}) == "warning"
    assert unlearning(-14.5, {}) == "warning"
    assert unlearning(-4.9, {"invalid": (0.0, 1.0)}) is None
    assert unlearning(0.9, {"invalid": (0.2, 0.05)}) is None


def test_numbers_that_were_lost_are_an_alarm_with_their_step(write_run):
    folder = write_run()
    rewrite(folder / "1-sft", lambda i, row: {**row, "loss": None} if i == 7 else row)
    found = next(f for f in findings(read(folder)) if f.title == "Numbers were lost in sft")
    assert found.level == "alarm"
    assert "step 80" in found.text


def test_a_stage_without_done_is_said_to_be_resumable(write_run):
    folder = write_run()
    (folder / "3-rlhf" / "DONE").unlink()
    found = next(f for f in findings(read(folder)) if "rlhf has not finished" in f.title)
    assert "step 120" in found.text


def reward_page(accuracy, low, longer):
    return {"accuracy": accuracy, "by_prompt": {"low": low, "high": 0.9}, "longer_wins": longer}


@pytest.mark.parametrize(
    ("page", "level", "words"),
    [
        (reward_page(0.52, 0.48, 0.5), "alarm", "not surely better than chance"),
        (reward_page(0.60, 0.55, 0.61), "warning", "no better than counting words"),
        (reward_page(0.60, 0.55, 0.38), "warning", "no better than counting words"),
        (reward_page(0.70, 0.65, 0.5), None, ""),
    ],
)
def test_reward_models_are_held_to_chance_and_to_length(write_run, page, level, words):
    folder = write_run()
    found = {**an_evaluation(0.6, 0.7), "reward_models": {"proxy": page}}
    (folder / "4-evaluate" / "evaluation.json").write_text(json.dumps(found))
    said = [(f.level, f.title) for f in findings(read(folder)) if "Reward model" in f.title]
    assert [s[0] for s in said] == ([level] if level else [])
    assert all(words in title for _, title in said)


def test_findings_come_worst_first(write_run):
    folder = write_run(hacked=True)
    (folder / "1-sft" / "DONE").unlink()
    levels = [f.level for f in findings(read(folder))]
    assert levels == sorted(levels, key=["alarm", "warning", "good", "note"].index)


def test_without_evaluation_the_verdict_claims_nothing(write_run):
    assert verdict(read(write_run("curves", stages=("sft", "reward", "rlhf")))).title == "Trained, not evaluated."
    assert verdict(read(write_run("start", stages=("sft",)))).title == "No evaluation yet."
    assert verdict(read(write_run("empty", stages=()))).title == "Nothing has run yet."


def test_reward_models_alone_are_a_verdict_too(write_run):
    folder = write_run("start", stages=("sft",))
    judged = {"interval": {"estimate": 0.75, "low": 0.7, "high": 0.8}, "pairs": 300}
    (folder / "1-sft" / "evaluation.json").write_text(json.dumps({"models": {}, "reward_models": {"polite": judged}}))
    said = verdict(read(folder))
    assert said.title == "Reward models were measured."
    assert said.text == "polite orders 75.0% of 300 held pairs (95 % interval 70.0% to 80.0%)."
