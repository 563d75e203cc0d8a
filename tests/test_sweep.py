"""Sweeps: which values are tried, what a run is given, what is shared, and what the comparison may claim."""

from __future__ import annotations

import json
import math
import os
import signal
import stat
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from palate.live import Display
from palate.run import held
from palate.settings import PalateError, value_of
from palate.sweep import child, report, sharing, work
from palate.sweep.comparison import Comparison, Row, behind, compare, holm, judged, labels, summary, two_sided
from palate.sweep.conduct import RunsFailed, conduct
from palate.sweep.drawing import horizontal
from palate.sweep.measure import Measure, choose
from palate.sweep.space import LAWS, Drawn, Values, axis, number_text, split
from palate.sweep.sweep import Run, Sweep, plan_sweep, seeds_of
from palate.sweep.trials import Trial, search_of, trials_of

BETA, RATE = "stages.more.algorithm.beta", "stages.more.optimiser.learning_rate"
MODEL = {"hidden_size": 16, "layers": 1, "heads": 2, "vocabulary": 300, "context": 128}
DATA = {"path": "world:tasting_room/demonstrations", "rows": 8}
RECIPE: dict[str, Any] = {
    "stages": [
        {"kind": "train", "name": "sft", "model": MODEL, "data": DATA, "algorithm": {"kind": "sft"}},
        {"kind": "train", "name": "more", "model": "stage:sft", "data": DATA, "algorithm": {"kind": "sft"}},
    ]
}


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe of two stages in a working directory of its own."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "two.yaml"
    path.write_text(yaml.safe_dump(RECIPE))
    return path


def drawn(text: str) -> Drawn:
    found = axis(f"stages.0.x={text}")
    assert isinstance(found, Drawn)
    return found


# -- values ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("1,2,3", ["1", "2", "3"]),
        ("[0.9,0.95],[0.9,0.999]", ["[0.9,0.95]", "[0.9,0.999]"]),
        ("{a: 1, b: 2},{a: 3}", ["{a: 1, b: 2}", "{a: 3}"]),
        ("'a,b',c", ["'a,b'", "c"]),
        ("don't,stop", ["don't", "stop"]),
        ("1,", ["1", ""]),
        ("", []),
    ],
)
def test_commas_inside_brackets_and_quotes_part_nothing(text: str, parts: list[str]) -> None:
    assert split(text) == parts


@pytest.mark.parametrize("text", ["0.1,0.5", "grid(0.1,0.5)", "choice(0.1,0.5)", "grid_search(0.1, 0.5)"])
def test_a_list_may_be_written_in_several_ways(text: str) -> None:
    assert axis(f"{BETA}={text}") == Values(BETA, ("0.1", "0.5"))


@pytest.mark.parametrize("text", ["0.1", "[0.9,0.95]", "{a: 1, b: 2}", "a text", "f(x), or so"[:4], ""])
def test_a_plain_value_is_not_swept(text: str) -> None:
    if text == "f(x)":
        with pytest.raises(PalateError, match="there is no f"):
            axis(f"stages.0.x={text}")
    else:
        assert axis(f"stages.0.x={text}") is None


ARGUMENTS = {
    "uniform": (-2.0, 3.0),
    "quniform": (0.05, 0.98, 0.1),
    "loguniform": (1e-6, 1e-4),
    "qloguniform": (1e-6, 1e-4, 3e-6),
    "randint": (-1, 4),
    "qrandint": (3, 17, 4),
    "lograndint": (1, 1000),
    "qlograndint": (5, 999, 5),
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_every_draw_lies_inside_its_bounds(name: str) -> None:
    numbers = ARGUMENTS[name]
    found = drawn(f"{name}({','.join(map(str, numbers))})")
    uniforms = sorted([2.0**-53, *np.linspace(0, 1, 997, endpoint=False), 1 - 2.0**-53])
    values = [found.quantile(float(u)) for u in uniforms]
    assert min(values) >= numbers[0]
    assert max(values) <= numbers[1]
    assert values == sorted(values), "a quantile function never falls"
    if name in ("randint", "lograndint"):
        assert set(values) >= {numbers[0], numbers[1] - 1}
        assert numbers[1] not in values
    if len(numbers) == 3:
        assert all(abs(v / numbers[2] - round(v / numbers[2])) < 1e-9 for v in values)
    if "randint" in name:
        assert all(isinstance(v, int) for v in values)


def test_the_distributions_are_what_they_are_called() -> None:
    uniforms = (np.arange(20_000) + 0.5) / 20_000

    def draws(text: str) -> Any:
        quantile = drawn(text).quantile
        return np.array([quantile(float(u)) for u in uniforms])

    assert draws("uniform(2,6)").mean() == pytest.approx(4, rel=1e-6)
    assert np.log(draws("loguniform(1e-6,1e-2)")).mean() == pytest.approx(np.log(1e-4), rel=1e-6)
    values, counts = np.unique(draws("randint(1,5)"), return_counts=True)
    assert list(values) == [1, 2, 3, 4]
    assert set(counts) == {5000}
    normal = draws("normal(3,0.5)")
    assert normal.mean() == pytest.approx(3, abs=1e-6)
    assert normal.std() == pytest.approx(0.5, rel=1e-3)
    # The share of lograndint that is below 10 of 1…999 is a third: each decade is as likely.
    assert (draws("lograndint(1,1000)") < 10).mean() == pytest.approx(1 / 3, abs=1e-3)
    assert sorted(np.unique(draws("quniform(0,1,0.25)"))) == [0, 0.25, 0.5, 0.75, 1]


@pytest.mark.parametrize("value", [1e-05, 1.5e-07, 0.1, 3, 1e22, -2.0])
def test_a_drawn_number_is_read_back_as_that_number(value: float) -> None:
    read = value_of(f"x={number_text(value)}")[1]
    assert read == value
    assert type(read) is type(value)
    assert isinstance(value_of("x=1e-05")[1], str), "which plain repr would not be"


BAD_VALUES = {
    "grid()": "the list of values is empty",
    "0.1,": "nothing between two commas",
    "0.1,,0.2": "nothing between two commas",
    "0.1,1e-1": "0.1 and 1e-1 are the same value",
    "1,1.0": "1 and 1.0 are the same value",
    "uniform(2,1)": "the bounds are in the wrong order",
    "uniform(1,1)": "the bounds are equal",
    "loguniform(0,1)": "a lower bound above 0",
    "loguniform(1e-6)": r"not of the shape loguniform\(low,high\)",
    "unifrom(1,2)": "there is no unifrom.* Did you mean 'uniform'",
    "uniform(a,b)": "needs numbers",
    "uniform(0,inf)": "not of the shape",
    "randint(1,2.5)": "whole numbers",
    "normal(0,0)": "the deviation must be above 0",
    "quniform(0.1,0.2,0.5)": "no multiple of the step lies between",
    "quniform(0,1,0)": "the step must be above 0",
}


@pytest.mark.parametrize("text", BAD_VALUES)
def test_values_that_make_no_sense_are_refused(text: str) -> None:
    with pytest.raises(PalateError, match=BAD_VALUES[text]) as fault:
        axis(f"{BETA}={text}")
    assert str(fault.value).startswith(BETA)


def test_every_law_is_tried_above() -> None:
    assert set(LAWS) == {*ARGUMENTS, "normal", "randn", "qrandn"}
    assert drawn("randn(1,2)").quantile(0.3) == drawn("normal(1,2)").quantile(0.3)
    assert drawn("qrandn(0,1,0.5)").quantile(0.9) == 1.5


# -- trials ------------------------------------------------------------------------------------------------------------


def axes(*words: str) -> tuple[Any, ...]:
    return tuple(axis(word) for word in words)


def test_a_grid_of_two_by_two_has_four_trials() -> None:
    found = axes("stages.0.a=1,2", "stages.0.b=x,y")
    assert search_of(found, None, None) == "grid"
    texts = [[text for _, text in trial.texts] for trial in trials_of(found, "grid", None, 1)]
    assert texts == [["1", "x"], ["1", "y"], ["2", "x"], ["2", "y"]]


def test_the_same_sweep_gives_the_same_trials_and_more_trials_only_add() -> None:
    found = axes("stages.0.a=1,2,3", "stages.0.b=loguniform(1e-6,1e-4)")
    assert search_of(found, None, None) == "random"
    eight = trials_of(found, "random", None, 1)
    assert len(eight) == 8
    assert trials_of(found, "random", 8, 1) == eight
    assert trials_of(found, "random", 20, 1)[:8] == eight
    assert trials_of(found, "random", 8, 2) != eight
    assert len({trial.texts for trial in eight}) == 8


def test_two_settings_are_drawn_independently() -> None:
    found = trials_of(axes("stages.0.a=uniform(0,1)", "stages.0.b=uniform(0,1)"), "random", 400, 1)
    pairs = np.array([[float(text) for _, text in trial.texts] for trial in found])
    assert abs(np.corrcoef(pairs.T)[0, 1]) < 0.2  # 4 standard errors
    assert pairs.mean(axis=0) == pytest.approx([0.5, 0.5], abs=0.06)


def test_a_random_search_tries_each_combination_of_lists_before_any_again() -> None:
    found = axes("stages.0.a=1,2,3", "stages.0.b=uniform(0,1)")
    firsts = [trial.texts[0][1] for trial in trials_of(found, "random", 9, 1)]
    for start in (0, 3, 6):
        assert sorted(firsts[start : start + 3]) == ["1", "2", "3"]


def test_a_random_search_of_lists_is_a_part_of_the_grid() -> None:
    found = axes("stages.0.a=1,2,3", "stages.0.b=x,y")
    part = trials_of(found, search_of(found, "random", 4), 4, 1)
    assert len({trial.texts for trial in part}) == 4
    assert {t.texts for t in part} <= {t.texts for t in trials_of(found, "grid", None, 1)}
    assert len(trials_of(found, "random", None, 1)) == 6
    with pytest.raises(PalateError, match="only 6 combinations"):
        trials_of(found, "random", 7, 1)


def test_trials_that_do_not_exist_are_refused() -> None:
    found = axes("stages.0.a=randint(1,4)")
    assert {t.texts[0][1] for t in trials_of(found, "random", 3, 1)} == {"1", "2", "3"}
    with pytest.raises(PalateError, match="only 3 different trials"):
        trials_of(found, "random", 4, 1)
    with pytest.raises(PalateError, match="a grid needs a list"):
        search_of(found, "grid", None)
    with pytest.raises(PalateError, match="the grid has 2 trials"):
        search_of(axes("stages.0.a=1,2"), "grid", 3)


# -- plans -------------------------------------------------------------------------------------------------------------


def test_each_trial_under_each_seed_is_an_ordinary_run(recipe: Path) -> None:
    found = plan_sweep(recipe, [f"{RATE}=1e-4,1e-3", "stages.sft.batch_size=4"], seeds="2")
    assert [str(run.folder) for run in found.runs] == [
        f"runs/two-sweep/trial-00{t}-seed-{s}" for t in (0, 1) for s in (1, 2)
    ]
    last = found.runs[-1].plan
    assert last.experiment.seed == 2
    assert last.resolved["stages"][1]["optimiser"]["learning_rate"] == 1e-3
    assert last.resolved["stages"][0]["batch_size"] == 4
    assert found.runs[0].evidences[0].hash == found.runs[2].evidences[0].hash, "stage 1 is the same for both trials"
    assert found.runs[0].evidences[1].hash != found.runs[2].evidences[1].hash
    assert found.runs[0].evidences[0].hash != found.runs[1].evidences[0].hash, "and never for two seeds"


def test_lists_survive_as_values(recipe: Path) -> None:
    found = plan_sweep(recipe, ["stages.1.optimiser.betas=[0.9,0.95],[0.8,0.999]"], seeds="1")
    read = [run.plan.resolved["stages"][1]["optimiser"]["betas"] for run in found.runs]
    assert read == [[0.9, 0.95], [0.8, 0.999]]


@pytest.mark.parametrize("place", ["a: b #c", "~/x", "it's", '"', "runs"])
def test_a_sweep_goes_where_output_dir_says_whatever_is_in_its_name(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    monkeypatch.setenv("HOME", "/elsewhere")
    recipe.write_text(yaml.safe_dump({**RECIPE, "output_dir": place}))
    found = plan_sweep(recipe, [], seeds="1")
    assert found.folder == Path(place.replace("~", "/elsewhere")) / "two-sweep"
    assert found.runs[0].folder == found.folder / "trial-000-seed-1"


def test_seeds() -> None:
    assert seeds_of("3", 1) == (1, 2, 3)
    assert seeds_of("2", 7) == (7, 8)
    assert seeds_of("1,5,9", 1) == (1, 5, 9)
    assert seeds_of("5,", 1) == (5,)
    for text in ("0", "x", "", "1,1", "-1"):
        with pytest.raises(PalateError, match="--seeds"):
            seeds_of(text, 1)


BAD_SWEEPS = {
    "stages.1.optimiser.learning_rat=1e-4,1e-3": "Did you mean 'learning_rate'",
    "stages.7.batch_size=4,8": "there is no item '7'.* Known: sft, more",
    "stages.mroe.batch_size=4,8": "Did you mean 'more'",
    "stage.1.batch_size=4,8": "names no stage.* Did you mean 'stages'",
    "batch_size=4,8": "names no stage.*stages.STAGE.SETTING",
    "keep_checkpoints=1,2": "names no stage, so every value would give the same run",
    "seed=1,2": "--seeds 1,2,3",
    "stages.1.batch_size=4,x": "stages.1.batch_size.* valid integer",
    "stages.1.optimiser.schedule=null,true": "stages.1.optimiser.schedule",
    "stages.1.optimiser.learning_rate=0.001,'1.0e-3'": "the same value",
    "stages.1.data={path: world:tasting_room/pairs},{path: world:tasting_room/pairs, rows: null}": "very same run",
}


@pytest.mark.parametrize("word", BAD_SWEEPS)
def test_a_sweep_that_cannot_work_is_refused_before_it_writes_anything(recipe: Path, word: str) -> None:
    with pytest.raises(PalateError, match=BAD_SWEEPS[word]):
        plan_sweep(recipe, [word])
    assert not Path("runs").exists()


def test_a_key_is_swept_once(recipe: Path) -> None:
    with pytest.raises(PalateError, match="swept twice"):
        plan_sweep(recipe, ["stages.1.batch_size=4,8", "stages.1.batch_size=2,16"])


def test_another_space_under_the_same_name_is_refused_and_more_of_the_same_is_not(recipe: Path) -> None:
    word = f"{RATE}=1e-4,1e-3"
    plan_sweep(recipe, [word]).remember()
    plan_sweep(recipe, [word], seeds="5").remember()
    with pytest.raises(PalateError, match=rf"differ in values\.{RATE}\..*--name NAME"):
        plan_sweep(recipe, [f"{RATE}=1e-4,1e-2"]).remember()
    with pytest.raises(PalateError, match="differ in search"):
        plan_sweep(recipe, [word], search="random").remember()
    recipe.write_text(yaml.safe_dump({**RECIPE, "keep_checkpoints": 3}))
    with pytest.raises(PalateError, match=r"differ in recipe\.keep_checkpoints"):
        plan_sweep(recipe, [word]).remember()
    plan_sweep(recipe, [word], name="other").remember()


def test_an_ordinary_run_is_not_taken_for_a_sweep(recipe: Path) -> None:
    Path("runs/two-sweep").mkdir(parents=True)
    Path("runs/two-sweep/run.yaml").write_text("name: x")
    with pytest.raises(PalateError, match="an ordinary run has this name"):
        plan_sweep(recipe, []).remember()


# -- shared stages -----------------------------------------------------------------------------------------------------


def finish(run: Run, index: int, **metrics: float) -> Path:
    """A stage as if it had been trained."""
    home = run.stage(index)
    run.folder.mkdir(parents=True, exist_ok=True)
    home.start("settings")
    (home.path / "model").mkdir()
    (home.path / "model" / "model.safetensors").write_text(run.name)
    (home.path / "model" / "card.md").write_text("a card")
    (home.path / "metrics.jsonl").write_text(json.dumps({"step": 1, **metrics}) + "\n")
    home.finish(1.0)
    return home.path


def test_a_stage_that_trials_share_is_taken_over_by_link_and_counts_as_done(recipe: Path) -> None:
    found = plan_sweep(recipe, [f"{RATE}=1e-4,1e-3"], seeds="2")
    first, _, second, other_seed = found.runs
    source = finish(first, 0)
    assert sharing.take_over(other_seed, found.runs) == []
    assert sharing.take_over(second, found.runs) == ["sft"]
    home = second.stage(0)
    assert home.state("sft").what == "done"
    assert (home.path / "model/model.safetensors").samefile(source / "model/model.safetensors")
    assert not (home.path / "metrics.jsonl").samefile(source / "metrics.jsonl")
    assert json.loads((home.path / "DONE").read_text())["taken_from"] == f"{first.name}/1-sft"
    assert sharing.take_over(second, found.runs) == []


def test_a_damaged_stage_is_not_taken_over(recipe: Path) -> None:
    found = plan_sweep(recipe, [f"{RATE}=1e-4,1e-3"], seeds="1")
    (finish(found.runs[0], 0) / "model/model.safetensors").write_text("flipped")
    assert sharing.take_over(found.runs[1], found.runs) == []


def test_a_run_waits_while_another_makes_what_it_needs(recipe: Path) -> None:
    found = plan_sweep(recipe, [f"{RATE}=1e-4,1e-3"], seeds="2")
    first, other_seed, second, _ = found.runs
    assert sharing.waits_for(second, [first])
    assert not sharing.waits_for(other_seed, [first])
    finish(first, 0)
    assert not sharing.waits_for(second, [first])


# -- work --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A shell script in place of Python, so that a run takes no time: what it does depends on the trial."""
    script = tmp_path / "python.sh"
    script.write_text(
        "#!/bin/sh\n"
        f'echo "$OMP_NUM_THREADS $*" >> {tmp_path}/started\n'
        'case "$*" in\n'
        '*trial-001*) echo "palate: the moon is full." >&2; exit 2;;\n'
        "*trial-002*) kill -9 $$;;\n"
        f"*trial-003*) echo $$ > {tmp_path}/pid; exec cat;;\n"
        "esac\n"
    )
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(work.sys, "executable", str(script))
    return tmp_path / "started"


def test_a_run_that_fails_ends_no_other_and_says_why(
    recipe: Path, stand_in: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "6")
    found = plan_sweep(recipe, ["stages.0.batch_size=1,2,3"], seeds="1,3")
    found.remember()
    ended: list[str] = []
    failed = work.work(found, 2, Display(quiet=True), lambda run: ended.append(run.name) or "")
    assert sorted(ended) == ["trial-000-seed-1", "trial-000-seed-3"]
    assert failed["trial-001-seed-1"] == "the moon is full."
    assert failed["trial-002-seed-3"].startswith("ended by signal SIGKILL; see runs/two-sweep/trial-002-seed-3/log.txt")
    assert len(failed) == 4
    assert Path("runs/two-sweep/trial-001-seed-3/FAILED").read_text() == "the moon is full.\n"
    started = stand_in.read_text().splitlines()
    assert len(started) == 6
    assert all(line.startswith("3 -m palate.sweep.child runs/two-sweep/recipe.yaml") for line in started)


def test_the_exit_code_of_a_sweep_with_a_failure_is_not_0_and_the_rest_is_compared(
    recipe: Path, stand_in: Path
) -> None:
    found = plan_sweep(recipe, ["stages.1.batch_size=1,2"], seeds="2")
    for run in found.runs[:2]:
        finish(run, 0)
        finish(run, 1, accuracy=0.5 + run.seed / 10)
    with pytest.raises(RunsFailed, match="2 of 4 runs failed, the first of them trial-001-seed-1: the moon") as fault:
        conduct(found, Display(quiet=True))
    assert fault.value.exit_code == 1
    results = json.loads(Path("runs/two-sweep/results.json").read_text())
    assert results["metric"] == "accuracy"
    assert results["best"] == "trial-000"
    assert results["trials"][0]["mean"] == pytest.approx(0.65)
    assert results["trials"][1]["verdict"] == "failed"
    assert len(stand_in.read_text().splitlines()) == 2, "what was done is not run again"


def test_a_wrong_metric_is_told_at_the_first_run_and_the_runs_at_work_are_stopped(recipe: Path, stand_in: Path) -> None:
    found = plan_sweep(recipe, ["stages.0.batch_size=1,2,3,4"], seeds="1")
    finish(found.runs[0], 0)
    finish(found.runs[0], 1, accuracy=0.5)
    with pytest.raises(PalateError, match=r"no stage of trial-000-seed-1 logged it. Did you mean 'accuracy'"):
        conduct(found, Display(quiet=True), jobs=4, metric="acuracy")
    assert not stand_in.exists()


def test_when_a_sweep_ends_early_its_runs_are_stopped(recipe: Path, stand_in: Path) -> None:
    found = plan_sweep(recipe, ["stages.0.batch_size=1,2,3,4"], seeds="1")
    pid = stand_in.with_name("pid")

    def ended(run: Run) -> str:
        while not pid.exists() or not pid.read_text():
            time.sleep(0.01)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        work.work(found, 4, Display(quiet=True), ended)
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)


def test_a_run_stops_when_its_sweep_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    mine, sweeps = os.pipe()
    read, killed = os.read, list[tuple[int, int]]()
    monkeypatch.setattr(child.os, "read", lambda _, count: read(mine, count))
    monkeypatch.setattr(child.os, "kill", lambda *said: killed.append(said))
    watching = threading.Thread(target=child._stop_with_the_sweep)  # pyright: ignore[reportPrivateUsage]
    watching.start()
    watching.join(0.2)
    assert watching.is_alive()
    assert not killed
    os.close(sweeps)
    watching.join(10)
    assert killed == [(os.getpid(), signal.SIGTERM)]
    os.close(mine)


@pytest.mark.parametrize(("key", "at_once"), [("stages.0.batch_size", 2), ("stages.1.batch_size", 1)])
def test_runs_that_share_a_stage_do_not_make_it_at_the_same_time(
    recipe: Path, stand_in: Path, key: str, at_once: int
) -> None:
    found = plan_sweep(recipe, [f"{key}=1,2"], seeds="1")
    crew = work._Crew(found, 2, Display(quiet=True), lambda _: "", found.runs)  # pyright: ignore[reportPrivateUsage]
    crew.start_what_can()
    assert len(crew.busy) == at_once
    crew.stop()


def test_a_run_that_another_process_is_at_is_waited_for_and_then_given_up(
    recipe: Path, stand_in: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(work, "_PATIENCE", 0.2)
    found = plan_sweep(recipe, [], seeds="2")
    with held(found.runs[0].folder):
        failed = work.work(found, 1, Display(quiet=True), lambda _: "")
    assert list(failed) == ["trial-000-seed-1"]
    assert "is already at work" in failed["trial-000-seed-1"]
    assert len(stand_in.read_text().splitlines()) == 1


def test_threads_are_divided() -> None:
    assert work.environment(1, {}) == {}
    assert work.environment(3, {"OMP_NUM_THREADS": "7"})["OMP_NUM_THREADS"] == "2"
    assert work.environment(9, {"OMP_NUM_THREADS": "2"})["OMP_NUM_THREADS"] == "1"


# -- comparison --------------------------------------------------------------------------------------------------------


def t_tail(t: float, degrees: int) -> float:
    """P(|T| ≥ t) from the density, by the trapezoid rule in the angle."""
    angle = np.linspace(0, math.atan(abs(t) / math.sqrt(degrees)), 200_001)
    density = np.cos(angle) ** (degrees - 1)
    whole = math.sqrt(math.pi) * math.gamma(degrees / 2) / math.gamma((degrees + 1) / 2)
    return 1 - 2 * float(np.trapezoid(density, angle)) / whole


@pytest.mark.parametrize("degrees", [1, 2, 3, 4, 5, 8, 9, 30])
@pytest.mark.parametrize("t", [0.0, 0.3, -1.7, 4.0])
def test_students_t_is_its_integral(t: float, degrees: int) -> None:
    assert two_sided(t, degrees) == pytest.approx(t_tail(t, degrees), abs=1e-8)


def test_students_t_is_in_the_printed_tables() -> None:
    for degrees, critical in ((1, 12.706), (2, 4.303), (4, 2.776), (9, 2.262)):
        assert two_sided(critical, degrees) == pytest.approx(0.05, abs=5e-5)


def test_differences_are_paired_by_seed() -> None:
    """Seeds that differ a lot, settings that differ a little: only pairing sees it."""
    best = {1: 1.0, 2: 5.0, 3: 9.0, 4: None}
    other = {1: 0.8, 2: 4.9, 3: 8.7, 4: 2.0}
    found = behind(best, other)
    gaps = np.array([0.2, 0.1, 0.3])
    assert found is not None
    assert found.mean == pytest.approx(gaps.mean())
    assert found.standard_error == pytest.approx(gaps.std(ddof=1) / math.sqrt(3))
    assert found.p_value == pytest.approx(t_tail(gaps.mean() / (gaps.std(ddof=1) / math.sqrt(3)), 2), abs=1e-8)
    unpaired = math.sqrt((np.var([1, 5, 9], ddof=1) + np.var([0.8, 4.9, 8.7], ddof=1)) / 3)
    assert t_tail(0.2 / unpaired, 4) > 0.9 > 0.1 > found.p_value
    assert behind({1: 1.0}, {1: 2.0}) is None
    assert behind({1: 1.0, 2: 2.0}, {1: 1.0, 2: 2.0}).p_value == 1.0  # pyright: ignore[reportOptionalMemberAccess]


def test_holm() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]) == []


def row(number: int, *values: float | None) -> Row:
    return Row(Trial(number, ((BETA, str(number)),)), {s + 1: v for s, v in enumerate(values)}, {})


def test_the_best_is_the_best_of_those_that_have_all_seeds() -> None:
    rows = judged(
        [row(0, 0.1, 0.2, 0.3), row(1, 0.9, None, None), row(2, 0.11, 0.23, 0.31), row(3, None, None, None)], 1.0
    )
    assert [r.best for r in rows] == [False, False, True, False]
    assert rows[1].verdict == "not compared; 2 of 3 seeds failed"
    assert rows[3].verdict == "failed"
    assert judged(rows, -1.0)[0].best


def comparison(*rows: Row, sign: float = 1.0) -> Comparison:
    measure = Measure("evaluate/win_rate/a/gold", "max" if sign > 0 else "min")
    return Comparison("mine", measure, (1, 2, 3), (BETA,), judged(rows, sign))


def test_what_is_noise_is_called_noise_and_what_is_not_is_not() -> None:
    found = comparison(row(0, 0.50, 0.60, 0.55), row(1, 0.501, 0.58, 0.56), row(2, 0.10, 0.21, 0.14))
    assert found.rows[0].best
    assert found.rows[1].verdict.startswith("within noise (p 0.")
    assert found.rows[2].verdict.startswith("worse (p < 0.001")
    assert [r.trial.number for r in found.ranked] == [0, 1, 2]
    said = " ".join(summary(found))
    assert "1 of 2 other settings are worse" in said
    assert "not proof that they are equal" in said
    alone = replace(found, seeds=(1,), rows=judged([row(0, 0.5), row(1, 0.1)], 1.0))
    assert "With one seed no difference can be told from luck" in " ".join(summary(alone))
    assert alone.rows[1].verdict == "not compared"
    torn = comparison(row(0, 0.5, 0.6, 0.55), row(1, None, None, 0.4))
    assert summary(torn)[1:] == ["No other setting shares two seeds with it, so no difference is judged."]


def test_a_measure_to_be_low_makes_the_lowest_the_best() -> None:
    found = comparison(row(0, 3.0, 3.1, 3.2), row(1, 1.0, 1.1, 1.3), sign=-1.0)
    assert found.rows[1].best
    difference = found.rows[0].behind
    assert difference is not None
    assert difference.mean > 0
    assert [r.trial.number for r in found.ranked] == [1, 0]


def test_a_label_is_as_short_as_it_can_be() -> None:
    keys = ["stages.0.optimiser.learning_rate", "stages.1.optimiser.learning_rate", "stages.1.batch_size"]
    assert list(labels(keys).values()) == ["0.optimiser.learning_rate", "1.optimiser.learning_rate", "batch_size"]


# -- measure -----------------------------------------------------------------------------------------------------------


def measured(recipe: Path, first: dict[str, float], last: dict[str, float]) -> Sweep:
    found = plan_sweep(recipe, [], seeds="1")
    finish(found.runs[0], 0, **first)
    finish(found.runs[0], 1, **last)
    return found


def test_the_measure_is_the_first_that_is_known_of_the_last_stage(recipe: Path) -> None:
    names = {"loss": 1.0, "evaluate/win_rate/sft/gold": 0.4, "evaluate/win_rate/ppo/gold": 0.6}
    run = measured(recipe, {"gold/mean": 1.0}, {**names, "evaluate/win_rate/ppo/proxy": 0.7}).runs[0]
    assert choose(run, None, None) == Measure("evaluate/win_rate/ppo/gold", "max")
    assert choose(run, None, None).of(run) == 0.6
    assert choose(run, "loss", None) == Measure("loss", "min")
    assert choose(run, "gold/mean", None).of(run) == 1.0, "found in an earlier stage"


def test_a_measure_whose_direction_is_unknown_needs_a_goal(recipe: Path) -> None:
    run = measured(recipe, {}, {"objective/kl": 3.0}).runs[0]
    with pytest.raises(PalateError, match="--goal max or --goal min"):
        choose(run, "objective/kl", None)
    assert choose(run, "objective/kl", "min").sign == -1.0
    with pytest.raises(PalateError, match="Name one: --metric NAME"):
        choose(run, None, None)


# -- report ------------------------------------------------------------------------------------------------------------


def test_the_report_shows_every_setting_and_seed_and_escapes_what_it_is_given() -> None:
    hostile = Row(Trial(1, ((BETA, "<b>"),)), {1: 0.3, 2: None, 3: 0.2}, {2: "<script>alert(1)</script> | x"})
    found = comparison(row(0, 0.5, 0.6, 0.55), hostile)
    page, text = report.html(found), report.markdown(found)
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)" in page
    assert "<b>" not in page.replace("&lt;b&gt;", "")
    assert page.count("<svg") == 2
    assert page.count('class="dot') == 2 * 5, "a dot per run in either drawing"
    assert "| trial-000 | 0 | 0.55 | 0.0289 | 0.5 | 0.6 | 0.55 | best |" in text
    assert "| trial-001 | <b> | 0.25 | 0.05 | 0.3 | failed | 0.2 |" in text
    assert "trial-001-seed-2: <script>" in text
    assert json.loads(json.dumps(report.results(found)))["trials"][1]["failures"] == {
        "2": "<script>alert(1)</script> | x"
    }


def test_a_sweep_of_seeds_alone_tells_their_spread(recipe: Path) -> None:
    found = plan_sweep(recipe, [], seeds="3")
    for run in found.runs:
        finish(run, 1, accuracy=run.seed / 10)
    judged_ = compare(found, Measure("accuracy", "max"), {})
    assert summary(judged_) == ["accuracy is 0.2 ± 0.05774 (standard error) over 3 seeds of one setting."]
    assert "<svg" in report.html(judged_)


def test_numbers_stand_at_their_place_and_words_in_their_order() -> None:
    places, ticks, logarithmic = horizontal(["1e-6", "1e-4", "1.0e-5"])
    assert logarithmic
    assert places == pytest.approx([-6, -4, -5])
    assert [place for place, _ in ticks] == pytest.approx([-6, -5, -4])
    assert horizontal(["0.1", "0.5"]) == ([0.1, 0.5], [(0.1, "0.1"), (0.5, "0.5")], False)
    assert horizontal(["linear", "cosine", "linear"])[0] == [0.0, 1.0, 0.0]
