"""Cards, the table and the reward-model page say what the evaluation found."""

import json

from palate.diagnosis import numbers
from palate.diagnosis.run_folder import read


def evaluation(write_run):
    folder = write_run()
    return json.loads((folder / "4-evaluate" / "evaluation.json").read_text()), read(folder).evaluated.evaluation


def test_cards_hold_the_key_numbers_and_their_direction(write_run):
    raw, found = evaluation(write_run)
    cards = {card.name: card for card in numbers.cards(found)}
    rate = raw["models"]["ppo"]["win_rate"]["gold"]["rate"]["estimate"]
    assert cards["Win rate"].value == numbers.percent(rate)
    assert cards["Win rate"].mood == "good"
    assert cards["Facts invented per answer"].mood == "good"
    assert cards["KL"].value == "4.61"
    assert cards["gold (true utility)"].mood == "good"
    assert cards["Reward model proxy"].value == numbers.percent(raw["reward_models"]["proxy"]["accuracy"])


def test_the_table_has_every_model_and_no_row_of_dashes(write_run):
    _, found = evaluation(write_run)
    table = numbers.table(found)
    assert table.models == ("sft", "ppo")
    rows = dict(table.rows)
    assert rows["KL, nats per answer"] == ("–", "4.61")
    assert "ROUGE-1" not in rows
    assert all(any(cell != "–" for cell in cells) for cells in rows.values())


def test_the_reward_page_draws_accuracy_calibration_and_length(write_run):
    _, found = evaluation(write_run)
    [(name, sentence, figures)] = numbers.reward_pages(found)
    assert name == "proxy"
    assert "400 held pairs" in sentence
    assert [figure.title for figure in figures] == ["Accuracy", "Calibration", "Length bias"]
    assert "longer wins" in figures[0].drawing


def test_what_was_not_measured_is_left_out():
    bare = {"models": {"sft": {"scores": {}}}, "baseline": "sft", "reward_models": {"proxy": {}}}
    assert numbers.cards(bare) == []
    assert numbers.table(bare).rows == ()
    assert numbers.reward_pages(bare) == [("proxy", "", [])]


def test_change_and_difference_in_words():
    assert numbers.change(0.5, 0.75, numbers.percent) == "50% → 75%"
    assert numbers.change(0.5, 0.5001, numbers.percent) == "50%"
    assert numbers.moved(0.5, 0.75, numbers.percent) == "+25 points"
    assert numbers.moved(2.0, 1.5, lambda v: f"{v:.1f}") == "−0.5"
    assert numbers.moved(2.0, 2.0, lambda v: f"{v:.1f}") == "unchanged"
