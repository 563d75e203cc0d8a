"""What a stage's folder remembers: what it was made of, whether it is done, and what stood there before."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from palate.evidence import Evidence
from palate.provenance import now, read_json, write_json

Say = Callable[[str], None]


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
            return True
        warn(f"{self.path}: its model is not as DONE left it; the stage runs again.")
        (self.path / "DONE").unlink()
        return False

    def start(self, settings: str) -> None:
        """Write down what is about to be made."""
        self.path.mkdir(exist_ok=True)
        (self.path / "stage.yaml").write_text(settings, encoding="utf-8")
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

    def _outputs(self) -> dict[str, int]:
        """What the stage made for later stages: file names and sizes."""
        model = self.path / "model"
        files = sorted(f for f in model.rglob("*") if f.is_file()) if model.is_dir() else []
        return {str(f.relative_to(self.path)): f.stat().st_size for f in files}
