"""Containers: rows out of jsonl, json, csv, tsv, parquet, txt, their compressed forms, and saved datasets."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, cast

import zstandard

from palate.data.formats.row import Row, shown
from palate.settings import PalateError


def _zstd(path: Path, mode: str) -> IO[bytes]:
    return cast(IO[bytes], io.BufferedReader(zstandard.open(path, mode)))


_OPENERS: Mapping[str, Callable[..., IO[bytes]]] = {
    ".gz": cast(Callable[..., IO[bytes]], gzip.open),
    ".xz": cast(Callable[..., IO[bytes]], lzma.open),
    ".bz2": cast(Callable[..., IO[bytes]], bz2.open),
    ".zst": _zstd,
}
_DAMAGE = (EOFError, OSError, zlib.error, lzma.LZMAError, zstandard.ZstdError)
_NO_ROWS = "holds no rows. Give a file with at least one"

csv.field_size_limit(2**31 - 1)


def container(path: Path) -> str | None:
    """What a file is by its name, compression aside: jsonl, json, csv, tsv, txt, parquet, arrow; None when unknown."""
    name = path.name.lower()
    for ending in _OPENERS:
        name = name.removesuffix(ending)
    kind = name.rpartition(".")[2] if "." in name else ""
    kind = {"ndjson": "jsonl", "text": "txt"}.get(kind, kind)
    return kind if kind in _READERS else None


def read_file(path: Path) -> Iterator[Row]:
    """The rows of one file, each with its place. PalateError for a file that is missing, unknown, damaged or empty."""
    kind = container(path)
    if not path.is_file():
        raise PalateError(f"{path}: no such file. Check the path.")
    if kind is None:
        endings = ", ".join(_READERS)
        raise PalateError(f"{path}: unknown kind of file. Known endings: {endings}; each may end in .gz, .xz, .zst.")
    count = 0
    for row in _READERS[kind](path):
        count += 1
        yield row
    if not count:
        raise PalateError(f"{path}: {_NO_ROWS}.")


def _opened(path: Path) -> IO[bytes]:
    return _OPENERS.get(path.suffix.lower(), open)(path, "rb")


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """(number, text) of every line that is not blank; a damaged stream or a bad character names its line."""
    number = 0
    try:
        with _opened(path) as stream:
            for number, raw in enumerate(stream, start=1):
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
                if line.strip():
                    yield number, line
    except UnicodeDecodeError as fault:
        raise PalateError(f"{path}:{number}: not UTF-8 ({fault.reason}). Save the file as UTF-8.") from None
    except _DAMAGE as fault:
        raise PalateError(f"{path}:{number + 1}: cannot be read further: {fault}. Fetch the file again.") from None


def _jsonl(path: Path) -> Iterator[Row]:
    for number, line in _lines(path):
        place = f"{path}:{number}"
        yield _object(_parsed(line, place), place)


def _parsed(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as fault:
        where = f"{place}:{fault.lineno}" if "\n" in text else place
        raise PalateError(f"{where}: not JSON: {fault.msg} (column {fault.colno}). Mend or remove the line.") from None
    except (ValueError, RecursionError) as fault:
        raise PalateError(f"{place}: JSON that cannot be held: {fault}. Mend or remove the line.") from None


def _object(value: Any, place: str) -> Row:
    if not isinstance(value, dict):
        raise PalateError(f"{place}: expected an object of columns, got {shown(value)}. Write {{...}}.")
    return Row(cast(dict[str, Any], value), place)


def _json(path: Path) -> Iterator[Row]:
    """A list of objects, or an object that holds one such list; lines of objects under a .json name count too."""
    lines = dict(_lines(path))
    if not lines:
        return
    if _is_lines(list(lines.values())[:2]):
        for number, line in lines.items():
            yield _object(_parsed(line, f"{path}:{number}"), f"{path}:{number}")
        return
    blank = [lines.get(n, "") for n in range(1, max(lines) + 1)]
    value = _parsed("\n".join(blank), str(path))
    for i, item in enumerate(_row_list(value, path)):
        yield _object(item, f"{path}: row {i}")


def _is_lines(first: list[str]) -> bool:
    def whole(line: str) -> bool:
        try:
            return isinstance(json.loads(line), dict)
        except (ValueError, RecursionError):
            return False

    return len(first) == 2 and all(whole(line) for line in first)


def _row_list(value: Any, path: Path) -> list[Any]:
    if isinstance(value, list):
        return cast(list[Any], value)
    inside = [v for v in cast(dict[str, Any], value).values() if isinstance(v, list)] if isinstance(value, dict) else []
    lists = [cast(list[Any], v) for v in inside if v and all(isinstance(i, dict) for i in cast(list[Any], v))]
    if len(lists) == 1:
        return lists[0]
    raise PalateError(f"{path}: expected a list of objects, got {shown(value)}. Write [{{...}}, ...] or use .jsonl.")


def _text(path: Path) -> Iterator[Row]:
    for number, line in _lines(path):
        yield Row({"text": line}, f"{path}:{number}")


def _csv(path: Path) -> Iterator[Row]:
    return _table(path, ",")


def _tsv(path: Path) -> Iterator[Row]:
    return _table(path, "\t")


def _table(path: Path, delimiter: str) -> Iterator[Row]:
    line = 0
    try:
        with _opened(path) as raw, io.TextIOWrapper(raw, encoding="utf-8-sig", newline="") as stream:
            reader = csv.reader(stream, delimiter=delimiter, strict=True)
            header = next(reader, [])
            _check_header(header, path)
            line = reader.line_num
            for cells in reader:
                place, line = f"{path}:{line + 1}", reader.line_num
                if cells:
                    yield _cells(header, cells, place)
    except UnicodeDecodeError as fault:
        raise PalateError(f"{path}:{line + 1}: not UTF-8 ({fault.reason}). Save the file as UTF-8.") from None
    except csv.Error as fault:
        raise PalateError(f"{path}:{line + 1}: not a table: {fault}. Close the quotes or mend the line.") from None
    except _DAMAGE as fault:
        raise PalateError(f"{path}:{line + 1}: cannot be read further: {fault}. Fetch the file again.") from None


def _check_header(header: list[str], path: Path) -> None:
    twice = sorted({name for name in header if header.count(name) > 1})
    if twice:
        raise PalateError(f"{path}:1: the column {twice[0]!r} is there twice. Rename one.")


def _cells(header: list[str], cells: list[str], place: str) -> Row:
    if len(cells) != len(header):
        raise PalateError(f"{place}: expected {len(header)} cells, got {len(cells)}. Quote cells that hold commas.")
    return Row(dict(zip(header, cells, strict=True)), place)


def _parquet(path: Path) -> Iterator[Row]:
    import pyarrow  # loaded late: `datasets` brings it, and most runs read text files
    import pyarrow.parquet as parquet

    number = 0
    try:
        for batch in parquet.ParquetFile(path).iter_batches():
            for values in batch.to_pylist():
                yield Row(values, f"{path}: row {number}")
                number += 1
    except (pyarrow.ArrowException, OSError) as fault:
        raise PalateError(f"{path}: not a whole parquet file: {_first_line(fault)}. Fetch it again.") from None


def _arrow(path: Path) -> Iterator[Row]:
    import datasets
    import pyarrow

    try:
        found = datasets.Dataset.from_file(str(path))
    except (pyarrow.ArrowException, OSError, ValueError) as fault:
        raise PalateError(f"{path}: not an arrow file: {_first_line(fault)}. Fetch it again.") from None
    return _dataset(found, str(path))


def read_saved(path: Path, split: str) -> Iterator[Row]:
    """The rows of a folder written by `datasets`' `save_to_disk`; of its `split` where it has several."""
    import datasets
    import pyarrow

    try:
        found = datasets.load_from_disk(str(path))
    except (pyarrow.ArrowException, OSError, ValueError, KeyError, TypeError) as fault:
        raise PalateError(f"{path}: not a saved dataset: {_first_line(fault)}. Save it again.") from None
    if isinstance(found, datasets.DatasetDict):
        if split not in found:
            known = ", ".join(str(name) for name in found)
            raise PalateError(f"{path}: split: there is no split {split!r}. Known: {known}.")
        found = found[split]
    return _dataset(found, str(path))


def read_hub(name: str, subset: str | None, split: str) -> Iterator[Row]:
    """The rows of a dataset on the Hugging Face hub, or of its copy in the local cache when offline.

    Only data files are read: `datasets` 4 no longer runs a repository's code.
    """
    import datasets
    from datasets import config
    from datasets.exceptions import DatasetsError

    try:
        found = datasets.load_dataset(name, subset, split=split)
    except (DatasetsError, OSError, ValueError, KeyError, RuntimeError) as fault:
        offline = " (offline: HF_HUB_OFFLINE is set)" if config.HF_HUB_OFFLINE else ""
        move = "Check the name, `subset` and `split`, download it first when offline, or give a local file"
        why = f"no file here, and not loaded from the hub{offline}: {_first_line(fault)}"
        raise PalateError(f"{name}: {why}. {move}.") from None
    return _dataset(found, name)


def is_saved(path: Path) -> bool:
    """Whether a folder was written by `save_to_disk`."""
    return any((path / name).is_file() for name in ("state.json", "dataset_dict.json"))


def _dataset(found: Any, place: str) -> Iterator[Row]:
    if not len(found):
        raise PalateError(f"{place}: {_NO_ROWS}.")
    for number, values in enumerate(found):
        yield Row(values, f"{place}: row {number}")


def _first_line(fault: BaseException) -> str:
    return str(fault).strip().split("\n")[0].rstrip(".") or type(fault).__name__


_READERS: Mapping[str, Callable[[Path], Iterator[Row]]] = {
    "jsonl": _jsonl,
    "json": _json,
    "csv": _csv,
    "tsv": _tsv,
    "txt": _text,
    "parquet": _parquet,
    "arrow": _arrow,
}
