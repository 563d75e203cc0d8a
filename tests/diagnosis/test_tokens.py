"""tokens.jsonl read back: columns, sums and the place behind the answer."""

import json

import pytest

from palate.diagnosis import tokens
from palate.diagnosis.run_folder import read


@pytest.fixture
def stage(write_run):
    return read(write_run(stages=("sft", "reward", "rlhf"))).stages[2]


def test_the_steps_and_their_answers_come_in_order(stage):
    found = tokens.steps(stage)
    assert {step: [answer.row for answer in answers] for step, answers in found.items()} == {
        1: [0, 1],
        60: [0, 1],
        120: [0, 1],
    }


def test_an_answer_knows_its_prompt_its_tokens_and_the_place_behind(stage):
    answer = tokens.steps(stage)[1][0]
    assert [t["t"] for t in answer.asked] == [0, 1]
    assert [t["t"] for t in answer.said] == [2, 3, 4]
    assert answer.length == 2
    assert tokens.text_of(answer.said[-1]) == "(state after)"
    assert tokens.how_long(answer) == "2 tokens, ended by itself"


def test_sums_are_over_the_cells_that_have_the_number(stage):
    answer = tokens.steps(stage)[1][0]
    assert answer.sums() == pytest.approx(
        {"sampled_logp": -3, "old_logp": -3, "reference_logp": -2.5, "kl": -0.5, "kl_penalty": 0.025, "score": 1.5,
         "reward": 1.525}
    )  # fmt: skip
    assert answer.means()["kl"] == -0.25  # two tokens were said
    assert answer.means()["return"] == pytest.approx(3.5 / 3)  # three states are valued


def test_rewards_per_token_have_a_column_only_where_some_were_given(stage):
    answers = tokens.steps(stage)[1]
    assert "given" not in [column.title for column in tokens.columns(answers)]
    answers[0].tokens[2]["token_reward"] = -0.5
    assert "given" in [column.title for column in tokens.columns(answers)]


def test_a_number_nobody_named_is_shown_under_its_own_name(stage):
    answers = tokens.steps(stage)[1]
    answers[0].tokens[2]["surprise"] = 4.0
    assert tokens.columns(answers)[-1].title == "surprise"
    assert answers[0].means()["surprise"] == 4.0
    assert "surprise" not in answers[0].sums()


def test_a_number_that_was_none_is_left_out_of_sums(stage):
    answer = tokens.steps(stage)[1][0]
    answer.tokens[2]["kl"] = None
    assert answer.sums()["kl"] == -0.75


def test_broken_lines_and_rows_are_passed_over(write_run):
    folder = write_run(stages=("rlhf",))
    file = folder / "1-rlhf" / "tokens.jsonl"
    whole = file.read_text().splitlines()[0]
    odd = [
        {"step": "x", "row": 0, "tokens": []},
        {"step": 2, "row": 0, "tokens": 3},
        {"step": 3, "row": 0, "tokens": [1]},
    ]
    file.write_text("\n".join([whole, *map(json.dumps, odd), whole[:80]]))
    found = tokens.steps(read(folder).stages[0])
    assert list(found) == [1, 3]
    assert tokens.as_json(found[3][0])["sums"] == {}


def test_text_is_made_visible_and_inert_for_a_terminal():
    assert tokens.visible("a\nb\tc") == "a⏎b⇥c"
    assert tokens.visible("\x1b[31m \u202e \ud83d é 味") == "\\x1b[31m \\u202e \\ud83d é 味"
    assert [tokens.spelled({"id": 1, "text": t}) for t in (" a b ", "  ", "")] == ["␣a b␣", "␣␣", ""]
