"""Checkpoints that are whole or not there: staged, fsynced, hashed, renamed; safetensors and JSON only.

    checkpoints/step-00000120/
      tensors-000.safetensors …   at most two GiB each
      state.json                  step, sha256 of each tensors file, names that share one tensor, the caller's own state
      MANIFEST.json               size and sha256 of each file above, written last

A save builds a hidden folder, makes every file durable, writes the manifest, renames the folder into place
and makes the rename durable; only then are older checkpoints removed. A process killed anywhere, or a full
disk, leaves the checkpoint before it untouched. A load takes the newest folder that holds the files of its
manifest and no others, every byte as the manifest says. A removal renames to a hidden name first, so a kill in the
middle of it leaves no torn checkpoint to be seen; the next save sweeps what is left.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from palate.settings import PalateError

FORMAT = "palate-checkpoint-2"
_SHARD_BYTES = 2 << 30
_MANIFEST = "MANIFEST.json"
_STAGED, _REMOVED = ".staged-", ".removed-"
_NAME = re.compile(r"step-(\d{8,})(\.before)?")

Checkpoint = tuple[int, dict[str, Tensor], dict[str, Any]]


class _Damaged(Exception):
    """Why a checkpoint folder cannot be trusted."""


def _warn(text: str) -> None:
    warnings.warn(text, RuntimeWarning, stacklevel=3)


class CheckpointStore:
    """The checkpoints of one stage, in `folder`. `warn` hears which checkpoint was skipped, and why."""

    def __init__(self, folder: Path, keep: int = 2, warn: Callable[[str], None] = _warn) -> None:
        self.folder = folder
        self.keep = keep
        self._warn = warn

    def save(self, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> Path:
        """Write the checkpoint of `step` and return its folder, then prune to `keep`.

        Names that hold the very same tensor (tied weights) are stored once and come back as one tensor.
        `state` is JSON: string keys, lists, numbers, strings, booleans, None; tuples come back as lists. A
        disk that fills up raises PalateError and leaves the earlier checkpoints as they were.
        """
        _refuse_other_keys(state, "state")
        staged = self.folder / f"{_STAGED}{step:08d}"
        try:
            with system_faults(self.folder):
                self._sweep()
                staged.mkdir(parents=True)
                _write(staged, step, tensors, state)
                final = self._put_in_place(staged, step)
        except OSError as fault:
            shutil.rmtree(staged, ignore_errors=True)
            raise PalateError(self._why_not_saved(step, fault)) from fault
        self._forget_the_future(step)
        self.prune(self.keep)
        return final

    def newest(self, step: int | None = None) -> Checkpoint | None:
        """(step, tensors on the CPU, state) of the newest checkpoint that verifies, or None.

        With `step`, of that step's checkpoint only.
        """
        damaged = 0
        for folder in self._folders():
            if step is not None and _order(folder)[0] != step:
                continue
            try:
                return _read(folder)
            except _Damaged as why:
                damaged += 1
                self._warn(f"checkpoint {folder} is skipped: {why}.")
        if damaged and step is None:
            self._warn(f"none of the {damaged} checkpoints in {self.folder} is whole; starting from the beginning.")
        return None

    def prune(self, keep: int) -> None:
        """Remove all but the `keep` newest checkpoints; the newest always stays."""
        for folder in self._folders()[max(keep, 1) :]:
            self._remove(folder)

    def forget(self, step: int) -> None:
        """Remove the checkpoint of `step` and all later ones: what they say is not to be gone on from."""
        self._forget_the_future(step - 1)

    def steps(self) -> list[int]:
        """The steps that have a checkpoint folder, newest first, not yet verified."""
        return [_order(folder)[0] for folder in self._folders()]

    def _folders(self) -> list[Path]:
        found = self.folder.iterdir() if self.folder.is_dir() else ()
        return sorted((f for f in found if _NAME.fullmatch(f.name) and f.is_dir()), key=_order, reverse=True)

    def _sweep(self) -> None:
        for hidden in (f"{_STAGED}*", f"{_REMOVED}*"):
            for left_over in self.folder.glob(hidden):
                _delete(left_over)

    def _put_in_place(self, staged: Path, step: int) -> Path:
        """Rename into place. An old checkpoint of this step first steps aside, still readable."""
        final = self.folder / f"step-{step:08d}"
        aside = self.folder / f"{final.name}.before"
        if final.exists():
            self._remove_if_there(aside)
            final.rename(aside)
        staged.rename(final)
        sync_folder(self.folder)
        self._remove_if_there(aside)
        return final

    def _remove_if_there(self, folder: Path) -> None:
        if os.path.lexists(folder):
            self._remove(folder)

    def _forget_the_future(self, step: int) -> None:
        """Later steps are damaged ones this run went back behind: what they said no longer happened."""
        for folder in self._folders():
            if _order(folder)[0] > step:
                self._remove(folder)

    def _remove(self, folder: Path) -> None:
        """Out of sight in one step, then gone. What cannot be removed is told and is no reason to stop."""
        hidden = self.folder / f"{_REMOVED}{folder.name}"
        try:
            _delete(hidden)
            folder.rename(hidden)
            _delete(hidden)
        except OSError as fault:
            self._warn(f"the old checkpoint {folder} could not be removed: {fault}. Remove it to save room.")

    def _why_not_saved(self, step: int, fault: OSError) -> str:
        kept = self.steps()
        safe = f"The checkpoint of step {kept[0]} is untouched." if kept else "There is no earlier checkpoint."
        what = "the disk is full" if fault.errno in (errno.ENOSPC, errno.EDQUOT) else str(fault)
        return (
            f"{self.folder}: the checkpoint of step {step} could not be written: {what}. {safe} "
            "Make room and run the same command again."
        )


@contextmanager
def system_faults(place: Path) -> Generator[None]:
    """What the system refused while `place` was written, as OSError: safetensors and tokenizers, which are not written
    in Python, spell it inside exceptions of their own.
    """
    try:
        yield
    except OSError:
        raise
    except Exception as fault:  # tokenizers raises the bare class
        code = re.search(r"os error (\d+)", str(fault))
        if code is None:
            raise
        raise OSError(int(code[1]), os.strerror(int(code[1])), str(place)) from fault


def _delete(path: Path) -> None:
    """Remove a folder with all it holds, or whatever else has its name."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _order(folder: Path) -> tuple[int, bool]:
    step, _, before = folder.name.removeprefix("step-").partition(".")
    return int(step), not before


def _refuse_other_keys(value: Any, place: str) -> None:
    """JSON would turn the key 1 into "1" in silence, and a resumed run would not find it."""
    if isinstance(value, Mapping):
        for key, below in cast(Mapping[Any, Any], value).items():
            if not isinstance(key, str):
                raise TypeError(f"{place}: the key {key!r} is not a string")
            _refuse_other_keys(below, f"{place}.{key}")
    elif isinstance(value, list | tuple):
        for index, below in enumerate(cast(list[Any], value)):
            _refuse_other_keys(below, f"{place}.{index}")


def _write(folder: Path, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    unique, shared = _untie(tensors)
    for number, shard in enumerate(_shards(unique)):
        save_file(shard, folder / f"tensors-{number:03d}.safetensors")
    # The digests stand here too: a manifest that was made to fit other tensors does not fit this file.
    digests = {f.name: sha256(f) for f in sorted(folder.iterdir())}
    body = {"step": step, "tensors": digests, "shared": shared, "state": state}
    (folder / "state.json").write_text(json.dumps(body), encoding="utf-8")  # ASCII: half a character has no UTF-8
    digests["state.json"] = sha256(folder / "state.json")
    files = {name: {"bytes": (folder / name).stat().st_size, "sha256": digests[name]} for name in sorted(digests)}
    for name in files:
        sync_file(folder / name)
    manifest = folder / _MANIFEST
    manifest.write_text(_manifest_text(files), encoding="utf-8")
    sync_file(manifest)
    sync_folder(folder)


def _manifest_text(files: Mapping[str, Any]) -> str:
    """One spelling only, so that any changed byte of a manifest shows."""
    return json.dumps({"format": FORMAT, "files": files}, indent=1, sort_keys=True) + "\n"


def _untie(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Contiguous CPU tensors that share no memory, and for each name left out the one that holds it."""
    unique: dict[str, Tensor] = {}
    shared: dict[str, str] = {}
    names: dict[tuple[Any, ...], str] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        place = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if tensor.numel() and place in names:
            shared[name] = names[place]
            continue
        names[place] = name
        storage = tensor.untyped_storage().data_ptr()
        whole = tensor.detach().to("cpu").contiguous()
        overlaps = storage in storages and whole.data_ptr() == tensor.data_ptr()
        unique[name] = whole.clone() if overlaps else whole
        storages.add(storage)
    return unique, shared


def _shards(tensors: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """Parts of at most two GiB (one tensor at least), so that writing needs little memory of its own."""
    part: dict[str, Tensor] = {}
    held = 0
    for name, tensor in tensors.items():
        if part and held + tensor.nbytes > _SHARD_BYTES:
            yield part
            part, held = {}, 0
        part[name] = tensor
        held += tensor.nbytes
    yield part


def _read(folder: Path) -> Checkpoint:
    digests = _verified(folder)
    try:
        body = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        if body["tensors"] != {name: digest for name, digest in digests.items() if name != "state.json"}:
            raise _Damaged("its state was saved with other tensors")
        tensors: dict[str, Tensor] = {}
        for name in body["tensors"]:
            tensors |= load_file(folder / name)
        tensors |= {name: tensors[holder] for name, holder in body["shared"].items()}
        step, state = int(body["step"]), dict(body["state"])
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as fault:
        raise _Damaged(f"it cannot be read: {fault}") from fault
    if step != _order(folder)[0]:
        raise _Damaged(f"its state is that of step {step}")
    return step, tensors, state


def _verified(folder: Path) -> dict[str, str]:
    """The files of a checkpoint with their digests: those of its manifest and no others, each as it says."""
    try:
        files = _manifest(folder)
        there = {path.name for path in folder.iterdir()} - {_MANIFEST}
        if there != set(files):
            raise _Damaged(
                f"its manifest speaks of {_named(set(files) - there)}, it holds {_named(there - set(files))}"
            )
        for name, said in files.items():
            _verify(folder / name, said)
        return {name: said["sha256"] for name, said in files.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as fault:
        raise _Damaged(f"it is not whole: {fault}") from fault


def _manifest(folder: Path) -> dict[str, dict[str, Any]]:
    """What the manifest says of each file. A name that leads out of the folder is refused."""
    if folder.is_symlink() or (folder / _MANIFEST).is_symlink():
        raise _Damaged("it is a link, and what a link leads to may change")
    text = (folder / _MANIFEST).read_text(encoding="utf-8")
    said = json.loads(text)
    if said["format"] != FORMAT:
        raise _Damaged(f"its format is {said['format']!r}, this palate reads {FORMAT!r}")
    files = cast(dict[str, dict[str, Any]], said["files"])
    if text != _manifest_text(files):
        raise _Damaged(f"{_MANIFEST} was changed")
    for name in files:
        if name in (".", "..", _MANIFEST) or set(name) & set("/\\\0"):
            raise _Damaged(f"{_MANIFEST} names {name!r}, which is no file of this folder")
    return files


def _verify(path: Path, said: Mapping[str, Any]) -> None:
    if path.is_symlink() or not path.is_file():
        raise _Damaged(f"{path.name} is no plain file")
    if path.stat().st_size != said["bytes"]:
        raise _Damaged(f"{path.name} has {path.stat().st_size} bytes, its manifest says {said['bytes']}")
    if sha256(path) != said["sha256"]:
        raise _Damaged(f"{path.name} does not have the sha256 its manifest says")


def _named(files: set[str]) -> str:
    return ", ".join(sorted(files)[:3]) or "nothing"


def sha256(path: Path) -> str:
    """The sha256 of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync_file(path: Path) -> None:
    """Make a file's content durable."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Make the names inside a folder durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
