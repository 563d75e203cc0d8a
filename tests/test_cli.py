"""The command line as a user meets it: real processes, their output and their exit codes."""

from __future__ import annotations

import contextlib
import io
import json
import signal
import subprocess
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from palate.catalogue import methods
from palate.cli import main

TINY = "{hidden_size: 32, layers: 1, heads: 2, vocabulary: 300, context: 64}"
SLOW_STAGE = '''
import time
from palate.settings import Choice

class Wait(Choice):
    """Waits."""
    name: str = "wait"
    """Its name."""
    def references(self): return []
    def files(self): return []
    def run(self, here):
        here.log(1, {"loss": 1.0})
        print("waiting", flush=True)
        time.sleep(60)
'''


@dataclass(frozen=True)
class Said:
    """What a command printed, and its exit code."""

    stdout: str
    stderr: str
    returncode: int


def palate(*words: str, cwd: Path) -> Said:
    """One command of a user, where there is no terminal; in this process, because torch takes seconds to load."""
    printed, told = io.StringIO(), io.StringIO()
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(printed),
        contextlib.redirect_stderr(told),
        warnings.catch_warnings(),
    ):
        patch.chdir(cwd)
        patch.setattr(sys, "path", [*sys.path])
        patch.setattr(sys, "argv", ["palate", *words])
        patch.setenv("COLUMNS", "100")
        try:
            main(list(words))
        except SystemExit as end:
            return Said(printed.getvalue(), told.getvalue(), int(end.code or 0))
    raise AssertionError("a command ends by exiting")


def palate_process(*words: str, cwd: Path) -> Said:
    """The same in a process of its own."""
    command = [sys.executable, "-m", "palate", *words]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    return Said(done.stdout, done.stderr, done.returncode)


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data, a reward function, and a tiny model made and taught by `palate sft`."""
    folder = tmp_path_factory.mktemp("lab")
    rows = [{"prompt": f"say {i % 7}:", "completion": f" {i % 7}."} for i in range(32)]
    (folder / "demo.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (folder / "brief.py").write_text(
        "def brief(prompts, completions, **columns):\n    return [-len(c) for c in completions]\n"
    )
    done = palate_process("sft", f"model={TINY}", "data=demo.jsonl", "batch_size=8", "learning_rate=1e-2", cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize(
    "words",
    [
        ["run"],
        *([name] for name in methods()),
        ["evaluate"],
        ["generate"],
        ["report"],
        ["show"],
        ["rank"],
        ["data", "check"],
        ["list"],
        ["init"],
    ],
)
def test_every_verb_helps_with_an_example(words: list[str], tmp_path: Path) -> None:
    done = palate(*words, "--help", cwd=tmp_path)
    assert done.returncode == 0
    assert "Example:\n" in done.stdout
    assert f"palate {' '.join(words)}" in done.stdout.partition("Example:")[2]


def test_a_run_ends_with_a_table_the_report_and_three_things_to_try(lab: Path) -> None:
    done = palate("sft", f"model={TINY}", "data=demo.jsonl", "batch_size=8", "learning_rate=1e-2", cwd=lab)
    assert done.returncode == 0
    assert "sft: done before, skipped" in done.stderr
    assert "report: runs/sft/report.html" in done.stderr
    assert len(done.stderr.partition("next:\n")[2].splitlines()) == 3
    assert (lab / "runs/sft/report.html").exists()


def test_ppo_and_generate_with_the_users_own_function(lab: Path) -> None:
    done = palate(
        "ppo", "model=runs/sft/1-sft/model", "reward.kind=function", "reward.function=brief:brief",
        "prompts=demo.jsonl", "total_episodes=32", "rollout_batch_size=16", "max_new_tokens=6", cwd=lab,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (lab / "runs/ppo/1-ppo/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]
    assert "rewards/brief/mean" in rows[0]
    said = palate("generate", "model=runs/ppo", "--prompt", "say 3:", "--max-new-tokens", "4", "--greedy", cwd=lab)
    assert said.returncode == 0, said.stderr
    again = palate("generate", "model=runs/ppo", "prompt=say 3:", "max_new_tokens=4", "greedy=true", cwd=lab)
    assert said.stdout == again.stdout


def test_settings_come_from_a_file_and_are_changed_by_words(lab: Path) -> None:
    settings = {"name": "filed", "model": yaml.safe_load(TINY), "data": "demo.jsonl", "batch_size": 8, "max_steps": 3}
    (lab / "sft.yaml").write_text(yaml.safe_dump(settings))
    done = palate("sft", "--config", "sft.yaml", "max_steps=2", cwd=lab)
    assert done.returncode == 0, done.stderr
    resolved = (lab / "runs/filed/resolved.yaml").read_text()
    assert "max_steps: 2  # command line" in resolved
    assert "batch_size: 8  # file" in resolved
    assert "logging_steps: 10  # default" in resolved


def test_data_check_for_people_and_machines(lab: Path) -> None:
    done = palate("data", "check", "demo.jsonl", cwd=lab)
    assert "32 Demonstration" in done.stdout
    found = json.loads(
        palate("data", "check", "demo.jsonl", "--json", "--model", "runs/sft/1-sft/model", cwd=lab).stdout
    )
    assert found["records"] == 32
    assert found["length_unit"] == "tokens"


def test_list_init_and_report(lab: Path) -> None:
    listed = palate("list", cwd=lab).stdout
    assert all(f"{topic}:\n" in listed for topic in ("algorithms", "rewards", "stages", "recipes", "worlds"))
    recipe = palate("list", "recipes", cwd=lab).stdout.splitlines()[1].split()[0]
    done = palate("init", recipe, "--to", "mine.yaml", cwd=lab)
    assert "Next: palate run mine.yaml" in done.stdout
    assert yaml.safe_load((lab / "mine.yaml").read_text())["stages"]
    again = palate("init", recipe, "--to", "mine.yaml", cwd=lab)
    assert again.returncode == 2
    assert "there is already a file of that name" in again.stderr
    assert palate("report", "runs/sft", cwd=lab).stdout.split() == ["runs/sft/report.html", "runs/sft/report.md"]


ONLINE = (
    "ppo", "name=wrong", "model=runs/sft/1-sft/model", "reward.kind=function", "total_episodes=16",
    "rollout_batch_size=16", "max_new_tokens=4",
)  # fmt: skip
OFFLINE = ("sft", "name=wrong", f"model={TINY}")
BAD_INPUT = {
    "unknown verb": (["rum"], "no verb is called 'rum'. Did you mean 'run'?"),
    "unknown topic": (["list", "recipe"], "Did you mean 'recipes'?"),
    "missing recipe": (["run", "no_such.yaml"], "no_such.yaml: no such file."),
    "not YAML": (["run", "bad.yaml"], "bad.yaml:2: not valid YAML"),
    "not a mapping": (["run", "list.yaml"], "list.yaml: expected a mapping of settings"),
    "unknown key": (["sft", "modle=x", "data=demo.jsonl"], "there is no setting 'modle'. Did you mean 'model'?"),
    "unknown key of a group": (
        ["sft", "model=x", "data=demo.jsonl", "optimiser.learning_rat=1"],
        "optimiser: there is no setting 'learning_rat'. Did you mean 'learning_rate'?",
    ),
    "wrong type": ([*OFFLINE, "data=demo.jsonl", "batch_size=many"], "batch_size: "),
    "missing setting": (["sft", "data=demo.jsonl"], "model: Field required"),
    "not key=value": (["sft", "model"], "'model': write a setting as key=value"),
    "an experiment as one stage": (["sft", "--config", "whole.yaml"], "Use `palate run whole.yaml`"),
    "missing data": ([*OFFLINE, "data=demos.jsonl"], "demos.jsonl: no such file or folder."),
    "malformed line": ([*OFFLINE, "data=torn.jsonl"], "torn.jsonl:2"),
    "empty data": ([*OFFLINE, "data=empty.jsonl"], "empty.jsonl"),
    "no weights": (["sft", "model=hollow", "data=demo.jsonl"], "hollow: no config.json"),
    "reward stage missing": (["run", "noreward.yaml"], "reads 'stage:reward', but no stage before it has that name"),
    "reward function raises": ([*ONLINE, "reward.function=bad:raises", "prompts=demo.jsonl"], "ZeroDivisionError"),
    "wrong count of rewards": ([*ONLINE, "reward.function=bad:short", "prompts=demo.jsonl"], "1 result"),
    "prompt too long": ([*ONLINE, "reward.function=brief:brief", "prompts=long.jsonl"], "tokens"),
    "generate without a prompt": (["generate", "model=runs/sft"], "prompt= is missing"),
    "no such run": (["report", "runs/nothing"], "runs/nothing"),
}  # fmt: skip


@pytest.fixture(scope="module")
def broken(lab: Path) -> Path:
    """The lab with files that are wrong in every way that the table needs."""
    online = {"kind": "online", "name": "rlhf", "model": "x", "reward": "stage:reward", "prompts": "demo.jsonl"}
    noreward = {"stages": [{**online, "algorithm": {"kind": "ppo"}}]}
    (lab / "bad.yaml").write_text("stages:\n  - kind: train: x\n")
    (lab / "list.yaml").write_text("- 1\n")
    (lab / "whole.yaml").write_text("stages: []\n")
    (lab / "noreward.yaml").write_text(yaml.safe_dump(noreward))
    (lab / "torn.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a", \n')
    (lab / "empty.jsonl").write_text("")
    (lab / "long.jsonl").write_text(json.dumps({"prompt": "word " * 200}) + "\n")
    (lab / "hollow").mkdir()
    (lab / "bad.py").write_text(
        "def raises(prompts, completions, **columns):\n    return [1 / 0]\n"
        "def short(prompts, completions, **columns):\n    return [1.0]\n"
    )
    return lab


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_one_message_and_exit_code_two(broken: Path, case: str) -> None:
    words, message = BAD_INPUT[case]
    done = palate(*words, cwd=broken)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert sum(line.startswith(("palate: ", "Error: ")) for line in done.stderr.splitlines()) == 1


def test_ctrl_c_says_how_to_go_on(tmp_path: Path) -> None:
    (tmp_path / "slow_stage.py").write_text(SLOW_STAGE)
    (tmp_path / "slow.yaml").write_text("stages:\n- kind: slow_stage:Wait\n")
    command = [sys.executable, "-m", "palate", "run", "slow.yaml", "seed=3"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "waiting\n"
    process.send_signal(signal.SIGINT)
    _, said = process.communicate()
    assert process.returncode == 75
    assert "palate run slow.yaml seed=3" in said
    assert "Traceback" not in said


def test_help_loads_nothing_heavy() -> None:
    """The list of verbs comes before a second has passed: no torch, and no pydantic either."""
    asked = "import sys\nfrom palate.cli import main\ntry:\n    main(['--help'])\nexcept SystemExit:\n    pass\n"
    shown = f"{asked}print(*({{'torch', 'pydantic', 'yaml', 'numpy'}} & set(sys.modules)), 'loaded')"
    done = subprocess.run([sys.executable, "-c", shown], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "loaded"
