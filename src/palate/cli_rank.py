"""`palate rank`: ratings of players out of games between them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from palate.judges.standings import Standings


@click.argument("file")
@click.option(
    "--by",
    type=click.Choice(["bradley_terry", "elo"]),
    default="bradley_terry",
    show_default=True,
    help="Which rating sorts the table and is exported.",
)
@click.option(
    "--k",
    type=click.FloatRange(0, min_open=True),
    default=32.0,
    show_default=True,
    help="Elo: the most points one game can move.",
)
@click.option("--start", type=float, default=1000.0, show_default=True, help="Elo: the rating before the first game.")
@click.option(
    "--l2",
    type=click.FloatRange(0),
    default=0.0,
    show_default=True,
    help="Bradley-Terry: draw scores together by l2/2 · Σ s².",
)
@click.option(
    "--pseudo-wins",
    type=click.FloatRange(0),
    help="Bradley-Terry: lend this many wins to both sides of every pair that met. "
    "Left out: 0.5 where someone is undefeated or without a win, else 0. With 0 that is a fault.",
)
@click.option("--resamples", type=click.IntRange(10), default=1000, show_default=True, help="Bootstrap resamples.")
@click.option(
    "--level",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    default=0.95,
    show_default=True,
    help="What share of the intervals shall hold the truth.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Fixes the resamples.")
@click.option("--players", help="The only names there may be, with commas between: a typo is then a fault.")
@click.option(
    "--export",
    "target",
    type=click.Path(path_type=Path),
    help="Write {prompt, completion, rating} here, a .jsonl: targets for a reward model.",
)
@click.option("--json", "as_json", is_flag=True, help="For machines: every number.")
def rank(file: str, players: str | None, target: Path | None, as_json: bool, **how: Any) -> None:
    """Rate the players of FILE by Bradley-Terry, with intervals, and by Elo.

    \b
    A row of FILE (jsonl, csv, parquet, ...) is one of
      {a, b, winner}                    winner is a name, or a, b, tie
      {a, b, score}                     what the first scored: 1 a win, 0.5 a tie, 0 a loss
      {prompt, completions, ranks, players}   who wrote each completion; rank 0 is the best
      {players, ranking}                names, the best first; [x, [y, z]] ties y and z

    Bradley-Terry is fitted by maximum likelihood, a tie as half a win for both; the order of the games does not
    matter, and the intervals are bootstrapped over rows. Elo walks through the games once and depends on their
    order: the table also shows where the reversed order ends. 400 points are odds of ten to one.

    \b
    Example:
      palate rank votes.csv
      palate rank votes.jsonl --json --seed 3
      palate rank rankings.jsonl --export rated.jsonl
    """
    from palate.judges.games import read_league
    from palate.judges.standings import Rating, as_lines, rate, targets
    from palate.settings import parse

    if target is not None:
        _require_writable(target)
    league = read_league(file, players.split(",") if players else ())
    standings = rate(league, parse(Rating, how), file)
    if target is not None:
        rows = targets(league, standings, file)
        target.write_text(as_lines(rows), encoding="utf-8")
        click.echo(f"{target}: {len(rows)} answers with the ratings of who wrote them", err=True)
    if as_json:
        click.echo(json.dumps(standings.document(), ensure_ascii=False, indent=1))
    else:
        _print(standings)


def _require_writable(target: Path) -> None:
    from palate.settings import PalateError

    if target.suffix != ".jsonl":
        raise PalateError(f"{target}: an export is a .jsonl, so that palate can read it. Name it {target.stem}.jsonl.")
    if target.exists():
        raise PalateError(f"{target}: there is already a file of that name. Remove it or choose another.")
    if not target.parent.is_dir():
        raise PalateError(f"{target}: there is no folder {target.parent}. Make it first.")


def _print(found: Standings) -> None:
    from textwrap import fill

    from rich.console import Console

    console = Console(highlight=False, markup=False, emoji=False)
    with console.capture() as printed:
        console.print(_table(found))
        for note in _notes(found):
            console.print(
                fill(note, min(console.width, 110), initial_indent="· ", subsequent_indent="  ", break_on_hyphens=False)
            )
    sys.stdout.write("".join(f"{line.rstrip()}\n" for line in printed.get().splitlines()))


def _table(found: Standings) -> Any:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("", justify="right")
    table.add_column("player", overflow="fold")
    for title in (
        "Bradley-Terry",
        f"{100 * found.level:g} % interval",
        "won",
        "tied",
        "lost",
        "Elo",
        "reversed",
    ):
        table.add_column(title, justify="right", no_wrap=True)
    for place, line in enumerate(found.lines, start=1):
        table.add_row(
            str(place), line.player, f"{line.bradley_terry:.0f}", f"{line.low:.0f} … {line.high:.0f}",
            str(line.won), str(line.tied), str(line.lost), f"{line.elo:.0f}", f"{line.elo_reversed:.0f}",
        )  # fmt: skip
    return table


def _notes(found: Standings) -> list[str]:
    fit = "maximum likelihood"
    fit += f" with l2 {found.l2:g}" if found.l2 else ""
    fit += f" with {found.pseudo_wins:g} pseudo-wins" if found.pseudo_wins else ""
    rows = "" if found.units == found.games else f" from {found.units} rows"
    return [
        f"Bradley-Terry by {fit}, {found.games} games{rows}, nll {found.nll:.3f}; "
        f"intervals from {found.resamples} resamples",
        *found.notes,
        f"Elo depends on the order of the games: reversed, it moves by up to {found.moved:.0f} points",
    ]
