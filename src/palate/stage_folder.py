"""What a stage's folder remembers: what it was made of, whether it is done, and what stood there before."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from palate.checkpoint import CheckpointStore, sha256
from palate.evidence import Evidence
from palate.provenance import now, read_json, write_json, write_text
from palate.settings import PalateError

Say = Callable[[str], None]


@dataclass(frozen=True)
class State:
    """What would become of a stage: made `new`, skipped as `done`, `continue` after `step`, or `again` for a reason.

    `folder` holds the work that is there already; for `again` it is the work that would be set aside.
    """

    what: Literal["new", "done", "continue", "again"]
    folder: Path
    step: int = 0
    because: str = ""


@dataclass(frozen=True)
class StageFolder:
    """The numbered folder of one stage, and the evidence of what is to be made in it.

    `.started` says of what evidence the work in the folder is, `DONE` that it is finished. Work of other evidence is
    neither continued nor lost: it waits in `replaced/` under its own hash, and comes back when it is asked for again.
    """

    path: Path
    evidence: Evidence

    def adopt(self, name: str) -> None:
        """A stage that only changed its place in the order keeps its folder under the new number."""
        if self.path.exists():
            return
        for old in sorted(self.path.parent.glob(f"*-{name}")):
            if old.name.removesuffix(f"-{name}").isdigit():
                old.rename(self.path)
                return

    def state(self, name: str) -> State:
        """What `adopt`, `make_room` and `is_done` would come to, found without touching anything."""
        numbered = (f for f in sorted(self.path.parent.glob(f"*-{name}")) if f.name.removesuffix(f"-{name}").isdigit())
        place = self.path if self.path.exists() else next(numbered, self.path)
        mine = self._aside(self.evidence.hash)
        before = read_json(place / ".started")
        if before and before.get("hash") != self.evidence.hash:
            if not mine.exists():
                kept = replace(self, path=place)._is_worth_keeping()
                why = self.evidence.difference(before.get("evidence", {}))
                return State("again", place, because=f"a change in {why}") if kept else State("new", self.path)
            place = mine
        elif mine.exists() and not place.exists():
            place = mine
        return replace(self, path=place)._standing()

    def _standing(self) -> State:
        """How far the work of this evidence is, in the folder where it lies."""
        done = read_json(self.path / "DONE")
        if done.get("hash") == self.evidence.hash:
            if done.get("outputs") == self._outputs():
                return State("done", self.path)
            return State("again", self.path, because="its model is not as DONE left it")
        steps = CheckpointStore(self.path / "checkpoints").steps()
        return State("continue", self.path, step=steps[0]) if steps else State("new", self.path)

    def refuse_changed_data(self, name: str, policy: str) -> None:
        """Raise PalateError when data changed under work that is half done: going on would mix two data sets."""
        before = read_json(self.path / ".started")
        half_done = (self.path / "checkpoints").exists() and not (self.path / "DONE").exists()
        if policy == "restart" or not half_done or not before or self._aside(self.evidence.hash).exists():
            return
        old, new = dict(before.get("evidence", {})), dict(self.evidence.parts)
        files, now = dict(old.pop("files", {})), dict(new.pop("files", {}))
        changed = [file for file, digest in now.items() if file in files and files[file] != digest]
        if changed and old == new:
            raise PalateError(
                f"{changed[0]}: it changed since stage {name!r} began, which is half done in {self.path}. Put the old "
                "file back to go on, or set changed_data=restart to begin the stage again; nothing is lost either way."
            )

    def make_room(self, say: Say) -> Path | None:
        """Move work of other evidence aside, and bring back this one's; returns where the other now is."""
        aside = self._set_aside(say)
        mine = self._aside(self.evidence.hash)
        if mine.exists() and not self.path.exists():
            mine.rename(self.path)
        return aside

    def _set_aside(self, say: Say) -> Path | None:
        before = read_json(self.path / ".started")
        if not before or before.get("hash") == self.evidence.hash:
            return None
        if not self._is_worth_keeping():
            shutil.rmtree(self.path)
            return None
        aside = self._aside(str(before.get("hash")))
        shutil.rmtree(aside, ignore_errors=True)
        aside.parent.mkdir(exist_ok=True)
        self.path.rename(aside)
        why = self.evidence.difference(before.get("evidence", {}))
        say(f"{self.path.name}: runs again, because of a change in {why}; what it made before is in {aside}")
        return aside

    def _aside(self, name: str) -> Path:
        return self.path.parent / "replaced" / f"{self.path.name}-{name[:8]}"

    def _is_worth_keeping(self) -> bool:
        return (self.path / "DONE").exists() or (self.path / "checkpoints").exists()

    def is_done(self, warn: Say) -> bool:
        """Whether this very work is finished and its model is as it was left."""
        done = read_json(self.path / "DONE")
        if done.get("hash") != self.evidence.hash:
            return False
        if done.get("outputs") == self._outputs():
            shutil.rmtree(self.path / "checkpoints", ignore_errors=True)  # a kill right behind DONE leaves them
            return True
        warn(f"{self.path}: its model is not as DONE left it; the stage runs again.")
        (self.path / "DONE").unlink()
        return False

    def start(self, settings: str) -> None:
        """Write down what is about to be made."""
        self.path.mkdir(exist_ok=True)
        write_text(self.path / "stage.yaml", settings)
        write_json(self.path / ".started", {"hash": self.evidence.hash, "evidence": self.evidence.parts})

    def give_way(self, aside: Path | None) -> None:
        """The work could not even begin: what it displaced comes back."""
        if aside is not None and not self._is_worth_keeping():
            shutil.rmtree(self.path)
            aside.rename(self.path)

    def finish(self, seconds: float) -> None:
        """The work is done: say so, and let its checkpoints go."""
        said = {"hash": self.evidence.hash, "evidence": self.evidence.parts, "outputs": self._outputs()}
        write_json(self.path / "DONE", {**said, "finished": now(), "seconds": round(seconds, 3)})
        shutil.rmtree(self.path / "checkpoints", ignore_errors=True)

    def _outputs(self) -> dict[str, str]:
        """What the stage made for later stages: file names and the sha256 of each, so that a flipped bit shows."""
        model = self.path / "model"
        files = sorted(f for f in model.rglob("*") if f.is_file()) if model.is_dir() else []
        return {str(f.relative_to(self.path)): sha256(f) for f in files}
