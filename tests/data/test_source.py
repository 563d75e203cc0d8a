"""Sources: paths, patterns, renaming, worlds, mixtures, and the split by prompt."""

import gzip
import json
import logging
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from palate.data.mixing import split_by_prompt
from palate.data.source import Data, Part, load, read_part
from palate.records import Demonstration, Prompt, Ranking
from palate.settings import PalateError, parse


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def numbers(tmp_path):
    return write(tmp_path / "numbers.jsonl", [{"prompt": f"p{i}", "completion": f"c{i}"} for i in range(40)])


def said(records):
    return [r.completion for r in records]


def test_the_same_seed_gives_the_same_order_and_another_seed_another(numbers):
    data = Data(path=numbers)
    assert said(load(data, 1)) == said(load(data, 1))
    assert said(load(data, 1)) != said(load(data, 2))
    assert sorted(said(load(data, 1))) == sorted(said(load(data, 2)))
    assert said(load(Data(path=numbers, seed=5), 1)) == said(load(Data(path=numbers, seed=5), 2))
    assert said(load(Data(path=numbers, shuffle=False, rows=3), 1)) == ["c0", "c1", "c2"]


def test_folders_patterns_and_single_files(tmp_path, numbers):
    write(tmp_path / "more.jsonl", [{"prompt": "q", "completion": "d"}])
    (tmp_path / "notes.md").write_text("not data")
    for path in (tmp_path, tmp_path / "*.jsonl"):
        assert len(load(Data(path=str(path)), 0)) == 41
    assert Data(path=str(tmp_path)).files() == [str(tmp_path / "more.jsonl"), numbers]
    with pytest.raises(PalateError, match="no data files found"):
        load(Data(path=str(tmp_path / "*.csv")), 0)


def test_a_missing_path_says_so_with_the_nearest_name(tmp_path, numbers):
    with pytest.raises(PalateError, match=r"no such file or folder\. Did you mean 'numbers\.jsonl'"):
        load(Data(path=str(tmp_path / "number.jsonl")), 0)


def test_a_hub_id_offline_is_one_clear_error():
    with pytest.raises(
        PalateError, match=r"palate-nobody/nothing: no file here, and not loaded from the hub \(offline"
    ):
        load(Data(path="palate-nobody/nothing"), 0)


def test_the_data_folder_variable(tmp_path, numbers, monkeypatch):
    monkeypatch.setenv("PALATE_DATA", str(tmp_path))
    assert len(load(Data(path="$PALATE_DATA/numbers.jsonl"), 0)) == 40


def test_columns_are_renamed_or_put_together(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"Body": "Two apples", "Question": "How many?", "Answer": 2.0, "id": 7}])
    names = {"prompt": "{Body}. {Question}", "completion": "It is {Answer}", "number": "id"}
    (record,) = load(Data(path=path, columns=names), 0)
    assert (record.prompt, record.completion) == ("Two apples. How many?", "It is 2.0")
    assert record.columns["number"] == 7
    assert "id" not in record.columns
    (bare,) = load(Data(path=path, columns={"prompt": "", "completion": "Body"}), 0)
    assert (bare.prompt, bare.completion) == ("", "Two apples")
    with pytest.raises(PalateError, match=r"a\.jsonl:1: columns\.prompt: there is no column 'body'"):
        load(Data(path=path, columns={"prompt": "body"}), 0)
    with pytest.raises(PalateError, match=r"columns\.prompt: .*there is no field 'body'"):
        load(Data(path=path, columns={"prompt": "{body}"}), 0)


def test_alpaca_eval_joins_its_baseline(tmp_path):
    base = write(tmp_path / "base.jsonl", [{"instruction": "Hi", "output_1": "Hello"}])
    votes = write(tmp_path / "votes.jsonl", [{"instruction": "Hi", "output_2": "Go", "preference": 1.0}])
    (record,) = load(Data(path=votes, options={"baseline": base}), 0)
    assert isinstance(record, Ranking)
    assert [c[0].content for c in record.completions] == ["Hello", "Go"]


def test_a_note_of_the_format_is_logged(tmp_path, caplog):
    row = {"image": "x.png", "question": "What?", "chosen": "a", "rejected": "b"}
    with caplog.at_level(logging.WARNING, "palate.data"):
        load(Data(path=write(tmp_path / "v.jsonl", [row])), 0)
    assert "only the text of these rows is read" in caplog.text


@pytest.mark.parametrize("shape", ["demonstrations", "pairs", "rankings", "thumbs", "corrections", "prompts"])
def test_a_world_makes_the_records(shape):
    records = load(Data(path=f"world:tasting_room/{shape}", rows=12, shuffle=False), 3)
    assert len(records) == 12
    assert records == load(Data(path=f"world:tasting_room/{shape}", rows=12, shuffle=False), 3)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"path": "world:tasting_rom/pairs", "rows": 2}, "Did you mean 'tasting_room'"),
        ({"path": "world:tasting_room", "rows": 2}, "world:NAME/SHAPE"),
        ({"path": "world:tasting_room/pairs"}, "rows: a world needs to know how many"),
        ({"path": "world:tasting_room/pears", "rows": 2}, "pairs"),
        ({"path": "world:tasting_room/pairs", "rows": 2, "options": {"temprature": 1}}, "temperature"),
    ],
)
def test_faults_about_worlds(given, expected):
    with pytest.raises(PalateError, match=expected):
        load(Data(**given), 0)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, "give either 'path' or 'mixture'"),
        ({"path": "a", "mixture": [{"path": "b"}]}, "give either"),
        ({"mixture": [{"path": "b"}], "format": "text"}, "'format' belongs to each part"),
        ({"path": "a", "format": "alpacca"}, "Did you mean 'alpaca'"),
        ({"path": "a", "row": 3}, "Did you mean 'rows'"),
        ({"path": "a", "held_out": 1.0}, "held_out"),
    ],
)
def test_faulty_settings_are_refused_at_the_door(given, expected):
    with pytest.raises(PalateError, match=expected):
        parse(Data, given, "data")


def test_a_mixture_keeps_its_weights_and_is_a_function_of_the_seed(tmp_path):
    parts = []
    for name, weight in (("a", 3), ("b", 1)):
        rows = [{"prompt": f"{name}{i}", "completion": name} for i in range(100)]
        parts.append({"path": write(tmp_path / f"{name}.jsonl", rows), "weight": weight})
    data = Data.model_validate({"mixture": parts, "rows": 4000})
    records = load(data, 1)
    counts = Counter(said(records))
    assert counts["a"] / 4000 == pytest.approx(0.75, abs=0.03)
    assert [r.prompt for r in records] == [r.prompt for r in load(data, 1)]
    assert [r.prompt for r in records][:50] == [r.prompt for r in load(data.model_copy(update={"rows": 50}), 1)]
    passes = [r.prompt for r in records if r.completion == "a"]
    assert set(passes[:100]) == set(passes[100:200])
    assert passes[:100] != passes[100:200]
    whole = load(data.model_copy(update={"rows": None}), 1)
    assert len({r.prompt for r in whole}) == len(whole)
    assert max(Counter(said(whole)).values()) == 100


@given(
    st.lists(st.tuples(st.integers(0, 30), st.sampled_from(["", "g1", "g2"])), min_size=2, max_size=80),
    st.floats(0.01, 0.99),
)
def test_a_split_never_parts_a_prompt_or_a_group(rows, share):
    records = [Demonstration(f"p{p}", {}, group, f"c{i}") for i, (p, group) in enumerate(rows)]
    if len({r.key for r in records}) < 2:
        with pytest.raises(PalateError, match="one prompt"):
            split_by_prompt(records, share)
        return
    train, held_out = split_by_prompt(records, share)
    assert train
    assert held_out
    assert not {r.key for r in train} & {r.key for r in held_out}
    assert sorted(said([*train, *held_out])) == sorted(said(records))


def test_a_prompt_stays_on_its_side_whatever_comes_beside_it():
    records = [Prompt(f"p{i}") for i in range(2000)]
    _, held_out = split_by_prompt(records, 0.2)
    assert len(held_out) / 2000 == pytest.approx(0.2, abs=0.03)
    _, again = split_by_prompt(records[:1000], 0.2)
    first = {r.prompt for r in records[:1000]}
    assert again == [r for r in held_out if r.prompt in first]


def test_both_sides_of_load(numbers):
    data = Data(path=numbers, held_out=0.25)
    train, held_out = load(data, 1), load(data, 1, side="held_out")
    assert {r.prompt for r in train} | {r.prompt for r in held_out} == {f"p{i}" for i in range(40)}
    assert {r.prompt for r in held_out} == {r.prompt for r in load(data, 2, side="held_out")}
    assert len(load(data, 1, side="all")) == 40


def test_labels_become_pairs_on_each_side_by_itself(tmp_path):
    rows = [{"text": f"{'good' if i % 2 else 'bad'} {i}", "label": i % 2} for i in range(60)]
    data = Data(path=write(tmp_path / "t.jsonl", rows), format="labelled_text", pair_labels=True, held_out=0.3)
    sides = [load(data, 0, side=side) for side in ("train", "held_out")]
    texts = [{c for r in side for c in r.completions} for side in sides]
    assert not texts[0] & texts[1]
    for record in (r for side in sides for r in side):
        assert record.completions[0].startswith("good")
        assert record.completions[1].startswith("bad")
    with pytest.raises(PalateError, match="format: labelled_text"):
        load(data.model_copy(update={"format": "text"}), 0)


def test_a_tolerant_reading_collects_bad_rows_and_goes_on(tmp_path):
    path = tmp_path / "a.jsonl"
    good = '{"prompt": "p", "completion": "%s"}\n'
    path.write_text(good % "c" + '{"prompt": \n' + '{"prompt": "p"}\n' + good % "d")
    reading = read_part(Part(path=str(path)), None, 0, tolerant=True)
    assert said(reading.records) == ["c", "d"]
    assert [bad.place for bad in reading.bad] == [f"{path}:2", f"{path}:3"]
    assert [bad.raw for bad in reading.bad] == ['{"prompt": ', {"prompt": "p"}]
    assert (reading.rows, reading.broken) == (4, None)
    with pytest.raises(PalateError, match=r"a\.jsonl:2: not JSON"):
        load(Data(path=str(path)), 0)


def test_a_bad_row_is_skipped_when_asked_and_told(tmp_path, caplog):
    rows = [{"prompt": f"p{i}", "completion": f"c{i}"} for i in range(9)]
    path = write(tmp_path / "a.jsonl", [*rows[:5], {"prompt": "p"}, *rows[5:]])
    with caplog.at_level(logging.WARNING, "palate.data"):
        found = load(Data(path=path, on_bad_row="skip", rows=3), 0)
    assert len(found) == 3
    assert f"1 of 10 rows of {path} were skipped, the first: {path}:6: completion: is missing" in caplog.text


def test_skipping_stays_strict_about_whole_files_and_empty_results(tmp_path):
    torn = tmp_path / "a.jsonl.gz"
    torn.write_bytes(gzip.compress(b'{"prompt": "p", "completion": "c"}\n' * 500)[:-12])
    with pytest.raises(PalateError, match="cannot be read further"):
        load(Data(path=str(torn), on_bad_row="skip"), 0)
    bad = write(tmp_path / "b.jsonl", [{"x": 1}] * 1042)
    with pytest.raises(PalateError, match=r"1,042 of 1,042 rows of .* were skipped, the first: .*b\.jsonl:1: no known"):
        load(Data(path=bad, on_bad_row="skip"), 0)


def test_a_missing_column_is_a_bad_row(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"q": "a", "r": "b"}, {"q": "c"}])
    data = Data(path=path, columns={"prompt": "q", "completion": "{r}!"}, on_bad_row="skip")
    assert said(load(data, 0)) == ["b!"]


@pytest.mark.parametrize("path", ["", "**/*.jsonl", "*/**/*.jsonl"])
def test_a_loop_of_links_is_walked_once(tmp_path, path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    write(tmp_path / "a" / "b" / "x.jsonl", [{"prompt": "p", "completion": "c"}])
    for name in ("one", "two", "three"):
        (tmp_path / "a" / "b" / name).symlink_to(tmp_path)
    assert len(load(Data(path=str(tmp_path / path)), 0)) == 1
