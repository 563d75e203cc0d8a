"""The command line: `palate VERB [key=value ...]`. Nothing heavy is imported before a verb needs it."""

from __future__ import annotations

import difflib
import functools
import json
import shlex
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click

from palate.catalogue import Method, methods
from palate.cli_check import check
from palate.cli_rank import rank
from palate.cli_show import show
from palate.cli_sweep import SweepCommand, sweep

F = TypeVar("F", bound=Callable[..., Any])
_HELP: dict[str, Any] = {"help_option_names": ["-h", "--help"], "max_content_width": 110}
_SETTINGS: dict[str, Any] = {**_HELP, "ignore_unknown_options": True}


class _Verbs(click.Group):
    """The verbs in the order in which they are used, with the nearest one when a word is unknown."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The verbs, those that teach by one method apart from the rest."""
        teach = {name for name, verb in self.commands.items() if getattr(verb, "algorithm", None)}
        for title, chosen in (("Commands", set(self.commands) - teach), ("One method, one stage", teach)):
            with formatter.section(title):
                shown = [
                    (n, v.get_short_help_str(formatter.width - 14)) for n, v in self.commands.items() if n in chosen
                ]
                formatter.write_dl(shown)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in self.commands and not args[0].startswith("-"):
            close = difflib.get_close_matches(args[0], self.commands, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise click.UsageError(f"no verb is called {args[0]!r}.{hint} Known: {', '.join(self.commands)}.", ctx)
        return super().resolve_command(ctx, args)


class _StageVerb(click.Command):
    """A verb that runs one stage: its help ends with that stage's settings, read without importing it."""

    def __init__(self, *args: Any, stage: str, algorithm: str | None = None, **more: Any) -> None:
        super().__init__(*args, **more)
        self.stage, self.algorithm = stage, algorithm

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        from palate.manual import entries

        sources = {"stage": (f"stages/{self.stage}", "Stage", "name")}
        if self.algorithm is not None:
            sources["algorithm"] = (f"algorithms/{self.algorithm}", "Algorithm", "")
        sources["run"] = ("run", "Experiment", "stages")
        for what, (module, name, hidden) in sources.items():
            shown = [e for e in entries(module, name) if e.name != hidden]
            with formatter.section(f"Settings of the {what}"):
                formatter.write_dl([(f"{e.name}={e.default}" if e.default else e.name, e.meaning) for e in shown], 40)


def _told(verb: F) -> F:
    """A fault the user can mend is one message and exit code 2 (3 where numbers stayed infinite or nan).

    A run that was asked to stop says how it goes on: exit code 75 behind its checkpoint, 130 where it had no time.
    """

    @functools.wraps(verb)
    def wrapped(*args: Any, **more: Any) -> Any:
        from palate.settings import PalateError, Stopped

        try:
            return verb(*args, **more)
        except PalateError as fault:
            click.echo(f"palate: {fault}", err=True)
            sys.exit(fault.exit_code)
        except KeyboardInterrupt as stop:
            click.echo("\npalate: stopped. The same command goes on where it left off:", err=True)
            click.echo(f"  {_command()}", err=True)
            sys.exit(stop.exit_code if isinstance(stop, Stopped) else 130)

    return wrapped  # pyright: ignore[reportReturnType]


def _command() -> str:
    return shlex.join(["palate", *sys.argv[1:]])


@click.group(cls=_Verbs, context_settings=_HELP)
@click.version_option(package_name="palate", message="palate %(version)s")
def main() -> None:
    """Teach a language model taste: SFT, reward models, PPO, evaluation, and the report.

    \b
    Start here:
      palate list recipes
      palate init tasting_room
      palate run tasting_room.yaml
    """


@main.command("run", context_settings=_SETTINGS)
@click.argument("recipe")
@click.argument("words", nargs=-1, type=click.UNPROCESSED, metavar="[key=value ...]")
@_told
def run_verb(recipe: str, words: Sequence[str]) -> None:
    """Run the stages of RECIPE (a YAML file, or the name of a recipe that ships), or go on with them.

    Stages that are done are skipped; a stage that was stopped goes on from its newest checkpoint. Settings are
    changed by dotted names; a stage goes by its number from 0 or by its name.

    \b
    Example:
      palate run recipes/tasting_room.yaml seed=2 stages.rlhf.algorithm.kl_coef=0.1
    """
    from palate import catalogue, one_stage
    from palate.run import plan_file

    path = Path(recipe)
    if not path.exists() and recipe in catalogue.recipes():
        path = catalogue.recipe(recipe)
    catalogue.find_own_code(path.parent)
    _execute(lambda: plan_file(path, one_stage.words_to_assignments(list(words))))


def _execute(plan: Callable[[], Any]) -> None:
    """Plan and run. Of several ranks, which all find the same faults in the settings, the first speaks."""
    from palate import ranks
    from palate.settings import PalateError

    try:
        planned = plan()
    except PalateError as fault:
        if ranks.rank():
            ranks.end_quietly(fault.exit_code)
        raise
    from palate.closing import close
    from palate.live import Display
    from palate.run import execute

    display = Display(quiet=ranks.rank() > 0)
    outcome = execute(planned, display, ["palate", *sys.argv[1:]])
    if not ranks.rank():
        close(outcome, planned, display)


def _one_stage(kind: str, name: str, algorithm: str | None, words: Sequence[str]) -> None:
    _execute(lambda: _plan_one_stage(kind, name, algorithm, words))


def _plan_one_stage(kind: str, name: str, algorithm: str | None, words: Sequence[str]) -> Any:
    """One stage from flat settings; `config` among them names a YAML file with more."""
    from palate import settings
    from palate.catalogue import find_own_code
    from palate.one_stage import STAGE, OneStage, words_to_assignments
    from palate.run import plan

    find_own_code()
    shape = OneStage(kind, name, algorithm)
    assigned = words_to_assignments(list(words))
    files = [str(value) for key, value in map(settings.value_of, assigned) if key == "config"]
    flat: dict[str, Any] = {}
    for file in files:
        flat |= settings.read_yaml(Path(file))
    if "stages" in flat:
        raise settings.PalateError(f"{files[-1]}: this file has stages of its own. Use `palate run {files[-1]}`.")
    placed = [shape.place(a) for a in assigned if not a.startswith("config=")]
    try:
        return plan(shape.given(flat), placed, source="file" if files else "command line")
    except settings.PalateError as fault:  # the user never wrote the place that the settings were put in
        raise settings.PalateError(str(fault).replace(f"{STAGE}.", "").replace(f"{STAGE}: ", "")) from None


main.command("check", context_settings=_SETTINGS)(_told(check))
main.command("sweep", cls=SweepCommand, context_settings=_SETTINGS)(_told(sweep))


_FILES = {
    "demonstrations": "demonstrations.jsonl",
    "rankings": "pairs.jsonl",
    "pairs": "pairs.jsonl",
    "labels": "thumbs.jsonl",
    "returns": "rated.jsonl",
    "corrections": "corrections.jsonl",
}


def _method_verb(method: Method) -> None:
    """The verb of one algorithm: a run of one stage."""
    online = method.stage == "online"
    needs = "model=, reward= and prompts=" if online else f"model= and data= ({method.reads})"
    given = f"data={_FILES.get(method.reads.partition(' ')[0], 'data.jsonl')}"
    if online:
        given = "reward=runs/reward/1-reward/model prompts=prompts.jsonl"
    model = "gpt2" if method.name == "sft" else "runs/sft/1-sft/model"
    note = "\n\nreward= is a reward model's folder, or a Python function as module:function." if online else ""

    def verb(words: Sequence[str]) -> None:
        _one_stage(method.stage, method.name, method.name, words)

    verb.__doc__ = (
        f"{method.meaning}\n\nNeeds {needs}.{note}\n\n\b\nExample:\n"
        f"  palate {method.name} model={model} {given} learning_rate=1e-5\n"
        f"  palate {method.name} --config {method.name}.yaml --name first\n"
    )
    words = click.argument("words", nargs=-1, type=click.UNPROCESSED, metavar="[key=value ...]")
    short = textwrap.shorten(method.meaning, 64, placeholder=" …")
    what: dict[str, Any] = {"stage": method.stage, "algorithm": method.name}
    main.command(method.name, cls=_StageVerb, short_help=short, context_settings=_SETTINGS, **what)(words(_told(verb)))


for _method in sorted(methods().values(), key=lambda m: (m.name != "sft", m.stage == "online", m.name)):
    _method_verb(_method)


@main.command("evaluate", cls=_StageVerb, stage="evaluate", context_settings=_SETTINGS)
@click.argument("words", nargs=-1, type=click.UNPROCESSED, metavar="[key=value ...]")
@_told
def evaluate_verb(words: Sequence[str]) -> None:
    """Measure models: win rate, reward-model accuracy, KL, length and more.

    \b
    Example:
      palate evaluate --config evaluate.yaml
      palate run recipes/tasting_room.yaml    (whose last stage evaluates)
    """
    _one_stage("evaluate", "evaluate", None, words)


@main.command("generate", context_settings=_SETTINGS)
@click.argument("words", nargs=-1, type=click.UNPROCESSED, metavar="[key=value ...]")
@_told
def generate_verb(words: Sequence[str]) -> None:
    """Answer a prompt. Needs model= (a folder, hub id or run directory) and prompt=.

    \b
    Example:
      palate generate model=runs/tasting_room prompt="Describe the soup." max_new_tokens=40 temperature=0.7
      palate generate --model gpt2 --prompt "Once upon a time" --greedy
    """
    from palate.one_stage import words_to_assignments
    from palate.settings import PalateError, value_of

    pairs = [(key, text) for key, _, text in (a.partition("=") for a in words_to_assignments(list(words)))]
    texts = {key: text for key, text in pairs if key in ("model", "prompt")}
    for key in ("model", "prompt"):
        if key not in texts:
            raise PalateError(f"{key}= is missing. Example: palate generate model=gpt2 prompt='Once upon a time'.")
    more = dict(value_of(f"{key}={text}") for key, text in pairs if key not in texts)
    from palate.door import load

    for answer in load(texts["model"]).generate(texts["prompt"], **more):
        click.echo(answer)


@main.command("report")
@click.argument("run", type=click.Path(path_type=Path))
@_told
def report_verb(run: Path) -> None:
    """Write report.html and report.md into the run directory RUN.

    \b
    Example:
      palate report runs/tasting_room
    """
    from palate.diagnosis.report import write

    for path in write(run):
        click.echo(path)


main.command("show")(_told(show))


main.command("rank", context_settings=_HELP)(_told(rank))


@main.group("data")
def data_verb() -> None:
    """Look at data before training on it."""


@data_verb.command("check")
@click.argument("file")
@click.option("--model", help="Measure in this model's tokens instead of words, and check its masks.")
@click.option("--format", "form", default="auto", help="What the columns mean; `palate list formats`.")
@click.option("--max-length", type=int, help="Count rows longer than this.")
@click.option("--json", "as_json", is_flag=True, help="For machines.")
@_told
def check_verb(file: str, model: str | None, form: str, max_length: int | None, as_json: bool) -> None:
    """Count what would hurt in FILE: duplicates, empty fields, chosen = rejected, untrained rows and more.

    Exit code 1 when something was found that would make training fail or teach nothing.

    \b
    Example:
      palate data check pairs.jsonl
      palate data check pairs.jsonl --model gpt2 --max-length 512 --json
    """
    from palate.data.check import check_data, report_dict, report_text
    from palate.data.source import Data
    from palate.settings import parse

    tokenizer = None
    if model is not None:
        from palate.models.load import load

        tokenizer = load(model).tokenizer
    report = check_data(parse(Data, {"path": file, "format": form}), tokenizer=tokenizer, max_length=max_length)
    click.echo(json.dumps(report_dict(report), indent=1) if as_json else report_text(report))
    sys.exit(0 if report.healthy else 1)


@main.command("list")
@click.argument("topic", required=False)
@_told
def list_verb(topic: str | None) -> None:
    """List algorithms, rewards, stages, recipes, worlds, metrics or formats; all but the last two without TOPIC.

    \b
    Example:
      palate list recipes
    """
    from palate.catalogue import TOPICS, listing

    for name in [topic] if topic else TOPICS[:5]:
        found = listing(name)
        width = max((len(n) for n in found), default=0)
        click.echo(f"{name}:")
        for entry, meaning in found.items():
            click.echo(f"  {entry:<{width}}  {meaning}".rstrip())


@main.command("init")
@click.argument("name", default="tasting_room")
@click.option("--to", type=click.Path(path_type=Path), help="The file to write; the recipe's own name otherwise.")
@_told
def init_verb(name: str, to: Path | None) -> None:
    """Copy the recipe NAME (tasting_room when left out) here, to change and to run.

    \b
    Example:
      palate init tasting_room
      palate run tasting_room.yaml
    """
    from palate.catalogue import recipe
    from palate.settings import PalateError

    source = recipe(name)
    target = to or Path(source.name)
    if target.exists():
        raise PalateError(f"{target}: there is already a file of that name. Choose another with --to FILE.")
    target.write_text(source.read_text(encoding="utf-8"), encoding="utf-8")
    click.echo(f"{target} is a copy of {name}. Next: palate run {target}")
