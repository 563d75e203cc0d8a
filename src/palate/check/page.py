"""What a check found, for people: one page that reads at any width, with colour or without."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from palate.check.alone import DataFound
from palate.check.examples import visible
from palate.check.found import Counts, Example, Memory, ModelFound, Piece, RecipeFound, Setting, StageFound, Time
from palate.check.geometry import Geometry
from palate.check.plan import words
from palate.data.check import report_text
from palate.live import duration

_LONGEST = {True: 1200, False: 500}
"""Characters of a piece that are shown, trained or not; the middle of a longer one is left out."""
_NARROW = 72
"""Columns below which names stand above what they name."""
_STATES = {"new": "", "done": "green", "continue": "cyan", "again": "yellow"}


class Page:
    """Prints to one console. Trained text is green where there is colour and stands in [[ ]] where there is none."""

    def __init__(self, console: Console, everything: bool = False) -> None:
        """`everything`: settings that are defaults are listed too."""
        self.console, self.everything = console, everything
        self.colour = console.is_terminal and not console.no_color
        self._is_narrow = console.width < _NARROW

    def recipe(self, found: RecipeFound) -> None:
        """A whole recipe."""
        self._title(f"{found.recipe} → {found.folder}" if found.folder else found.recipe)
        if found.settings:
            self._rows([("settings", self._settings(found.settings))])
        if any(stage.seen.examples for stage in found.stages):
            self._rows([("legend", self._legend())])
        for stage in found.stages:
            self._stage(stage)
        self.console.print()
        self._end(self._verdict(found), found.all_warnings, found.all_faults)

    def data(self, found: DataFound) -> None:
        """A data set on its own."""
        source, _, counts = report_text(found.report).partition("\n")
        self._title(source)
        self.console.print(Group(*(Text(visible(line)) for line in counts.splitlines())))
        if found.examples:
            self._rows([("legend", self._legend()), ("examples", self._examples(found.examples))])
        self.console.print()
        verdict = f"{found.report.records:,} records"
        self._end(verdict, () if found.report.healthy else ("lines marked ! deserve a look",), found.faults)

    def model(self, found: ModelFound) -> None:
        """A model on its own."""
        self._title(found.model)
        rows: list[tuple[str, RenderableType]] = [(name, Text(_plain(value))) for name, value in found.facts.items()]
        rows += [(f"{name} token", Text(spelled)) for name, spelled in found.tokens.items()]
        rows.append(("memory", self._memory(found.memory)))
        if found.sample:
            rows.append(("says, greedily", self._body(found.sample)))
        self._rows(rows)
        self.console.print()
        self._end("it can be loaded", found.warnings, ())

    def geometry(self, found: Sequence[Geometry]) -> None:
        """One update of each stage, cut in several ways."""
        for one in found:
            self._title(f"{one.stage}: one update on {one.rows:,} rows, {one.parameters:,} numbers in its gradient")
            self._rows([(cut.how, Text(f"{cut.distance:.1e} of its size")) for cut in one.cuts])
            self.console.print()
        bound = max(one.bound for one in found)
        verdict = f"the gradient is that of all rows at once, however they are cut (to {bound:g})"
        faults = [one.fault for one in found if not one.holds]
        self._end("the gradient depends on the cut" if faults else verdict, (), faults)

    def _title(self, text: str) -> None:
        self.console.print(Text(visible(text), style="bold"))

    def _stage(self, stage: StageFound) -> None:
        seen = stage.seen
        self.console.print()
        self.console.print(
            Rule(Text(f"{stage.number} {stage.name} · {stage.kind}", style="bold"), align="left", style="dim")
        )
        rows: list[tuple[str, RenderableType]] = [
            ("plan", Text(words(stage.state), style=_STATES[stage.state.what] if self.colour else "")),
            ("settings", self._settings([s for s in stage.settings if s.name not in ("kind", "name")])),
        ]
        if seen.model:
            rows.append(("model", Text(visible(seen.model))))
        if seen.batches:
            rows.append(("batches", _sentences(seen.batches.words)))
        if seen.rules:
            rows.append(("tokens", _sentences(seen.rules)))
        if seen.batch:
            rows.append(("one batch", Text(_counts(seen.batch))))
        if seen.examples:
            rows.append(("examples", self._examples(seen.examples)))
        if seen.memory:
            rows.append(("memory", self._memory(seen.memory)))
        if seen.time:
            rows.append(("time", self._time(seen.time)))
        self._rows(rows)

    def _rows(self, rows: Iterable[tuple[str, RenderableType]]) -> None:
        """Names on the left, what there is to say on the right; in a narrow window below each other."""
        if self._is_narrow:
            for name, body in rows:
                self.console.print(Text(name, style="bold cyan" if self.colour else ""))
                self.console.print(Padding(body, (0, 0, 0, 2)))
            return
        table = Table.grid(padding=(0, 2, 0, 0), pad_edge=True)
        table.add_column(style="cyan" if self.colour else "", no_wrap=True)
        table.add_column(ratio=1)
        for name, body in rows:
            table.add_row(name, body)
        self.console.print(table)

    def _settings(self, settings: Sequence[Setting]) -> RenderableType:
        shown = [s for s in settings if self.everything or s.origin != "default"]
        hidden = len(settings) - len(shown)
        more = [Text(f"and {hidden:,} defaults (--all shows them)", style="dim")] if hidden else []
        return Group(*(self._narrow(shown) if self._is_narrow else [self._wide(shown)]), *more)

    def _narrow(self, settings: Sequence[Setting]) -> list[Text]:
        return [Text.assemble(s.name, " = ", _plain(s.value), (f"  {s.origin}", "dim")) for s in settings]

    def _wide(self, settings: Sequence[Setting]) -> Table:
        table = Table.grid(padding=(0, 2, 0, 0))
        table.add_column(overflow="fold")
        table.add_column(overflow="fold", ratio=1)
        table.add_column(style="dim", no_wrap=True)
        for setting in settings:
            table.add_row(Text(setting.name), Text(_plain(setting.value)), Text(setting.origin))
        return table

    def _legend(self) -> Text:
        rest = " is trained or was sampled; the rest is only read. ⏎ ⇥ are characters of the text."
        marked = ("Green text", "bold green") if self.colour else "Text in [[ ]]"
        return Text.assemble(marked, rest)

    def _examples(self, found: Sequence[Example]) -> Group:
        parts: list[RenderableType] = []
        for one in found:
            head = Text(f"{one.title}: ", style="bold" if self.colour else "")
            parts.append(head.append(_counts(one.counts), style="not bold dim" if self.colour else ""))
            parts.append(Padding(self._body(one), (0, 0, 0, 2)))
            parts += [Text(f"→ {note}", style="cyan" if self.colour else "") for note in one.notes]
        return Group(*parts)

    def _body(self, one: Example) -> Text:
        """The text of a row with its trained, or sampled, runs marked."""
        text = Text(overflow="fold")
        inside = False
        for piece in one.pieces:
            if not self.colour and piece.trained != inside:
                text.append("[[" if piece.trained else "]]")
            inside = piece.trained
            text.append(_shortened(piece), style=self._style(piece))
        return text.append("]]") if inside and not self.colour else text

    def _style(self, piece: Piece) -> str:
        if not self.colour:
            return ""
        shade = "bold green" if piece.trained else "dim"
        return f"{shade} reverse" if piece.special else shade

    def _memory(self, memory: Memory) -> RenderableType:
        table = Table.grid(padding=(0, 2, 0, 0))
        table.add_column(justify="right", no_wrap=True)
        table.add_column()
        for use, size in memory.bytes.items():
            if size:
                table.add_row(_bytes(size), use)
        table.add_row(Text(_bytes(memory.peak), style="bold"), Text("at most at one time", style="bold"))
        counts = ", ".join(f"{count:,} {use}" for use, count in memory.parameters.items() if count)
        return Group(table, Text(f"parameters: {counts}", style="dim"), Text(memory.basis, style="dim"))

    def _time(self, time: Time) -> RenderableType:
        parts = ", ".join(f"{part} {_seconds(seconds)}" for part, seconds in time.seconds.items())
        total = Text(f"about {_seconds(time.total)}", style="bold").append(f": {parts}", style="not bold")
        return Group(total, Text(f"an estimate for this machine: {time.basis}", style="dim"))

    def _verdict(self, found: RecipeFound) -> str:
        if not found.stages:
            return "nothing was set up: the settings have faults"
        left = [stage for stage in found.stages if stage.state.what != "done"]
        said = [f"{len(found.stages)} stages: {len(found.stages) - len(left)} done, {len(left)} to run"]
        if left and found.seconds is not None:
            said.append(f"about {_seconds(found.seconds)}")
        if found.peak:
            said.append(f"{_bytes(found.peak)} of tensors at most")
        return ", ".join(said)

    def _end(self, verdict: str, warnings: Sequence[str], faults: Sequence[str]) -> None:
        for text in warnings:
            self._line("warning: ", text, "yellow")
        for text in faults:
            self._line("fault: ", text, "red")
        self.console.print(Text(verdict, style="bold"))

    def _line(self, head: str, text: str, colour: str) -> None:
        line = Text(head, style=f"bold {colour}" if self.colour else "")
        self.console.print(line.append(visible(text), style="not bold"), soft_wrap=True)


def _sentences(sentences: Iterable[str]) -> Group:
    return Group(*(Text(visible(sentence)) for sentence in sentences))


def _plain(value: Any) -> str:
    """A value as YAML would have it on one line."""
    if isinstance(value, str):
        return visible(value)
    if isinstance(value, int) and not isinstance(value, bool) and value >= 10_000:
        return f"{value:,}"
    return visible(json.dumps(value, ensure_ascii=False, default=str))


def _counts(counts: Counts) -> str:
    cells = counts.tokens + counts.pad
    padding = f", {counts.pad:,} PAD ({counts.pad / cells:.0%} of the cells)" if counts.pad else ", no PAD"
    return f"{counts.tokens:,} tokens, {counts.trained:,} marked, {counts.bos:,} BOS, {counts.eos:,} EOS{padding}"


def _shortened(piece: Piece) -> str:
    most = _LONGEST[piece.trained]
    if len(piece.text) <= most:
        return piece.text
    return f"{piece.text[: most // 2]} … (of {piece.tokens:,} tokens) … {piece.text[-most // 3 :]}"


def _bytes(size: int) -> str:
    number = float(size)
    for unit in ("B", "kB", "MB"):
        if number < 1000:
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1000
    return f"{number:.2f} GB"


def _seconds(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 10 else duration(seconds)
