"""Published feedback sets: their rows as their authors wrote them."""

import pytest

from palate.data.formats import Row, read_rows
from palate.records import Demonstration, Message, Prompt, Ranking
from palate.settings import PalateError


def only(columns, name="auto"):
    ((format, record),) = read_rows([Row(columns, "f.jsonl:7")], name)
    return format.name, record


HUMAN = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Why?\n\nAssistant:"
TURNS = (Message("user", "Hi"), Message("assistant", "Hello"), Message("user", "Why?"))


def test_transcripts_share_all_but_the_last_turn():
    name, record = only({"chosen": f"{HUMAN} Because.", "rejected": f"{HUMAN} Go away."})
    assert name == "transcripts"
    assert record.prompt == TURNS
    assert record.completions == ((Message("assistant", "Because."),), (Message("assistant", "Go away."),))


def test_an_answer_in_two_breaths_is_one_turn_and_may_be_empty():
    _, record = only({"chosen": f"{HUMAN} A\n\nAssistant: B", "rejected": f"{HUMAN} "})
    assert [answer[0].content for answer in record.completions] == ["A\n\nB", ""]


def test_a_speaker_inside_a_line_is_not_a_turn():
    _, record = only({"chosen": f"{HUMAN} Human: is a word", "rejected": f"{HUMAN} no"})
    assert record.completions[0][0].content == "Human: is a word"


def test_transcripts_that_part_earlier_are_refused():
    other = HUMAN.replace("Why?", "What?")
    with pytest.raises(PalateError, match=r"f\.jsonl:7: chosen/rejected: the dialogues part .*at turn 3"):
        only({"chosen": f"{HUMAN} a", "rejected": f"{other} b"})
    with pytest.raises(PalateError, match="a transcript begins with Human"):
        only({"chosen": "no speaker", "rejected": "none"}, "transcripts")


POST = {"subreddit": "tifu", "title": "T", "post": "P {x}"}
QUERY = "SUBREDDIT: r/tifu\n\nTITLE: T\n\nPOST: P {x}\n\nTL;DR:"


def test_summary_comparisons_build_the_query_and_put_the_choice_first():
    summaries = [{"text": " one", "policy": "sup1"}, {"text": " two", "policy": "ref"}]
    name, record = only({"info": {"id": "t3", **POST}, "summaries": summaries, "choice": 1, "worker": "w"})
    assert name == "summary_comparison"
    assert (record.prompt, record.completions, record.ranks) == (QUERY, (" two", " one"), (0, 1))
    assert record.columns["policies"] == ["ref", "sup1"]
    news = {"info": {"article": "Long.", "post": None}, "summaries": summaries, "choice": 0}
    assert only(news)[1].prompt == "Article:\nLong.\n\nTL;DR:\n"
    with pytest.raises(PalateError, match="choice: expected a whole number from 0 to 1"):
        only({**news, "choice": 2})


def test_tldr_posts_and_finished_queries():
    name, record = only({"id": "t3", **POST, "summary": "short"})
    assert (name, type(record), record.prompt, record.completion) == ("tldr_post", Demonstration, QUERY, "short")
    assert type(only(POST)[1]) is Prompt
    name, record = only({"prompt": QUERY, "label": "short"})
    assert (name, record.prompt, record.completion) == ("tldr_label", QUERY, "short")


def test_best_of_four_as_text_and_as_stored_tokens():
    samples = {f"sample{i}": t for i, t in enumerate("abcd")}
    name, record = only({"query": "q", **samples, "best": 2})
    assert name == "human_preferences"
    assert (record.completions, record.ranks) == (("a", "b", "c", "d"), (1, 1, 0, 1))
    stored = {f"sample{i}": [i, 13, 50259] for i in range(4)}
    _, record = only({"query": [7, 50259, 50259], **stored, "best": 0})
    assert record.columns["prompt_tokens"] == [7]
    assert record.columns["completion_tokens"] == [[i, 13] for i in range(4)]
    with pytest.raises(PalateError, match="best: expected a whole number from 0 to 3"):
        only({"query": "q", **samples, "best": 4})


@pytest.mark.parametrize(
    ("winner", "ranks"), [("model_a", (0, 1)), ("model_b", (1, 0)), ("tie", (0, 0)), ("tie (bothbad)", (0, 0))]
)
def test_arena_votes(winner, ranks):
    models = {"model_a": "x", "model_b": "y", "winner": winner}
    ask, a, b = ({"role": r, "content": c} for r, c in (("user", "Hi"), ("assistant", "A"), ("assistant", "B")))
    name, record = only({**models, "conversation_a": [ask, a], "conversation_b": [ask, b]})
    assert (name, record.prompt, record.ranks) == ("arena", (Message("user", "Hi"),), ranks)
    assert record.columns == {"model_a": "x", "model_b": "y"}
    _, record = only({**models, "prompt": "Hi", "response_a": "A", "response_b": "B"})
    assert (record.prompt, record.completions, record.ranks) == ("Hi", ("A", "B"), ranks)


def test_arena_votes_without_answers_are_refused():
    with pytest.raises(PalateError, match="votes without the answers"):
        only({"model_a": "x", "model_b": "y", "winner": "tie"})
    with pytest.raises(PalateError, match="expected a side or a tie, got 'nobody'"):
        only({"model_a": "x", "model_b": "y", "winner": "nobody"})


def test_rlhf_v_reads_the_text_and_says_so():
    columns = {"image": {"bytes": b"x"}, "question": "What?", "chosen": "A cat", "rejected": "A dog", "segments": []}
    ((format, record),) = read_rows([Row(columns, "f:1")])
    assert (format.name, record.prompt, record.completions) == ("picture_preference", "What?", ("A cat", "A dog"))
    assert "image" not in record.columns
    assert "pictures have their own issue" in format.note
    nested = {"image": {}, "text": '{"question": "What?", "chosen": "A cat", "rejected": "A dog"}', "idx": 3}
    _, record = only(nested)
    assert isinstance(record, Ranking)
    assert (record.prompt, record.columns) == ("What?", {"idx": 3})
