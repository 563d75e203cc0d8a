"""The worker of `bench.chaos` for one number of threads: forks runs, kills them, and writes down how they end."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import yaml

from bench import chain
from bench.attempts import ASKED_TO_STOP, Attempt, Ended, fork, spawn
from bench.chain import Link
from bench.moments import NthOnDisk, listen
from bench.run_directory import damage, differences, going_on
from palate.run import plan_file

RECIPE = Path(__file__).with_name("chaos.yaml")


@dataclass
class Kill:
    """One end of a process before its time."""

    way: str
    where: str
    name: str = ""
    damage: str | None = None
    restart: float | None = None
    """Seconds from the next start to its first logged step; imports do not count."""


@dataclass
class Record:
    """What a worker reports."""

    imports: float = 0.0
    """Seconds by which a process of its own starts later than a forked one."""
    whole: float = 0.0
    """Seconds of the forked run that is never killed."""
    disk_steps: int = 0
    """How many steps on the disk that run takes."""
    runs: int = 0
    named: int = 0
    kills: list[Kill] = field(default_factory=list)
    astray: list[str] = field(default_factory=list)
    """Starts that ended in another way than they should: a restart that needed a hand, a signal not heeded."""
    unequal: list[str] = field(default_factory=list)
    missed: list[str] = field(default_factory=list)


def _products() -> str:
    """The back end for all runs, measured once: runs that measured for themselves might choose, and round, apart."""
    ask = "from palate.models import linear; print(linear.backend())"
    return subprocess.run([sys.executable, "-c", ask], check=True, stdout=subprocess.PIPE, text=True).stdout.strip()


class Worker:
    """Kills runs in `home`; every run is compared with the one in `home/whole`, a process of its own."""

    def __init__(self, home: Path, seed: str) -> None:
        shutil.rmtree(home, ignore_errors=True)
        home.mkdir(parents=True)
        self.home, self.draw = home, random.Random(seed)
        self.record = Record()
        self.recipe, self.whole = home / RECIPE.name, home / "whole"
        self.recipe.write_text(f"{RECIPE.read_text(encoding='utf-8')}linear: {_products()}\n", encoding="utf-8")
        alone = self._never_killed(spawn(Attempt(self.recipe, self.whole), os.environ))
        plan_file(self.recipe)  # imports what a run imports
        attempt, counted = Attempt(self.recipe, home / "forked"), home / "disk_steps"
        forked = self._never_killed(fork(attempt, _Counter(counted)))
        self.record.whole, self.record.imports = forked.seconds, alone.seconds - forked.seconds
        self.record.disk_steps = len(counted.read_text(encoding="utf-8"))
        self._compare(attempt.run)

    def _never_killed(self, ended: Ended) -> Ended:
        if ended.code != 0:
            raise SystemExit(f"the run that is never killed ended with {ended.code}:\n{ended.said}")
        return ended

    def _compare(self, run: Path) -> None:
        self.record.runs += 1
        found = differences(self.whole, run)
        if found:
            self.record.unequal.append(f"{run.name}: {', '.join(found)}")

    def _count(self, attempt: Attempt, ended: Ended, way: str, name: str = "", harm: bool = False) -> None:
        """Write down a kill; `harm` damages the newest checkpoint before the next start."""
        where = going_on(attempt.run, ended.began)
        self.record.kills.append(Kill(way, where, name, damage(attempt.run, self.draw) if harm else None))

    def _note_restart(self, ended: Ended) -> None:
        """How long it took to get going again after the kill before."""
        if self.record.kills and self.record.kills[-1].restart is None:
            self.record.kills[-1].restart = ended.to_first_step

    def _broke(self, attempt: Attempt, ended: Ended, name: str) -> None:
        last = " ".join(ended.said.split()[-40:])
        self.record.astray.append(f"{attempt.run.name}: {name}: exit code {ended.code}: … {last}")

    def _go_through(self, attempt: Attempt, links: Sequence[Link]) -> None:
        """One start for each moment. One that ends in another way than it should is written down; the next goes on."""
        for link in links:
            moment = link.moment
            self.record.named += 1
            ended = fork(attempt, moment)
            self._note_restart(ended)
            killed = moment.signal == signal.SIGKILL
            if ended.code == 0:
                self.record.missed.append(f"{moment.name}, nor what comes after it: the run is at its end")
                return
            if ended.code != (-signal.SIGKILL if killed else ASKED_TO_STOP):
                self._broke(attempt, ended, moment.name)
            elif not any(attempt.run.glob(link.leaves)):
                self.record.missed.append(f"{moment.name}: it left no {link.leaves}")
            else:
                way = "at an exact moment" if killed else "asked to stop"
                self._count(attempt, ended, way, moment.name, link.damage)

    def _end(self, attempt: Attempt, same: bool = True) -> None:
        """The last start, which is left alone; `same`: it must end like the run that was never killed."""
        ended = fork(attempt)
        self._note_restart(ended)
        if ended.code != 0:
            self._broke(attempt, ended, "(left alone)")
        elif same:
            self._compare(attempt.run)

    def chain(self, links: Sequence[Link] = chain.CHAIN, name: str = "chain") -> None:
        """One run that is ended at every exact moment of its life."""
        attempt = Attempt(self.recipe, self.home / name)
        self._go_through(attempt, links)
        self._end(attempt)

    def replaced(self) -> None:
        """Settings are changed and changed back, a stage is put in and taken out, with kills in between."""
        first = Attempt(self.recipe, self.home / "replaced")
        shutil.copytree(self.whole, first.run)
        other = Attempt(self.recipe, first.run, ["stages.0.optimiser.learning_rate=0.001"])
        longer = Attempt(self._longer(), first.run)
        for attempt, links in ((other, chain.CHANGED), (first, chain.CHANGED_BACK), (longer, chain.RENUMBERED)):
            self._go_through(attempt, links)
        self._end(longer, same=False)
        self._go_through(first, chain.NUMBERED_BACK)
        self._end(first)

    def _longer(self) -> Path:
        """The recipe with one more stage before the last."""
        recipe = yaml.safe_load(self.recipe.read_text(encoding="utf-8"))
        stages = recipe["stages"]
        stages.insert(2, {**stages[0], "name": "more", "max_steps": 2})
        path = self.home / "longer.yaml"
        path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
        return path

    def random(self, kills: int) -> None:
        """Runs killed at random until `kills` are counted; the last one is then left to end."""
        for number in range(10 * kills):
            attempt = Attempt(self.recipe, self.home / f"random-{number}")
            kills -= self._one_run(attempt, kills)
            if attempt.run.name not in str(self.record.unequal):
                shutil.rmtree(attempt.run, ignore_errors=True)
            if kills == 0:
                return

    def _one_run(self, attempt: Attempt, most: int) -> int:
        """Kill one run up to `most` times; the first kill is of a process of its own. Returns the kills."""
        for kills in range(most):
            way, ended = self._kill_somewhere(attempt, alone=kills == 0)
            self._note_restart(ended)
            if ended.code == 0:
                self._compare(attempt.run)
                return kills
            if ended.code != -signal.SIGKILL:
                self._broke(attempt, ended, way)
                return kills
            self._count(attempt, ended, way, harm=self.draw.random() < 0.25)
        self._end(attempt)
        return most

    def _kill_somewhere(self, attempt: Attempt, alone: bool) -> tuple[str, Ended]:
        share = self.draw.uniform(0, 0.5)  # of a whole run: later starts have a part of it behind them
        if alone:
            return "by the clock, a process of its own", spawn(attempt, os.environ, share * self.record.whole)
        if self.draw.random() < 0.5:
            return "by the clock", fork(attempt, kill_after=share * self.record.whole)
        return "before a step on the disk", fork(attempt, NthOnDisk(1 + int(share * self.record.disk_steps)))


@dataclass(frozen=True)
class _Counter:
    """No moment at all: counts the steps on the disk, one character each."""

    path: Path
    name: str = "never"
    signal: int = 0

    def arm(self, run: Path) -> None:
        handle = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        listen(run, lambda event, path: os.write(handle, b"."))


def main(words: Sequence[str]) -> None:
    """FOLDER KILLS SEED: writes FOLDER/found.json."""
    home, kills, seed = Path(words[0]), int(words[1]), words[2]
    worker = Worker(home, seed)
    worker.chain()
    worker.replaced()
    worker.random(kills)
    (home / "found.json").write_text(json.dumps(asdict(worker.record), indent=1), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
