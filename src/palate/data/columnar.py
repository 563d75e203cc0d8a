"""Tables stored by columns: parquet, arrow, datasets saved to disk, datasets of the hub."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, cast

from palate.data.formats.row import Row, listed, one_line
from palate.settings import PalateError

# pyarrow and datasets are imported late: they take a second, and most runs read text files. What they stumble over in
# a damaged file comes as any kind of exception, from decoders of text and dates to allocators.

_NO_ROWS = "holds no rows. Give a file with at least one"


def read_parquet(path: Path) -> Iterator[Row]:
    """The rows of a parquet file."""
    import pyarrow.parquet as parquet

    try:
        with parquet.ParquetFile(path) as file:
            yield from _batches(file.iter_batches(), path)
    except PalateError:
        raise
    except Exception as fault:  # see above
        raise PalateError(f"{path}: not a whole parquet file: {first_line(fault)}. Fetch it again.") from None


def read_arrow(path: Path) -> Iterator[Row]:
    """The rows of an arrow file, in the stream form that `datasets` writes or in the file form (feather)."""
    try:
        yield from _batches(_arrow_batches(path), path)
    except PalateError:
        raise
    except Exception as fault:  # see above
        raise PalateError(f"{path}: not an arrow file: {first_line(fault)}. Fetch it again.") from None


def _arrow_batches(path: Path) -> Iterator[Any]:
    import pyarrow

    with path.open("rb") as start:
        whole = start.read(6) == b"ARROW1"
    with pyarrow.memory_map(str(path)) as source:
        if whole:
            reader: Any = pyarrow.ipc.open_file(source)
            yield from (reader.get_batch(i) for i in range(reader.num_record_batches))
        else:
            yield from cast(Iterable[Any], pyarrow.ipc.open_stream(source))


def _batches(batches: Iterable[Any], path: Path) -> Iterator[Row]:
    number = 0
    for batch in batches:
        try:
            batch.validate(full=True)  # a damaged offset would read memory that is not the table's
            rows = batch.to_pylist()
        except Exception as fault:  # see above
            why = f"the rows from {number} on cannot be read: {first_line(fault)}"
            raise PalateError(f"{path}: row {number}: {why}. Fetch it again.") from None
        for values in rows:
            yield Row(values, f"{path}: row {number}")
            number += 1


def is_saved(path: Path) -> bool:
    """Whether a folder was written by `save_to_disk`."""
    return any((path / name).is_file() for name in ("state.json", "dataset_dict.json"))


def read_saved(path: Path, split: str) -> Iterator[Row]:
    """The rows of a folder written by `datasets`' `save_to_disk`; of its `split` where it has several."""
    import datasets

    try:
        for file in sorted(path.rglob("*.arrow")):
            for batch in _arrow_batches(file):
                batch.validate(full=True)
        found: Any = datasets.load_from_disk(str(path))
    except Exception as fault:  # see above
        raise PalateError(f"{path}: not a saved dataset: {first_line(fault)}. Save it again.") from None
    if isinstance(found, datasets.DatasetDict):
        if split not in found:
            known = listed(found)
            raise PalateError(one_line(f"{path}: split: there is no split {split!r}. Known: {known}."))
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
        why = f"no file here, and not loaded from the hub{offline}: {first_line(fault)}"
        raise PalateError(f"{name}: {why}. {move}.") from None
    return _dataset(found, name)


def _dataset(found: Any, place: str) -> Iterator[Row]:
    if not len(found):
        raise PalateError(f"{place}: {_NO_ROWS}.")
    number = 0
    try:
        for values in found:
            yield Row(values, f"{place}: row {number}")
            number += 1
    except PalateError:
        raise
    except Exception as fault:  # see above
        raise PalateError(f"{place}: row {number}: cannot be read: {first_line(fault)}. Save it again.") from None


def first_line(fault: BaseException) -> str:
    """What an exception says, short enough for an error line."""
    lines = str(fault).strip().splitlines()
    return one_line(lines[0].rstrip(".")) if lines else type(fault).__name__
