"""Containers: the same rows come back from every one, and what is damaged says where."""

import bz2
import csv
import gzip
import json
import lzma

import datasets
import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from palate.data.columnar import read_saved
from palate.data.containers import container, read_file
from palate.data.formats import BadRow
from palate.data.source import Data, load
from palate.settings import PalateError

ROWS = [{"prompt": f"Frage {i} — “ü”, 茶", "completion": f'line one\nline {i}, "quoted"'} for i in range(5)]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()
PACK = {
    "": bytes,
    ".gz": gzip.compress,
    ".xz": lzma.compress,
    ".bz2": bz2.compress,
    ".zst": zstandard.compress,
}


def table(delimiter, path):
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, ["prompt", "completion"], delimiter=delimiter)
        writer.writeheader()
        writer.writerows(ROWS)
    return path.read_bytes()


def columns(path):
    """The rows of a file; one that cannot be read raises, as `on_bad_row: fail` has it."""
    found = []
    for row in read_file(path):
        if isinstance(row, BadRow):
            raise PalateError(row.message)
        found.append(dict(row.columns))
    return found


@pytest.mark.parametrize("pack", PACK)
@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "tsv"])
def test_rows_come_back_from_text_containers(tmp_path, kind, pack):
    plain = tmp_path / f"plain.{kind}"
    if kind == "jsonl":
        body = b"\n" + LINES
    elif kind == "json":
        body = json.dumps(ROWS, indent=1).encode()
    else:
        body = table("," if kind == "csv" else "\t", plain)
    path = tmp_path / f"rows.{kind}{pack}"
    path.write_bytes(PACK[pack](body))
    assert columns(path) == ROWS
    assert container(path) == kind


def test_rows_come_back_from_parquet_arrow_and_saved_datasets(tmp_path):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "rows.parquet")
    assert columns(tmp_path / "rows.parquet") == ROWS
    saved = datasets.Dataset.from_list(ROWS)
    saved.save_to_disk(tmp_path / "one")
    assert [dict(r.columns) for r in read_saved(tmp_path / "one", "train")] == ROWS
    (arrow,) = (tmp_path / "one").glob("*.arrow")
    assert columns(arrow) == ROWS
    datasets.DatasetDict({"train": saved, "test": saved.select([0])}).save_to_disk(tmp_path / "two")
    assert len(load(Data(path=str(tmp_path / "two")), 0)) == 5
    assert len(load(Data(path=str(tmp_path / "two"), split="test"), 0)) == 1
    with pytest.raises(PalateError, match=r"no split 'dev'\. Known: train, test"):
        load(Data(path=str(tmp_path / "two"), split="dev"), 0)


def test_conversations_survive_parquet_and_csv(tmp_path):
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"messages": turns}]), tmp_path / "a.parquet")
    with (tmp_path / "b.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows([["messages"], [json.dumps(turns)]])
    (one,), (other,) = (load(Data(path=str(tmp_path / name)), 0) for name in ("a.parquet", "b.csv"))
    assert one == other
    assert one.completion[0].content == "Hello"


def test_text_lines_and_the_byte_order_mark(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeffone\r\n\n two\n".encode())
    assert [(r.columns["text"], r.place) for r in read_file(path)] == [("one", f"{path}:1"), (" two", f"{path}:3")]


def test_json_forms(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"version": 1, "data": ROWS}))
    assert columns(path) == ROWS
    path.write_bytes(LINES)
    assert columns(path) == ROWS
    path.write_text("[1]")
    with pytest.raises(PalateError, match=r"row 0: expected an object"):
        columns(path)
    path.write_text('{"a": 1}')
    with pytest.raises(PalateError, match="expected a list of objects"):
        columns(path)


@pytest.mark.parametrize(
    ("name", "body", "expected"),
    [
        ("a.jsonl", LINES + b'{"prompt": \n', r"a\.jsonl:6: not JSON: .*column"),
        ("a.jsonl", LINES + b"[1]\n", r"a\.jsonl:6: expected an object of columns, got list \[1\]"),
        ("a.jsonl", LINES + b'{"text": "\xff"}\n', r"a\.jsonl:6: not UTF-8"),
        ("a.jsonl", b'{"a": ' + b"[" * 100_000 + b"\n", r"a\.jsonl:1: (not JSON|JSON that cannot be held)"),
        ("a.jsonl", b'{"a": ' + b"9" * 5000 + b"}\n", r"a\.jsonl:1: JSON that cannot be held"),
        ("a.jsonl", b"\n\n", r"a\.jsonl: holds no rows"),
        ("a.json", b'[{"a": 1},\n {"a": }]', r"a\.json:2: not JSON"),
        ("a.json", b"", r"a\.json: holds no rows"),
        ("a.csv", b"a,b\n1,2\n3\n", r"a\.csv:3: expected 2 cells, got 1"),
        ("a.csv", b"a,a\n1,2\n", r"a\.csv:1: the column 'a' is there twice"),
        ("a.csv", b'a,b\n1,"2\n', r"a\.csv:2: not a table"),
        ("a.csv", b"a,b\n", r"a\.csv: holds no rows"),
        ("a.csv", b"", r"a\.csv: holds no rows"),
        ("a.jsonl.gz", gzip.compress(LINES)[:-20], r"a\.jsonl\.gz:\d+: cannot be read further"),
        ("a.jsonl.gz", b"no gzip", r"a\.jsonl\.gz:1: cannot be read further"),
        ("a.jsonl.xz", lzma.compress(LINES)[:-20], r"a\.jsonl\.xz:\d+: cannot be read further"),
        ("a.jsonl.zst", b"no zstd", r"a\.jsonl\.zst:1: cannot be read further"),
        ("a.jsonl.zst", zstandard.compress(LINES)[:-5], r"a\.jsonl\.zst:\d+: cannot be read further: the last frame"),
        ("a.jsonl", LINES + b'{"a": 1, "a": 2}\n', r"a\.jsonl:6: .*the key 'a' is there twice"),
        ("a.jsonl", b'{"a": ' + b"[" * 70 + b"]" * 70 + b"}\n", r"a\.jsonl:1: .*nests deeper than 64"),
        ("a.csv", b"a,b\n1,2\n3,\xff\n", r"a\.csv:3: not UTF-8"),
        ("a.csv", b'a,b\n1,2\n"3"x,4\n', r"a\.csv:3: not a table"),
        ("a.csv", b'a,b\n1,"2\n3,4\n5,6\n', r"a\.csv:2: not a table: unexpected end of data"),
        ("a.pkl", b"x", r"a\.pkl: may hold pickled objects"),
        ("a.tar.gz", b"x", r"a\.tar\.gz: an archive\. Unpack it"),
        ("a.parquet", b"PAR1 no", r"a\.parquet: not a whole parquet file"),
        ("a.arrow", b"no arrow", r"a\.arrow: not an arrow file"),
        ("a.doc", b"x", r"a\.doc: unknown kind of file\. Known endings: jsonl"),
    ],
)
def test_a_damaged_file_says_where(tmp_path, name, body, expected):
    path = tmp_path / name
    path.write_bytes(body)
    with pytest.raises(PalateError, match=expected):
        columns(path)


def test_a_damaged_saved_dataset_and_a_missing_file(tmp_path):
    (tmp_path / "state.json").write_text("{}")
    with pytest.raises(PalateError, match="not a saved dataset"):
        list(read_saved(tmp_path, "train"))
    with pytest.raises(PalateError, match=r"no such file"):
        columns(tmp_path / "nowhere.jsonl")


def test_brackets_inside_texts_are_not_nesting(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"prompt": "[{" * 500, "completion": '\\"[' * 500}) + "\n")
    assert columns(path) == [{"prompt": "[{" * 500, "completion": '\\"[' * 500}]


def test_several_zstandard_frames_are_one_file(tmp_path):
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(zstandard.compress(LINES) + zstandard.compress(LINES))
    assert columns(path) == ROWS + ROWS


@pytest.mark.parametrize(
    ("name", "body", "lines"),
    [
        ("a.jsonl", b'{"a": 1}\n{"a": \n\xff\n[1]\n{"a": 2}\n', [2, 3, 4]),
        ("a.json", b'{"a": 1}\n{"a": 3}\n{"a": \n{"a": 2}\n', [3]),
        ("a.txt", b"one\n\xff\ntwo\n", [2]),
        ("a.csv", b'a,b\n1,2\n3\n4,\xff\n"5"x,6\n"7\n7",8\n9\n10,11\n', [3, 4, 5, 8]),
    ],
)
def test_reading_goes_on_after_a_bad_row(tmp_path, name, body, lines):
    path = tmp_path / name
    path.write_bytes(body)
    rows = list(read_file(path))
    assert [row.place for row in rows if isinstance(row, BadRow)] == [f"{path}:{line}" for line in lines]
    assert not isinstance(rows[-1], BadRow)
    assert all(row.raw for row in rows if isinstance(row, BadRow))


def test_a_fault_is_one_line_of_printable_characters(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"\x1b[2J\nred": 1, "x" * 100_000: 2}) + "\n")
    with pytest.raises(PalateError) as caught:
        load(Data(path=str(path)), 0)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 1000
