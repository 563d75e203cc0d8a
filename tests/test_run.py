"""A run: refused at the door when wrong, done once, continued after a kill, never two at a time."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from palate.live import Display
from palate.run import Outcome, execute, plan, plan_file
from palate.settings import PalateError

STAGES = '''
"""A stage small enough to follow: it adds 0.1 a number of times, and can stop dead on the way."""

import os
import signal
from pathlib import Path

import torch
from palate.settings import Choice, PalateError


class Count(Choice):
    """Counts."""

    name: str = "count"
    """Its name."""
    steps: int = 5
    """How often it adds."""
    start: str | None = None
    """Another counting stage to go on from."""
    data: str | None = None
    """A file whose length is added first."""
    die_at: int | None = None
    """Kill the process after this step, once."""
    raise_at: int | None = None
    """Raise after this step."""
    sabotage: str | None = None
    """A file whose presence switches die_at off."""

    def references(self):
        return [self.start.removeprefix("stage:")] if self.start else []

    def files(self):
        return [self.data] if self.data else []

    def run(self, here):
        total = torch.zeros(1, dtype=torch.float64)
        if self.start:
            total += float((here.resolve(self.start) / "total.txt").read_text())
        if self.data:
            total += Path(self.data).stat().st_size
        if not self.steps:
            raise PalateError("nothing to count")
        done = 0
        found = here.store.newest()
        if found is not None:
            done, tensors, _ = found
            total = tensors["total"]
            here.resume(done)
        with here.progress(self.steps, self.name, done=done) as bar:
            for step in range(done + 1, self.steps + 1):
                total = total + 0.1
                here.log(step, {"loss": float(total)})
                here.sample(step, [{"prompt": "how many", "completion": str(float(total))}])
                bar.advance({"loss": float(total)})
                if step % 2 == 0:
                    here.store.save(step, {"total": total}, {"step": step})
                if step == self.raise_at:
                    raise ValueError("asked to raise")
                if step == self.die_at and not Path(self.sabotage).exists():
                    Path(self.sabotage).touch()
                    os.kill(os.getpid(), signal.SIGKILL)
        (here.folder / "model").mkdir(exist_ok=True)
        (here.folder / "model" / "total.txt").write_text(repr(float(total)))


class Nothing(Choice):
    """Not a stage."""
'''


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a user's own stage in `counting_lab.py`, as the working directory."""
    (tmp_path / "counting_lab.py").write_text(STAGES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "counting_lab", raising=False)
    return tmp_path


def _count(**settings: Any) -> dict[str, Any]:
    return {"kind": "counting_lab:Count", **settings}


def _display() -> Display:
    return Display(Console(quiet=True))


def _run(*stages: dict[str, Any], **more: Any) -> Outcome:
    return execute(plan({"name": "trial", "stages": list(stages), **more}), _display())


def _total(folder: Path) -> float:
    return float((folder / "model" / "total.txt").read_text())


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_folder_holds_what_was_asked_and_what_came_of_it(lab: Path) -> None:
    (lab / "trial.yaml").write_text(yaml.safe_dump({"seed": 3, "stages": [_count(steps=4), _count(name="more")]}))
    outcome = execute(plan_file(Path("trial.yaml"), ["stages.more.steps=3"]), _display(), ["palate", "run"])
    run = lab / "runs" / "trial"
    assert outcome.folder.resolve() == run
    assert sorted(p.name for p in run.iterdir() if not p.name.startswith(".")) == [
        "1-count", "2-more", "provenance.json", "resolved.yaml", "run.yaml",
    ]  # fmt: skip
    assert [s.metrics["step"] for s in outcome.stages] == [4, 3]
    said = json.loads((run / "provenance.json").read_text())
    assert said["seed"] == 3
    assert said["command"] == ["palate", "run"]
    assert said["versions"]["torch"]
    assert said["hardware"]["cores"] == os.cpu_count()


def test_every_resolved_value_names_its_origin_and_can_be_run_again(lab: Path) -> None:
    (lab / "trial.yaml").write_text(yaml.safe_dump({"seed": 3, "stages": [_count(steps=4)]}))
    execute(plan_file(Path("trial.yaml"), ["stages.0.data=trial.yaml", "keep_checkpoints=1"]), _display())
    text = (lab / "runs" / "trial" / "resolved.yaml").read_text()
    origins = {line.split(":")[0].strip(" -"): line.rpartition("# ")[2] for line in text.splitlines() if "#" in line}
    assert origins["seed"] == "file"
    assert origins["steps"] == "file"
    assert origins["data"] == "command line"
    assert origins["keep_checkpoints"] == "command line"
    assert origins["die_at"] == "default"
    again = plan_file(lab / "runs" / "trial" / "resolved.yaml")
    assert again.resolved["stages"][0]["steps"] == 4
    assert yaml.safe_load((lab / "runs" / "trial" / "1-count" / "stage.yaml").read_text())["data"] == "trial.yaml"


def test_a_stage_that_is_done_is_skipped_and_only_what_depends_on_a_change_runs_again(lab: Path) -> None:
    first = _run(_count(name="a"), _count(name="b", start="stage:a"), _count(name="c"))
    assert [s.skipped for s in first.stages] == [False, False, False]
    second = _run(_count(name="a"), _count(name="b", start="stage:a"), _count(name="c"))
    assert [s.skipped for s in second.stages] == [True, True, True]
    third = _run(_count(name="a", steps=6), _count(name="b", start="stage:a"), _count(name="c"))
    assert [s.skipped for s in third.stages] == [False, False, True]
    assert _total(third.folder / "2-b") == pytest.approx(1.1)
    aside = third.folder / "replaced"
    assert sorted(p.name[:3] for p in aside.iterdir()) == ["1-a", "2-b"]
    assert _total(next(aside.glob("2-b-*"))) == pytest.approx(1.0)
    fourth = _run(_count(name="a", steps=6), _count(name="b", start="stage:a", steps=6), _count(name="c"))
    assert [s.skipped for s in fourth.stages] == [True, False, True]
    fifth = _run(_count(name="a"), _count(name="b", start="stage:a"), _count(name="c"))
    assert [s.skipped for s in fifth.stages] == [True, True, True], "settings asked for again are brought back"
    assert _total(fifth.folder / "2-b") == pytest.approx(1.0)


@pytest.mark.parametrize("what", ["data", "code", "seed", "model", "bit"])
def test_a_stage_runs_again_when_what_it_depends_on_changed(lab: Path, what: str) -> None:
    (lab / "data.txt").write_text("four")
    seed = 1
    before = _run(_count(data="data.txt"), seed=seed)
    if what == "data":
        (lab / "data.txt").write_text("five!")
    elif what == "code":
        (lab / "counting_lab.py").write_text(STAGES + "\n")
    elif what == "seed":
        seed = 2
    elif what == "bit":
        made = before.folder / "1-count" / "model" / "total.txt"
        made.write_bytes(bytes([made.read_bytes()[0] ^ 1]) + made.read_bytes()[1:])
    else:
        (before.folder / "1-count" / "model" / "total.txt").unlink()
    assert not _run(_count(data="data.txt"), seed=seed).stages[0].skipped


def test_a_stage_that_moved_in_the_order_keeps_its_work(lab: Path) -> None:
    _run(_count(name="b"))
    after = _run(_count(name="a"), _count(name="b"))
    assert [s.skipped for s in after.stages] == [False, True]
    assert sorted(p.name for p in after.folder.glob("[0-9]*")) == ["1-a", "2-b"]


COMMAND = """
    import sys
    from pathlib import Path
    from rich.console import Console
    from palate.live import Display
    from palate.run import execute, plan_file
    execute(plan_file(Path(sys.argv[1])), Display(Console(quiet=True)))
"""


def _process(lab: Path, recipe: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(COMMAND), recipe],
        cwd=lab, env={**os.environ, "PYTHONPATH": str(lab)}, capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_killed_and_started_again_it_is_the_run_that_was_never_killed(lab: Path) -> None:
    whole = {"steps": 9, "sabotage": str(lab / "died")}
    (lab / "whole.yaml").write_text(yaml.safe_dump({"stages": [_count(**whole)]}))
    (lab / "torn.yaml").write_text(yaml.safe_dump({"stages": [_count(**whole, die_at=5)]}))
    assert _process(lab, "whole.yaml").returncode == 0
    assert _process(lab, "torn.yaml").returncode == -signal.SIGKILL
    torn = lab / "runs" / "torn" / "1-count"
    assert [row["step"] for row in _rows(torn / "metrics.jsonl")] == [1, 2, 3, 4, 5]
    with (torn / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')  # as a kill in the middle of a write leaves it
    again = _process(lab, "torn.yaml")
    assert again.returncode == 0, again.stderr
    calm = lab / "runs" / "whole" / "1-count"
    for name in ("metrics.jsonl", "samples.jsonl", "model/total.txt"):
        assert (torn / name).read_bytes() == (calm / name).read_bytes(), name


def test_a_damaged_checkpoint_is_told_about_and_the_one_before_is_used(lab: Path) -> None:
    settings = _count(steps=9, raise_at=7)
    with pytest.raises(ValueError, match="asked to raise"):
        _run(settings)
    folder = lab / "runs" / "trial" / "1-count"
    newest = folder / "checkpoints" / "step-00000006" / "tensors-000.safetensors"
    content = bytearray(newest.read_bytes())
    content[-1] ^= 1
    newest.write_bytes(content)
    with pytest.raises(ValueError, match="asked to raise"):
        _run(settings)
    assert "step-00000006 is skipped" in _rows(folder / "warnings.jsonl")[0]["warning"]
    assert [row["step"] for row in _rows(folder / "metrics.jsonl")] == list(range(1, 8))


def test_a_stage_begun_under_other_settings_is_not_continued(lab: Path) -> None:
    with pytest.raises(ValueError, match="asked to raise"):
        _run(_count(steps=4, raise_at=3))
    after = _run(_count(steps=4))
    assert _total(after.folder / "1-count") == pytest.approx(0.4)
    assert len(list(after.folder.glob("replaced/1-count-*/metrics.jsonl"))) == 1


def test_a_run_that_could_not_begin_displaces_nothing(lab: Path) -> None:
    before = _run(_count())
    with pytest.raises(PalateError, match="nothing to count"):
        _run(_count(steps=0))
    assert (before.folder / "1-count" / "DONE").exists()
    assert _run(_count()).stages[0].skipped


def test_data_that_changed_under_a_half_done_stage_is_refused_and_nothing_is_lost(lab: Path) -> None:
    (lab / "data.txt").write_text("four")
    settings = _count(steps=9, data="data.txt", raise_at=5)
    with pytest.raises(ValueError, match="asked to raise"):
        _run(settings)
    folder = lab / "runs" / "trial" / "1-count"
    before = {p.name: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    (lab / "data.txt").write_text("five!")
    with pytest.raises(PalateError, match=r"data\.txt: it changed since stage 'count' began, which is half done in"):
        _run(settings)
    assert {p.name: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before
    (lab / "data.txt").write_text("four")
    with pytest.raises(ValueError, match="asked to raise"):
        _run(settings)  # the old file is back: it goes on from step 4, and raises at step 5 again
    assert [row["step"] for row in _rows(folder / "metrics.jsonl")] == [1, 2, 3, 4, 5]
    (lab / "data.txt").write_text("five!")
    with pytest.raises(ValueError, match="asked to raise"):
        _run(settings, changed_data="restart")
    assert _rows(folder / "metrics.jsonl")[0]["loss"] == pytest.approx(5.1)
    assert len(list(folder.parent.glob("replaced/1-count-*/checkpoints"))) == 1


def test_settings_that_changed_with_the_data_begin_the_stage_again(lab: Path) -> None:
    (lab / "data.txt").write_text("four")
    with pytest.raises(ValueError, match="asked to raise"):
        _run(_count(steps=9, data="data.txt", raise_at=5))
    (lab / "data.txt").write_text("five!")
    assert _total(_run(_count(steps=3, data="data.txt")).folder / "1-count") == pytest.approx(5.3)


def test_a_full_disk_is_one_message(lab: Path) -> None:
    (lab / "full_lab.py").write_text(FULL)
    with pytest.raises(PalateError, match=r"runs/full: the disk is full\. What was saved before is whole\. Make room"):
        execute(plan({"name": "full", "stages": [{"kind": "full_lab:Full"}]}), _display())


FULL = '''
from palate.settings import Choice


class Full(Choice):
    """Writes where there is no room."""

    name: str = "full"
    """Its name."""

    def references(self):
        return []

    def files(self):
        return []

    def run(self, here):
        with open("/dev/full", "w") as file:
            file.write("x" * 100_000)
'''


HOLDER = """
    import sys, time
    from pathlib import Path
    from palate.run import held
    with held(Path(sys.argv[1])):
        print("held", flush=True)
        sys.stdin.read()
"""


def test_a_second_process_in_the_same_run_directory_is_refused(lab: Path) -> None:
    run = lab / "runs" / "trial"
    run.mkdir(parents=True)
    holder = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(HOLDER), str(run)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(PalateError, match=f"process {holder.pid} is already at work in this run directory"):
        _run(_count())
    assert not (run / "run.yaml").exists()
    holder.kill()
    holder.communicate()
    assert _run(_count()).stages[0].metrics["step"] == 5


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"stages": [_count(stepz=1)]}, r"stages\.0: there is no setting 'stepz'\. Did you mean 'steps'\?"),
        ({"stages": [_count(steps="many")]}, r"stages\.0\.steps: .*integer.*'many'"),
        ({"stages": [{"name": "x"}]}, r"stages\.0: 'kind' is missing"),
        ({"stages": [{"kind": "trian"}]}, r"stages\.0\.kind: no stage is called 'trian'\. Did you mean 'train'"),
        ({"stages": [{"kind": "counting_lab:Gone"}]}, r"stages\.0\.kind: cannot load 'counting_lab:Gone'"),
        ({"stages": [{"kind": "counting_lab:Nothing"}]}, r"stages\.0\.kind: 'counting_lab:Nothing' is no stage"),
        ({"stages": []}, "stages: "),
        ({"stages": "sft"}, "stages: "),
        ({"stagse": []}, r"there is no setting 'stagse'\. Did you mean 'stages'\?"),
        ({"stages": [_count()], "name": "../out"}, r"name: '\.\./out' cannot be a folder name"),
        ({"stages": [_count(name="a/b")]}, r"stages\.0\.name: 'a/b' cannot be a folder name"),
        ({"stages": [_count()], "report_to": ["tensorbord"]}, r"'tensorbord'\. Did you mean 'tensorboard'\?"),
        ({"stages": [_count(), _count()]}, r"stages\.1\.name: 'count' is taken by stages\.0"),
        (
            {"stages": [_count(name="reward"), _count(name="rlhf", start="stage:rewrad")]},
            r"stages\.1: stage 'rlhf' reads 'stage:rewrad', but no stage before it has that name\. "
            r"Did you mean 'reward'\? Stages before it: reward\. Add a 'rewrad' stage",
        ),
        (
            {"stages": [_count(name="rlhf", start="stage:reward"), _count(name="reward")]},
            r"stages\.0: stage 'rlhf' reads 'stage:reward', which does not come before it\. Move stage 'reward' up",
        ),
        ({"stages": [_count(name="a", start="stage:a")]}, r"stages\.0: stage 'a' reads 'stage:a', which does not come"),
    ],
)
def test_a_fault_in_the_settings_is_found_before_anything_runs(lab: Path, given: dict[str, Any], message: str) -> None:
    with pytest.raises(PalateError, match=message):
        plan({"name": "trial", **given})
    assert not (lab / "runs").exists()
