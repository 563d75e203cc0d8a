"""The real files: every text file of the folder is read, and the rows are all there."""

from collections import Counter

import pytest

from palate.data.check import check_data
from palate.data.source import Data, load
from palate.records import Demonstration, Prompt, Ranking, Unpaired

pytestmark = pytest.mark.data

FILES = [
    ("preference/oasst1_en_pairs.jsonl.gz", "conversation_preference", Ranking, 703),
    ("preference/hh_harmless_pairs.jsonl.gz", "transcripts", Ranking, 1759),
    ("preference/polite_instructions.jsonl.gz", "alpaca_preference", Ranking, 824),
    ("preference/alpaca_eval_gpt4_baseline.jsonl.gz", "instruction", Prompt, 805),
    ("demonstration/oasst1_en_demos.jsonl.gz", "messages", Demonstration, 357),
    ("sentiment/imdb_train.jsonl.gz", "text", Demonstration, 25_000),
    ("sentiment/imdb_unlabelled.jsonl.xz", "text", Demonstration, 50_000),
    ("sentiment/rotten_tomatoes.jsonl.gz", "text", Demonstration, 9_596),
    ("text/oasst1_en_train_text.jsonl.gz", "text", Demonstration, 39_283),
    ("text/tinystories_2k.jsonl.gz", "text", Demonstration, 2_316),
    ("text/tinystories_lower_4MB.txt.gz", "text", Demonstration, 25_497),
    ("text/gutenberg18.jsonl.gz", "text", Demonstration, 17),
    ("verifiable/gsm8k_train.jsonl.gz", "question_answer", Demonstration, 7_473),
    ("summary/t0_summarisation.jsonl.gz", "prompt_completion", Demonstration, 8_200),
    ("summary/scitldr_train.jsonl.gz", "summary_sentences", Demonstration, 1_992),
    ("summary/scitldr_dev.jsonl.gz", "summary_sentences", Demonstration, 1_453),
    ("formats/alpaca_en_demo.json.gz", "alpaca", Demonstration, 999),
    ("formats/alpaca_zh_demo.json.gz", "alpaca", Demonstration, 1_000),
    ("formats/dpo_en_demo.json.gz", "conversation_preference", Ranking, 300),
    ("formats/dpo_zh_demo.json.gz", "conversation_preference", Ranking, 300),
    ("formats/kto_en_demo.json.gz", "conversation_unpaired", Unpaired, 300),
    ("formats/self_instruct_seed_tasks.jsonl.gz", "seed_tasks", Demonstration, 175),
    ("formats/instruction_wild_seed_en.jsonl.gz", "instruction", Prompt, 429),
    ("formats/instruction_wild_seed_zh.jsonl.gz", "instruction", Prompt, 429),
    ("chinese/oasst_sft_zh.json.gz", "alpaca", Demonstration, 766),
    ("chinese/oasst_rm_zh.json.gz", "alpaca_ranking", Ranking, 775),
    ("chinese/dpo_zh_500.jsonl.gz", "conversation_preference", Ranking, 500),
]
"""(file, the format that must be found, the kind of record, how many). One scitldr abstract of the dev set has
several summaries (619 rows, 1,453 demonstrations); blank lines of the lower-case stories are no records."""

RENAMED = [
    ("verifiable/svamp.jsonl.gz", {"prompt": "{Body} {Question}", "completion": "{Answer}"}, Demonstration, 1_000),
    (
        "summary/tldr_oai1b_judged.csv.gz",
        {"prompt": "query", "completion": "reference_responses"},
        Demonstration,
        1_945,
    ),
    ("preference/qa_feedback_spans.json.gz", {"prompt": "question"}, Prompt, 500),
    ("chinese/waimai_10k.csv.gz", {"text": "review"}, Demonstration, 11_987),
]


@pytest.mark.parametrize(("file", "format", "kind", "count"), FILES, ids=lambda value: str(value))
def test_a_file_is_recognised_and_read_whole(palate_data, file, format, kind, count):
    report = check_data(Data(path=str(palate_data / file)))
    assert report.formats == (format,)
    assert report.kinds == {kind.__name__: count}
    assert report.fault_count == 0


@pytest.mark.parametrize(("file", "columns", "kind", "count"), RENAMED, ids=lambda value: str(value)[:40])
def test_files_with_other_names_are_read_by_renaming(palate_data, file, columns, kind, count):
    records = load(Data(path=str(palate_data / file), columns=columns), 0)
    assert Counter(type(r) for r in records) == {kind: count}


def test_labels_become_pairs(palate_data):
    data = Data(path=str(palate_data / "sentiment/rotten_tomatoes.jsonl.gz"), format="labelled_text", pair_labels=True)
    assert len(load(data, 0)) > 4_000


def test_alpaca_eval_joins_its_baseline(palate_data):
    base = str(palate_data / "preference/alpaca_eval_gpt4_baseline.jsonl.gz")
    path = str(palate_data / "preference/alpaca_eval_gpt4_preferences.jsonl.gz")
    records = load(Data(path=path, options={"baseline": base}), 0)
    assert len(records) == 12_876
    assert len({r.key for r in records}) == 805


def test_floors_of_the_longer_answer(palate_data):
    """The rates beside which the folder's README asks a reward model to be judged."""
    rates = {
        name: check_data(Data(path=str(palate_data / f"preference/{name}.jsonl.gz"))).longer_is_better
        for name in ("oasst1_en_pairs", "hh_harmless_pairs")
    }
    assert rates["oasst1_en_pairs"] == pytest.approx(0.66, abs=0.01)
    assert rates["hh_harmless_pairs"] == pytest.approx(0.44, abs=0.01)


def test_reply_trees_are_never_parted(palate_data):
    data = Data(path=str(palate_data / "preference/oasst1_en_pairs.jsonl.gz"), held_out=0.2)
    train, held_out = ({r.group for r in load(data, 0, side=side)} for side in ("train", "held_out"))
    assert not train & held_out
    assert len(train | held_out) == 126


def test_duplicate_reviews_are_found(palate_data):
    assert check_data(Data(path=str(palate_data / "sentiment/imdb_train.jsonl.gz"))).duplicates == 96
