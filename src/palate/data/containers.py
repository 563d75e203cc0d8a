"""Containers: rows out of jsonl, json, csv, tsv, txt, parquet, arrow and their compressed forms.

A reader gives a `Row` for each row, and a `BadRow` in place of one that cannot be read. It raises PalateError where the
file as a whole is damaged: nothing after that place can be trusted.
"""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

from palate.data.columnar import first_line, read_arrow, read_parquet
from palate.data.compressed import DAMAGE, OPENERS, opened
from palate.data.formats.row import BadRow, Row, one_line, read_json, shown
from palate.settings import PalateError

_NO_ROWS = "holds no rows. Give a file with at least one"
_MEND = "Mend or remove the line."
_REFUSED: Mapping[str, str] = {
    **dict.fromkeys(
        ("tar", "tgz", "tbz2", "txz", "zip", "7z", "rar"), "an archive. Unpack it and name the files inside"
    ),
    **dict.fromkeys(
        ("pkl", "pickle", "pt", "pth", "bin", "joblib", "npy", "npz"),
        "may hold pickled objects, which can run any code of whoever wrote them. Convert it to jsonl or parquet",
    ),
}
"""Kinds of files that are never opened, by their ending."""

csv.field_size_limit(2**31 - 1)


def container(path: Path) -> str | None:
    """What a file is by its name, compression aside: jsonl, json, csv, tsv, txt, parquet, arrow; None when unknown."""
    kind = _ending(path)
    return kind if kind in _READERS else None


def _ending(path: Path) -> str:
    name = path.name.lower()
    for ending in OPENERS:
        name = name.removesuffix(ending)
    kind = name.rpartition(".")[2] if "." in name else ""
    return {"ndjson": "jsonl", "text": "txt"}.get(kind, kind)


def read_file(path: Path) -> Iterator[Row | BadRow]:
    """The rows of one file, each with its place. PalateError for a file that is missing, unknown, damaged or empty."""
    if not path.is_file():
        raise PalateError(f"{path}: no such file. Check the path.")
    kind = _ending(path)
    if kind in _REFUSED:
        raise PalateError(f"{path}: {_REFUSED[kind]}.")
    if kind not in _READERS:
        endings = ", ".join(_READERS)
        raise PalateError(f"{path}: unknown kind of file. Known endings: {endings}; each may end in .gz, .xz, .zst.")
    count = 0
    for row in _READERS[kind](path):
        count += 1
        yield row
    if not count:
        raise PalateError(f"{path}: {_NO_ROWS}.")


def _lines(path: Path) -> Iterator[tuple[int, str | BadRow]]:
    """(number, text) of every line that is not blank, with a BadRow for what is not UTF-8."""
    number = 0
    try:
        with opened(path) as stream:
            for number, raw in enumerate(stream, start=1):
                line = _decoded(raw, number, path)
                if isinstance(line, BadRow) or line.strip():
                    yield number, line
    except DAMAGE as fault:
        raise _unreadable(path, number + 1, fault) from None


def _decoded(raw: bytes, number: int, path: Path) -> str | BadRow:
    try:
        return raw.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
    except UnicodeDecodeError as fault:
        said = raw.decode("utf-8", "backslashreplace").rstrip("\r\n")
        return BadRow(f"{path}:{number}", f"not UTF-8 ({fault.reason}). Save the file as UTF-8.", said)


def _unreadable(path: Path, line: int, fault: Exception) -> PalateError:
    return PalateError(f"{path}:{line}: cannot be read further: {first_line(fault)}. Fetch the file again.")


def _jsonl(path: Path) -> Iterator[Row | BadRow]:
    for number, line in _lines(path):
        yield _json_row(line, f"{path}:{number}")


def _json_row(line: str | BadRow, place: str) -> Row | BadRow:
    if isinstance(line, BadRow):
        return line
    try:
        return _object(read_json(line), place, line)
    except json.JSONDecodeError as fault:
        return BadRow(place, f"not JSON: {fault.msg} (column {fault.colno}). {_MEND}", line)
    except ValueError as fault:
        return BadRow(place, f"JSON that cannot be held: {fault}. {_MEND}", line)


def _object(value: Any, place: str, raw: Any) -> Row | BadRow:
    if not isinstance(value, dict):
        return BadRow(place, f"expected an object of columns, got {shown(value)}. Write {{...}}.", raw)
    return Row(cast(dict[str, Any], value), place)


def _json(path: Path) -> Iterator[Row | BadRow]:
    """A list of objects, or an object that holds one such list; lines of objects under a .json name count too."""
    lines = dict(_lines(path))
    if not lines:
        return
    if _is_lines(list(lines.values())[:2]):
        for number, line in lines.items():
            yield _json_row(line, f"{path}:{number}")
        return
    for i, item in enumerate(_row_list(_json_document(lines, path), path)):
        yield _object(item, f"{path}: row {i}", item)


def _is_lines(first: list[str | BadRow]) -> bool:
    return len(first) == 2 and all(isinstance(_json_row(line, ""), Row) for line in first)


def _json_document(lines: Mapping[int, str | BadRow], path: Path) -> Any:
    """The one JSON value that the lines of a file spell together. A fault anywhere spoils all of it."""
    texts: list[str] = []
    for number in range(1, max(lines) + 1):
        line = lines.get(number, "")
        if isinstance(line, BadRow):
            raise PalateError(line.message)
        texts.append(line)
    try:
        return read_json("\n".join(texts))
    except json.JSONDecodeError as fault:
        where = f"{path}:{fault.lineno}: not JSON: {fault.msg} (column {fault.colno})"
        raise PalateError(f"{where}. Mend it, or write one object a line and call it .jsonl.") from None
    except ValueError as fault:
        raise PalateError(one_line(f"{path}: JSON that cannot be held: {fault}. Mend the file.")) from None


def _row_list(value: Any, path: Path) -> list[Any]:
    if isinstance(value, list):
        return cast(list[Any], value)
    inside = [v for v in cast(dict[str, Any], value).values() if isinstance(v, list)] if isinstance(value, dict) else []
    lists = [cast(list[Any], v) for v in inside if v and all(isinstance(i, dict) for i in cast(list[Any], v))]
    if len(lists) == 1:
        return lists[0]
    fault = f"{path}: expected a list of objects, got {shown(value)}. Write [{{...}}, ...] or use .jsonl."
    raise PalateError(one_line(fault))


def _text(path: Path) -> Iterator[Row | BadRow]:
    for number, line in _lines(path):
        yield line if isinstance(line, BadRow) else Row({"text": line}, f"{path}:{number}")


def _csv(path: Path) -> Iterator[Row | BadRow]:
    return _table(path, ",")


def _tsv(path: Path) -> Iterator[Row | BadRow]:
    return _table(path, "\t")


def _table(path: Path, delimiter: str) -> Iterator[Row | BadRow]:
    reader = None
    try:
        # Bytes that are not UTF-8 come through as lone surrogates, so that they are found in their own row.
        with opened(path) as raw, io.TextIOWrapper(raw, "utf-8-sig", "surrogateescape", newline="") as stream:
            lines: list[str] = []
            reader = csv.reader(_kept(stream, lines), delimiter=delimiter, strict=True)
            yield from _table_rows(reader, lines, path)
    except DAMAGE as fault:
        raise _unreadable(path, reader.line_num + 1 if reader else 1, fault) from None


def _kept(stream: Iterable[str], lines: list[str]) -> Iterator[str]:
    """The lines of a stream, which are also put into `lines`."""
    for line in stream:
        lines.append(line)
        yield line


def _table_rows(reader: Any, lines: list[str], path: Path) -> Iterator[Row | BadRow]:
    """The rows of a table under its header. `lines` holds the lines that the reader has taken; emptied at each row."""
    header: list[str] | None = None
    while True:
        place = f"{path}:{reader.line_num + 1}"
        lines.clear()
        try:
            cells: list[str] | None = next(reader, None)
        except csv.Error as fault:
            if header is None or "unexpected end of data" in str(fault):  # a quote that swallowed all the rest
                raise PalateError(one_line(f"{place}: {_not_a_table(fault)}")) from None
            yield BadRow(place, _not_a_table(fault), _spelled("".join(lines)))
            continue
        if cells is None:
            return
        if header is None:
            header = _checked_header(cells, path)
        elif cells:
            yield _cells(header, cells, place)


def _not_a_table(fault: csv.Error) -> str:
    return f"not a table: {fault}. Close the quotes or mend the line."


def _checked_header(header: list[str], path: Path) -> list[str]:
    twice = [name for name, count in Counter(header).items() if count > 1]
    if twice:
        raise PalateError(one_line(f"{path}:1: the column {twice[0][:60]!r} is there twice. Rename one."))
    if not _is_text(header):
        raise PalateError(f"{path}:1: not UTF-8. Save the file as UTF-8.")
    return header


def _spelled(text: str) -> str:
    """Bytes that came through as lone surrogates, spelled out."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _is_text(cells: list[str]) -> bool:
    return not any("\udc80" <= c <= "\udcff" for cell in cells if not cell.isascii() for c in cell)


def _cells(header: list[str], cells: list[str], place: str) -> Row | BadRow:
    if not _is_text(cells):
        return BadRow(place, "not UTF-8. Save the file as UTF-8.", [_spelled(cell) for cell in cells])
    if len(cells) != len(header):
        fault = f"expected {len(header)} cells, got {len(cells)}. Quote cells that hold commas."
        return BadRow(place, fault, cells)
    return Row(dict(zip(header, cells, strict=True)), place)


_READERS: Mapping[str, Callable[[Path], Iterator[Row | BadRow]]] = {
    "jsonl": _jsonl,
    "json": _json,
    "csv": _csv,
    "tsv": _tsv,
    "txt": _text,
    "parquet": read_parquet,
    "arrow": read_arrow,
}
