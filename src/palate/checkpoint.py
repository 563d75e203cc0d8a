"""Checkpoints that are whole or not there: staged, fsynced, hashed, renamed; safetensors and JSON only.

    checkpoints/step-00000120/
      tensors-000.safetensors …   at most two GiB each
      state.json                  step, names that share one tensor, and the caller's own state
      MANIFEST.json               size and sha256 of each file above, written last

A save builds a hidden folder, makes every file durable, writes the manifest, renames the folder into place
and makes the rename durable; only then are older checkpoints removed. A process killed anywhere, or a full
disk, leaves the checkpoint before it untouched. A load takes the newest folder whose every byte is what its
manifest says.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from palate.settings import PalateError

FORMAT = "palate-checkpoint-1"
_SHARD_BYTES = 2 << 30
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
        staged = self.folder / f".staged-{step:08d}"
        try:
            self._sweep()
            staged.mkdir(parents=True)
            _write(staged, step, tensors, state)
            final = self._put_in_place(staged, step)
        except (OSError, SafetensorError) as fault:
            shutil.rmtree(staged, ignore_errors=True)
            raise PalateError(self._why_not_saved(step, fault)) from fault
        self._forget_the_future(step)
        self.prune(self.keep)
        return final

    def newest(self) -> Checkpoint | None:
        """(step, tensors on the CPU, state) of the newest checkpoint that verifies, or None."""
        damaged = 0
        for folder in self._folders():
            try:
                return _read(folder)
            except _Damaged as why:
                damaged += 1
                self._warn(f"checkpoint {folder} is skipped: {why}.")
        if damaged:
            self._warn(f"none of the {damaged} checkpoints in {self.folder} is whole; starting from the beginning.")
        return None

    def prune(self, keep: int) -> None:
        """Remove all but the `keep` newest checkpoints; the newest always stays."""
        for folder in self._folders()[max(keep, 1) :]:
            shutil.rmtree(folder)

    def steps(self) -> list[int]:
        """The steps that have a checkpoint folder, newest first, not yet verified."""
        return [_order(folder)[0] for folder in self._folders()]

    def _folders(self) -> list[Path]:
        found = self.folder.iterdir() if self.folder.is_dir() else ()
        return sorted((f for f in found if _NAME.fullmatch(f.name) and f.is_dir()), key=_order, reverse=True)

    def _sweep(self) -> None:
        for left_over in self.folder.glob(".staged-*"):
            shutil.rmtree(left_over)

    def _put_in_place(self, staged: Path, step: int) -> Path:
        """Rename into place. An old checkpoint of this step first steps aside, still readable."""
        final = self.folder / f"step-{step:08d}"
        aside = self.folder / f"{final.name}.before"
        if final.exists():
            shutil.rmtree(aside, ignore_errors=True)
            final.rename(aside)
        staged.rename(final)
        _sync_folder(self.folder)
        shutil.rmtree(aside, ignore_errors=True)
        return final

    def _forget_the_future(self, step: int) -> None:
        """Later steps are damaged ones this run went back behind: what they said no longer happened."""
        for folder in self._folders():
            if _order(folder)[0] > step:
                shutil.rmtree(folder)

    def _why_not_saved(self, step: int, fault: Exception) -> str:
        kept = self.steps()
        safe = f"The checkpoint of step {kept[0]} is untouched." if kept else "There is no earlier checkpoint."
        full = isinstance(fault, OSError) and fault.errno in (errno.ENOSPC, errno.EDQUOT)
        what = "the disk is full" if full or "No space left" in str(fault) else str(fault)
        return (
            f"{self.folder}: the checkpoint of step {step} could not be written: {what}. {safe} "
            "Make room and run the same command again."
        )


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
    body = {"step": step, "shared": shared, "state": state}
    (folder / "state.json").write_text(json.dumps(body, ensure_ascii=False), encoding="utf-8")
    files = {f.name: {"bytes": f.stat().st_size, "sha256": sha256(f)} for f in sorted(folder.iterdir())}
    for name in files:
        _sync_file(folder / name)
    manifest = folder / "MANIFEST.json"
    manifest.write_text(_manifest_text(files), encoding="utf-8")
    _sync_file(manifest)
    _sync_folder(folder)


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
    names = _verified(folder)
    try:
        body = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        tensors: dict[str, Tensor] = {}
        for name in names:
            if name.endswith(".safetensors"):
                tensors |= load_file(folder / name)
        tensors |= {name: tensors[holder] for name, holder in body["shared"].items()}
        step, state = int(body["step"]), dict(body["state"])
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as fault:
        raise _Damaged(f"it cannot be read: {fault}") from fault
    if step != _order(folder)[0]:
        raise _Damaged(f"its state is that of step {step}")
    return step, tensors, state


def _verified(folder: Path) -> list[str]:
    """The files of a checkpoint, each exactly as its manifest says."""
    try:
        text = (folder / "MANIFEST.json").read_text(encoding="utf-8")
        files = cast(dict[str, dict[str, Any]], json.loads(text)["files"])
        if text != _manifest_text(files):
            raise _Damaged("MANIFEST.json was changed")
        if "state.json" not in files:
            raise _Damaged("MANIFEST.json does not speak of state.json")
        for name, said in files.items():
            path = folder / Path(name).name
            if path.stat().st_size != said["bytes"]:
                raise _Damaged(f"{name} has {path.stat().st_size} bytes, its manifest says {said['bytes']}")
            if sha256(path) != said["sha256"]:
                raise _Damaged(f"{name} does not have the sha256 its manifest says")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as fault:
        raise _Damaged(f"it is not whole: {fault}") from fault
    return sorted(files)


def sha256(path: Path) -> str:
    """The sha256 of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync_file(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    """Make the names inside a folder durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
