"""Every shape of rows, written by hand: which format is found, and what the record says."""

import pytest

from palate.data.formats import FORMATS, Row, catalogue, detect, read_rows
from palate.records import Correction, Demonstration, Message, Prompt, Ranking, Rated, Unpaired
from palate.settings import PalateError


def only(columns, name="auto"):
    ((format, record),) = read_rows([Row(columns, "f.jsonl:1")], name)
    return format.name, record


def says(role, content):
    return Message(role, content)


HI = [{"role": "user", "content": "Hi"}]
HELLO = [{"role": "assistant", "content": "Hello"}]
GO = [{"role": "assistant", "content": "Go"}]
U, A, B = says("user", "Hi"), says("assistant", "Hello"), says("assistant", "Go")


def test_plain_text_is_its_own_group_and_keeps_its_columns():
    name, record = only({"text": "once", "stars": 9})
    assert name == "text"
    assert (record.prompt, record.completion, record.columns) == ("", "once", {"stars": 9})
    _, other = only({"text": "twice"})
    assert record.key != other.key


def test_labelled_text_is_never_guessed_but_can_be_asked_for():
    assert only({"text": "fine", "label": 1})[0] == "text"
    _, record = only({"text": "fine", "label": 0}, "labelled_text")
    assert isinstance(record, Unpaired)
    assert (record.completion, record.label) == ("fine", False)


def test_messages_split_before_the_last_assistant_turn():
    name, record = only({"messages": [*HI, *HELLO, *HI, *GO, *HI]})
    assert name == "messages"
    assert isinstance(record, Demonstration)
    assert (record.prompt, record.completion) == ((U, A, U), (B,))


def test_openai_chat_parts_and_developer_role():
    turns = [{"role": "developer", "content": [{"type": "text", "text": "Be "}, {"type": "text", "text": "kind"}]}]
    _, record = only({"messages": [*turns, *HI, *HELLO]})
    assert record.prompt == (says("system", "Be kind"), U)


def test_sharegpt_roles_are_brought_to_ours():
    turns = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
    name, record = only({"conversations": turns, "system": "Short."})
    assert name == "sharegpt"
    assert (record.prompt, record.completion) == ((says("system", "Short."), U), (A,))


def test_prompt_only_in_both_forms():
    assert only({"prompt": "Hi"}) == ("prompt", Prompt("Hi"))
    assert only({"prompt": HI})[1].prompt == (U,)


@pytest.mark.parametrize(
    ("prompt", "completion", "expected"),
    [
        ("Hi", "Hello", ("Hi", "Hello")),
        (HI, HELLO, ((U,), (A,))),
        ("Hi", HELLO, ((U,), (A,))),
        (HI, "Hello", ((U,), (A,))),
        (HI, [*HI, *HELLO], ((U,), (A,))),
    ],
)
def test_prompt_and_completion_take_one_form(prompt, completion, expected):
    name, record = only({"prompt": prompt, "completion": completion, "extra": 3})
    assert name == "prompt_completion"
    assert (record.prompt, record.completion) == expected
    assert record.columns == {"extra": 3}


def test_explicit_preference_with_margin():
    name, record = only({"prompt": "Q", "chosen": "good", "rejected": "bad", "margin": 2})
    assert name == "preference"
    assert record == Ranking("Q", {}, "", ("good", "bad"), (0, 1), 2.0)


def test_preference_whose_answers_repeat_the_prompt():
    _, record = only({"prompt": "Hi", "chosen": [*HI, *HELLO], "rejected": [*HI, *GO]})
    assert (record.prompt, record.completions) == ((U,), ((A,), (B,)))


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [
        ("The sky is blue.", "The sky is black.", "The sky is"),
        ("Q: hi\nA: yes", "Q: hi\nA: no", "Q: hi\nA:"),
        ("Q: hi\nA: yes", "Q: hi\nA: yes please", "Q: hi\nA:"),
        ("今天天气好", "今天天气坏", "今天天气"),
        ("same", "same", ""),
        ("alpha", "beta", ""),
        ("a blue", "a bl!", "a"),
        ("a bl!", "a blue", "a"),
    ],
)
def test_implicit_prompt_is_the_common_prefix_in_whole_words(chosen, rejected, prompt):
    name, record = only({"chosen": chosen, "rejected": rejected})
    assert name == "implicit_preference"
    assert record.prompt == prompt
    assert tuple(prompt + answer for answer in record.completions) == (chosen, rejected)


def test_implicit_prompt_of_conversations():
    _, record = only({"chosen": [*HI, *HELLO, *HI, *GO], "rejected": [*HI, *HELLO, *HI, *HELLO]})
    assert (record.prompt, record.completions) == ((U, A, U), ((B,), (A,)))


def test_unpaired_label_and_its_conversational_form():
    name, record = only({"prompt": "Q", "completion": "A", "label": False})
    assert (name, record) == ("unpaired", Unpaired("Q", {}, "", "A", False))
    name, record = only({"messages": [*HI, *HELLO], "label": True})
    assert (name, record) == ("conversation_unpaired", Unpaired((U,), {}, "", (A,), True))
    name, record = only({"messages": [*HI, *HELLO], "kto_tag": "false"})
    assert (name, record.label) == ("conversation_unpaired", False)


def test_steps_are_thumbs_given_the_steps_before():
    row = Row({"prompt": "2+2*3?", "completions": ["2*3=6", "2+6=9"], "labels": [True, False]}, "f:1")
    first, second = [record for _, record in read_rows([row])]
    assert (first.prompt, first.completion, first.label) == ("2+2*3?", "2*3=6", True)
    assert (second.prompt, second.completion, second.label) == ("2+2*3?2*3=6\n", "2+6=9", False)
    assert first.key == second.key


@pytest.mark.parametrize(
    ("column", "given", "ranks"),
    [
        ("ranks", [2, 1, 1], (1, 0, 0)),
        ("ranking", [1, [0, 2]], (1, 0, 1)),
        ("scores", [0.1, 9, 0.1], (1, 0, 1)),
    ],
)
def test_rankings_are_stored_whole_with_ties(column, given, ranks):
    name, record = only({"prompt": "Q", "completions": ["a", "b", "c"], column: given})
    assert name == "ranking"
    assert record == Ranking("Q", {}, "", ("a", "b", "c"), ranks)


def test_ranking_of_a_reply_tree_keeps_its_tree_as_group():
    columns = {"messages": HI, "completions": [{"text": "Hello"}, {"text": "Go"}], "ranks": [0, 1], "tree": "t1"}
    _, record = only(columns)
    assert (record.prompt, record.completions, record.group) == ((U,), ((A,), (B,)), "t1")


def test_reply_tree_pairs_and_llama_factory_objects():
    name, record = only({"messages": HI, "chosen": "Hello", "rejected": "Go", "rank_gap": 2, "tree": "t"})
    assert name == "conversation_preference"
    assert (record.prompt, record.completions, record.margin, record.key) == ((U,), ((A,), (B,)), 2.0, "t")
    turn = {"from": "gpt", "value": "Hello"}
    _, record = only({"conversations": HI, "chosen": turn, "rejected": {"from": "gpt", "value": "Go"}})
    assert record.completions == ((A,), (B,))


def test_rating_and_correction():
    assert only({"prompt": "Q", "completion": "A", "rating": "3.5"}) == ("rated", Rated("Q", {}, "", "A", 3.5))
    name, record = only({"prompt": "Q", "original": "red", "corrected": "blue", "spans": [[0, 4]]})
    assert (name, record) == ("correction", Correction("Q", {}, "", "red", "blue", ((0, 4),)))


def test_alpaca_with_input_history_and_system():
    columns = {"instruction": "Add", "input": "1 2", "output": "3", "history": [["Hi", "Hello"]], "system": "Short."}
    name, record = only(columns)
    assert name == "alpaca"
    assert record.prompt == (says("system", "Short."), U, A, says("user", "Add\n1 2"))
    assert record.completion == (says("assistant", "3"),)


def test_alpaca_relatives():
    assert only({"instruction": "Add", "note": 1}) == ("instruction", Prompt((says("user", "Add"),), {"note": 1}))
    name, record = only({"instruction": "Hi", "input": "", "output": "Hello", "chosen": "Hello", "rejected": "Go"})
    assert (name, record.completions, record.columns) == ("alpaca_preference", ((A,), (B,)), {"output": "Hello"})
    name, record = only({"instruction": "Hi", "input": "", "output": ["Hello", "Go"], "history": []})
    assert (name, record.completions, record.ranks) == ("alpaca_ranking", ((A,), (B,)), (0, 1))


@pytest.mark.parametrize(
    ("preference", "completions", "ranks"),
    [(1.9, ((B,), (A,)), (0, 1)), (1.0, ((A,), (B,)), (0, 1)), (1.5, ((A,), (B,)), (0, 0))],
)
def test_alpaca_eval_preferences(preference, completions, ranks):
    columns = {"instruction": "Hi", "output_1": "Hello", "output_2": "Go", "preference": preference}
    name, record = only(columns)
    assert (name, record.completions, record.ranks) == ("alpaca_eval", completions, ranks)


def test_questions_seed_tasks_and_summaries():
    name, record = only({"question": "1+1?", "answer": "2"})
    assert (name, record.prompt, record.completion, record.columns) == ("question_answer", "1+1?", "2", {"answer": "2"})
    task = {"instruction": "Add", "instances": [{"input": "1 2", "output": "3"}, {"input": "", "output": "?"}], "id": 4}
    found = list(read_rows([Row(task, "f:1")]))
    assert [f.name for f, _ in found] == ["seed_tasks"] * 2
    assert [r.prompt[0].content for _, r in found] == ["Add\n1 2", "Add"]
    assert found[0][1].key == found[1][1].key
    ((_, first), (_, second)) = read_rows([Row({"source": ["A.", "B."], "target": ["x", "y"]}, "f:1")])
    assert (first.prompt, first.completion, second.completion) == ("A. B.", "x", "y")
    assert first.key == second.key


def test_nulls_count_as_absent():
    assert only({"prompt": "Q", "completion": "A", "label": None, "chosen": None})[0] == "prompt_completion"


def test_ambiguous_columns_name_the_candidates():
    row = Row({"prompt": "Q", "completion": "A", "chosen": "B", "rejected": "C"}, "f.jsonl:1")
    with pytest.raises(PalateError, match=r"f\.jsonl:1: .* fit prompt_completion .* or preference .*format: "):
        detect(row)
    assert only(dict(row.columns), "preference")[1].completions == ("B", "C")


def test_unknown_columns_name_the_nearest_format_and_the_way_out():
    with pytest.raises(PalateError, match=r"columns promt, completion\. Nearest: prompt_completion .*needs prompt"):
        detect(Row({"promt": "Q", "completion": "A"}, "f:1"))
    with pytest.raises(PalateError, match=r"columns: \{prompt: OLD_NAME"):
        detect(Row({}, "f:1"))


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"prompt": "Q", "completion": 5}, r"f\.jsonl:1: completion: expected text or a list of turns, got int 5"),
        ({"prompt": "Q", "completion": "half \ud800"}, "completion: holds half of a character"),
        ({"messages": [{"role": "usr", "content": "x"}]}, r"messages\[0\]\.role: .*'usr'.*Did you mean 'user'"),
        ({"messages": HI}, "no turn is the assistant's"),
        ({"messages": []}, "messages: expected a list with at least one item"),
        ({"messages": [{"role": "assistant", "content": None, "tool_calls": [1]}]}, "tool calls"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "Pictures are not read"),
        ({"prompt": "Q", "images": ["x.png"]}, "images: this row comes with pictures"),
        ({"prompt": "Q", "completion": HI}, "the last turn is said by user"),
        ({"prompt": "Q", "chosen": "a", "rejected": "b", "margin": "much"}, "margin: expected a number"),
        ({"prompt": "Q", "completions": ["a"], "ranks": [0]}, "at least two answers"),
        ({"prompt": "Q", "completions": ["a", "b"], "ranks": [0]}, "ranks: expected 2, one per completion, got 1"),
        ({"prompt": "Q", "completions": ["a", "b"], "ranking": [0, 0]}, "places answer 0 twice"),
        ({"prompt": "Q", "completions": ["a", "b"], "ranking": [0]}, r"does not place the answers \[1\]"),
        ({"prompt": "Q", "completions": ["a", "b"], "ranking": [0, 2]}, "from 0 to 1"),
        ({"prompt": "Q", "completions": ["a"], "labels": [True, False]}, "labels: expected 1"),
        ({"instruction": "Q", "output_2": "b", "preference": 1.2}, "options: {baseline: FILE}"),
        ({"instruction": "Q", "output_1": "a", "output_2": "b", "preference": 3}, "from 1 to 2"),
        ({"prompt": "Q", "original": "a", "corrected": "b", "spans": [[3, 1]]}, "runs from 3 to 1"),
    ],
)
def test_a_faulty_row_names_place_field_and_next_move(columns, expected):
    with pytest.raises(PalateError, match=expected) as caught:
        only(columns)
    assert str(caught.value).startswith("f.jsonl:1")


def test_a_later_row_without_the_columns_is_named():
    rows = [Row({"prompt": "Q", "completion": "A"}, "f:1"), Row({"prompt": "Q"}, "f:2")]
    with pytest.raises(PalateError, match=r"f:2: completion: is missing; this row has the columns prompt"):
        list(read_rows(rows))
    bad = []
    assert len(list(read_rows(rows, bad=bad))) == 1
    assert [row.message for row in bad] == [
        "f:2: completion: is missing; this row has the columns prompt. Fill it in or remove the row."
    ]


def test_an_unknown_format_gets_the_nearest_name():
    with pytest.raises(PalateError, match="Did you mean 'alpaca'"):
        list(read_rows([], "alpacca"))


def test_every_format_has_a_name_of_its_own_and_a_meaning():
    assert len({f.name for f in FORMATS}) == len(FORMATS)
    assert all(name and shape and meaning for name, shape, meaning in catalogue())
