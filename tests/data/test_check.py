"""`palate data check`: what it finds, in words and as JSON."""

import json

import pytest

from palate.data.check import check, check_data, report_dict, report_text
from palate.data.source import Data
from palate.models.tokenizer import train_bpe
from palate.records import Demonstration, Prompt, Ranking, Unpaired, preference
from palate.settings import PalateError

TOKENIZER = train_bpe(["one two three four five"], 300)


def test_counts_of_pairs():
    records = [
        preference("p", "long answer", "short"),
        preference("p", "a", "bb"),
        preference("q", "same", "same"),
        Ranking("r", {}, "", ("x", "yy", "zzz"), (0, 0, 1)),
        preference("p", "long answer", "short"),
    ]
    report = check(records)
    assert (report.records, report.prompts, report.duplicates) == (5, 3, 1)
    assert (report.pairs, report.ties, report.chosen_is_rejected) == (7, 1, 1)
    assert report.longer_is_better == pytest.approx((1 + 0 + 0.5 + 0 + 0 + 1) / 6)
    assert not report.healthy


def test_empty_fields_labels_and_lengths():
    records = [Unpaired("", completion=" ", label=True), Unpaired("two words", completion="a b c", label=False)]
    report = check(records, max_length=4)
    assert (report.empty_prompts, report.empty_answers) == (1, 1)
    assert report.labels == {"true": 1, "false": 1}
    assert report.length_unit == "words"
    assert report.answer_lengths["longest"] == 3
    assert report.over_long == 0.5
    assert report.double_bos is None


def test_with_a_tokenizer_lengths_are_tokens_and_masks_are_looked_at():
    records = [Demonstration("one two three", completion="four"), Demonstration("one", completion="two")]
    longest = len(TOKENIZER.encode("one two three"))
    report = check(records, TOKENIZER, max_length=longest)
    assert report.length_unit == "tokens"
    assert report.prompt_lengths["longest"] == longest
    assert report.untrained == 0.5
    assert "without trained token  50.0%" in report_text(report)
    assert check(records, TOKENIZER).healthy
    assert check([Prompt("a")], TOKENIZER).untrained is None


def test_double_begin_tokens_are_counted_where_they_would_double():
    records = [Demonstration("<bos>one", completion="two"), Demonstration("<bos><bos>one", completion="two")]
    assert check(records, TOKENIZER).double_bos == 1
    begins = train_bpe(["one two"], 300)
    begins.inner.chat_template = "<bos>{% for m in messages %}{{ m['content'] }}{% endfor %}"
    from palate.records import Message

    talk = Demonstration((Message("user", "<bos>one"),), completion=(Message("assistant", "two"),))
    assert check([talk], begins).double_bos == 1


def test_a_file_with_faulty_rows_is_reported_not_refused(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "p", "completion": "c"}\n{"prompt": "p"}\n')
    report = check_data(Data(path=str(path)))
    assert (report.formats, report.records, report.fault_count) == (("prompt_completion",), 1, 1)
    text = report_text(report)
    assert "a.jsonl:2: completion: is missing" in text
    assert "! faulty rows" in text
    assert json.loads(json.dumps(report_dict(report)))["kinds"] == {"Demonstration": 1}
    path.write_text('{"quest": "p"}\n')
    with pytest.raises(PalateError, match="no known format"):
        check_data(Data(path=str(path)))


def test_a_world_can_be_checked():
    report = check_data(Data(path="world:tasting_room/pairs", rows=30))
    assert report.kinds == {"Ranking": 30}
    assert report.formats == ("world:tasting_room/pairs",)
