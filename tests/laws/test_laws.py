"""Taste made executable: each law reads the source of the package, and is shown a snippet that breaks it."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pytest

from palate import metrics
from palate.settings import kinds

SOURCE = Path(__file__).resolve().parents[2] / "src" / "palate"

LAYERS = (
    "records settings metrics randomness ranks",
    "batches losses credit optim",
    "parallel checkpoint models cutting cast step data",
    "engines rewards judges evaluation diagnosis worlds algorithms",
    "stages run workspace stopping stage_folder tracking live provenance evidence products",
    "cli cli_check cli_rank cli_show cli_sweep sweep check web door door_rows one_stage "
    "catalogue closing manual __init__ __main__",
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names.split()}
# Verbs and the functions of the Python door are called like their algorithms; palate.train has a default.
MAY_NAME_ALGORITHMS = ("__init__.py", "cli.py", "door.py")
ROLES = ("reward",)  # an algorithm's name, but also the role it trains, and an English word


@dataclass(frozen=True)
class Module:
    """One source file."""

    path: str
    text: str

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)

    @property
    def room(self) -> str:
        """The folder or file of the package it belongs to."""
        return self.path.split("/")[0].removesuffix(".py")

    def nodes(self) -> Iterator[ast.AST]:
        return ast.walk(self.tree)

    def imports(self) -> Iterator[tuple[int, str]]:
        """(line, dotted name) of everything imported, names of `from` imports included."""
        for node in self.nodes():
            if isinstance(node, ast.Import):
                yield from ((node.lineno, alias.name) for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module:
                yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)

    def calls(self) -> Iterator[tuple[int, str]]:
        """(line, source of what is called) of every call."""
        for node in self.nodes():
            if isinstance(node, ast.Call):
                yield node.lineno, ast.unparse(node.func)

    def strings(self) -> Iterator[tuple[int, str]]:
        """(line, text) of every string; the gaps of an f-string hold an x."""
        inside = {id(part) for node in self.nodes() if isinstance(node, ast.JoinedStr) for part in node.values}
        for node in self.nodes():
            if isinstance(node, ast.JoinedStr):
                yield node.lineno, "".join(str(p.value) if isinstance(p, ast.Constant) else "x" for p in node.values)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in inside:
                yield node.lineno, node.value


Finder = Callable[[Module], Iterator[tuple[int, str]]]


def imports_point_down(module: Module) -> Iterator[tuple[int, str]]:
    if module.room not in LEVEL:
        yield 1, f"{module.room} has no place in the layers of architecture section 4"
        return
    for line, name in module.imports():
        parts = name.split(".")
        if parts[0] != "palate" or len(parts) < 2 or parts[1] not in LEVEL or parts[1] == module.room:
            continue
        if LEVEL[parts[1]] > LEVEL[module.room]:
            yield line, f"{module.room} imports {parts[1]} of a higher layer"
        if "algorithms" in (module.room, parts[1]) and LEVEL[parts[1]] == LEVEL[module.room]:
            yield line, "algorithms and their neighbours do not know each other"
        if module.room == "worlds" and LEVEL[parts[1]] > 0:
            yield line, "worlds import layer 0 only"


def one_backward(module: Module) -> Iterator[tuple[int, str]]:
    if module.path != "step.py":
        yield from ((line, name) for line, name in module.calls() if name.endswith(".backward"))


def one_home_for_processes(module: Module) -> Iterator[tuple[int, str]]:
    if module.path != "parallel.py":
        yield from ((line, name) for line, name in module.imports() if name.startswith("torch.distributed"))
        for node in module.nodes():
            if isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.distributed":
                yield node.lineno, "torch.distributed"


def transformers_in_models_only(module: Module) -> Iterator[tuple[int, str]]:
    if module.room != "models":
        heavy = ("transformers", "tokenizers", "peft")
        yield from ((line, name) for line, name in module.imports() if name.split(".")[0] in heavy)


def short_functions_and_files(module: Module) -> Iterator[tuple[int, str]]:
    lines = module.text.count("\n")
    if lines > 400:
        yield lines, f"{lines} lines"
    for node in module.nodes():
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or 0) - node.lineno + 1
            if length > 60:
                yield node.lineno, f"{node.name} has {length} lines"


def nothing_unsafe(module: Module) -> Iterator[tuple[int, str]]:
    unsafe = {"pickle", "cPickle", "dill", "marshal", "shelve", "joblib"}
    yield from ((line, name) for line, name in module.imports() if name.split(".")[0] in unsafe)
    forbidden = {"torch.load", "yaml.load", "yaml.unsafe_load", "yaml.full_load", "eval", "exec", "os.system"}
    yield from ((line, name) for line, name in module.calls() if name in forbidden)
    for node in module.nodes():
        if isinstance(node, ast.keyword) and node.arg == "trust_remote_code" and ast.unparse(node.value) != "False":
            yield node.value.lineno, "trust_remote_code"


def no_algorithm_by_name(module: Module) -> Iterator[tuple[int, str]]:
    if module.room == "algorithms" or module.path in MAY_NAME_ALGORITHMS:
        return
    names = {name for name in kinds("algorithms") if name not in (*ROLES, "protocol")}
    yield from ((line, text) for line, text in module.strings() if text in names)
    for line, name in module.imports():
        if name.startswith("palate.algorithms.") and name.split(".")[2] in names:
            yield line, name


def every_metric_has_a_meaning(module: Module) -> Iterator[tuple[int, str]]:
    spaces = {name.partition("/")[0] for name in metrics.METRICS if "/" in name}
    shaped = re.compile(rf"({'|'.join(sorted(spaces))})/[a-z_]+(/[a-z_]+)?")
    for line, text in module.strings():
        if module.path != "metrics.py" and shaped.fullmatch(text) and metrics.lookup(text) is None:
            yield line, text
    for node in module.nodes():  # what an algorithm hands to the step: names of terms and means
        if isinstance(node, ast.Dict):
            for key, value in zip(node.keys, node.values, strict=True):
                made = isinstance(value, ast.Call) and ast.unparse(value.func) in ("Mean", "Term")
                if made and isinstance(key, ast.Constant) and metrics.lookup(str(key.value)) is None:
                    yield node.lineno, str(key.value)


def nothing_unfinished(module: Module) -> Iterator[tuple[int, str]]:
    words = re.compile(r"\b(TO" r"DO|FIX" r"ME|X" r"XX|HACK|NotImplemented(Error)?)\b")
    for number, text in enumerate(module.text.splitlines(), 1):
        if words.search(text):
            yield number, text.strip()
    if module.path.endswith(("utils.py", "helpers.py", "misc.py")):
        yield 1, "a file is named after its noun"


def broad_excepts_say_why(module: Module) -> Iterator[tuple[int, str]]:
    lines = module.text.splitlines()
    for node in module.nodes():
        if isinstance(node, ast.ExceptHandler):
            broad = node.type is None or ast.unparse(node.type) in ("Exception", "BaseException")
            if broad and "#" not in lines[node.lineno - 1]:
                yield node.lineno, lines[node.lineno - 1].strip()


def public_things_explain_themselves(module: Module) -> Iterator[tuple[int, str]]:
    if not ast.get_docstring(module.tree):
        yield 1, "the file does not say what it is"
    for node in module.tree.body:
        named = isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_")
        if named and not ast.get_docstring(node):
            yield node.lineno, node.name


LAWS: dict[Finder, tuple[str, str]] = {
    imports_point_down: ("losses.py", "from palate.step import Stepper"),
    one_backward: ("cast.py", "loss.backward()"),
    one_home_for_processes: ("run.py", "import torch.distributed as dist"),
    transformers_in_models_only: ("stages/train.py", "from transformers import AutoModel"),
    short_functions_and_files: ("run.py", "def f():\n" + "    pass\n" * 60),
    nothing_unsafe: ("checkpoint.py", "import torch\ntorch.load('x')"),
    no_algorithm_by_name: ("stages/online.py", "if kind == 'ppo': pass"),
    every_metric_has_a_meaning: ("stages/online.py", "metrics = {'objective/happiness': 1.0}"),
    nothing_unfinished: ("run.py", "x = 1  # TODO"),
    broad_excepts_say_why: ("run.py", "try:\n    pass\nexcept Exception:\n    pass"),
    public_things_explain_themselves: ("run.py", '"""A file."""\ndef f(): pass'),
}

MODULES = [Module(str(p.relative_to(SOURCE)), p.read_text(encoding="utf-8")) for p in sorted(SOURCE.rglob("*.py"))]


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
def test_the_package_keeps(law: Finder) -> None:
    broken = [f"{m.path}:{line}: {what}" for m in MODULES for line, what in law(m)]
    assert not broken, "\n" + "\n".join(broken)


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
def test_a_broken_law_is_seen(law: Finder) -> None:
    path, snippet = LAWS[law]
    assert list(law(Module(path, snippet)))


@pytest.mark.parametrize(
    ("path", "snippet"),
    [
        ("algorithms/ppo.py", "from palate.rewards.reward import Answers"),
        ("rewards/model.py", "import palate.algorithms.ppo"),
        ("worlds/room.py", "from palate.batches import Rows"),
        ("stages/online.py", "from palate.cli import main"),
        ("novelty.py", ""),
    ],
)
def test_each_wrong_direction_is_seen(path: str, snippet: str) -> None:
    assert list(imports_point_down(Module(path, snippet)))


def test_a_right_direction_is_not() -> None:
    for path, snippet in (
        ("stages/online.py", "from palate import step\nfrom palate.run import Workspace"),
        ("algorithms/ppo.py", "from palate.cast import Cast\nfrom palate.algorithms import protocol"),
    ):
        assert not list(imports_point_down(Module(path, snippet)))
