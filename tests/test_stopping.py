"""SIGTERM and SIGINT end a run where it can go on from: real signals, sent to this very process."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress

import pytest

from palate import stopping
from palate.parallel import World
from palate.settings import PalateError, Stopped
from palate.stopping import Stopper

SIGNALS = [signal.SIGTERM, signal.SIGINT]


@contextmanager
def listening() -> Iterator[Stopper]:
    stopper = Stopper(World())
    with stopper.listening():
        yield stopper


def send(number: int) -> None:
    os.kill(os.getpid(), number)
    for _ in range(3):  # Python hears a signal between two of its own steps
        time.sleep(0)


def ended_by(work: Callable[[], None]) -> BaseException | None:
    """What ended `work`. A stop raised where none may be must fail one test; let through, it would end them all."""
    try:
        work()
    except KeyboardInterrupt as end:
        return end
    return None


@pytest.mark.parametrize("number", SIGNALS)
def test_outside_a_held_block_it_stops_at_once(number: int) -> None:
    with listening(), pytest.raises(Stopped) as caught:
        send(number)
    assert caught.value.exit_code == 75
    assert not isinstance(caught.value, Exception), "no handler for faults takes it for one"


@pytest.mark.parametrize("number", SIGNALS)
def test_a_held_block_is_gone_through_to_its_end(number: int) -> None:
    reached: list[str] = []

    def work(stopper: Stopper) -> None:
        with stopper.held():
            send(number)
            reached.append("end of the block")
        reached.append("behind it")

    with listening() as stopper, pytest.raises(Stopped):
        work(stopper)
    assert reached == ["end of the block"]


def test_without_a_signal_nothing_happens() -> None:
    with listening() as stopper:
        for _ in range(3):
            with stopper.held():
                pass


@pytest.mark.parametrize("first", SIGNALS)
@pytest.mark.parametrize("second", SIGNALS)
def test_two_in_one_breath_are_one(first: int, second: int) -> None:
    """As launchers send them: the second must not tear the save that the first led to."""
    reached: list[str] = []

    def work(stopper: Stopper) -> None:
        try:
            with stopper.held():
                send(first)
                send(second)
                reached.append("step")
        except Stopped:
            with stopper.spared():
                send(second)
                reached.append("save")
            reached.append("behind the save")
            raise

    with listening() as stopper:
        assert isinstance(ended_by(lambda: work(stopper)), Stopped)
    assert reached == ["step", "save", "behind the save"]


@pytest.mark.parametrize("held", [True, False])
def test_again_after_a_while_means_now(held: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stopping, "_SECOND_THOUGHT", 0.05)
    with listening() as stopper:
        with pytest.raises(Stopped), stopper.held():
            send(signal.SIGTERM)
        time.sleep(0.06)
        with pytest.raises(KeyboardInterrupt) as caught, stopper.spared() if held else nullcontext():
            send(signal.SIGINT)
        assert not isinstance(caught.value, Stopped), "exit 130: there was no time for a checkpoint"


def test_a_fault_in_the_block_is_not_hidden_by_the_stop() -> None:
    def work(stopper: Stopper) -> None:
        with stopper.held():
            send(signal.SIGTERM)
            raise PalateError("the fault")

    with listening() as stopper:
        with pytest.raises(PalateError, match="the fault"):
            work(stopper)
        with pytest.raises(Stopped), stopper.held():
            pass  # the stop was heard all the same


def test_a_stop_that_was_swallowed_comes_again_at_the_next_held_block() -> None:
    """Foreign code may catch everything; Python itself does in a destructor."""
    with listening() as stopper:
        with suppress(BaseException):
            send(signal.SIGTERM)
        with pytest.raises(Stopped), stopper.held():
            pass


def test_held_blocks_nest_and_the_outermost_ends_the_run() -> None:
    reached: list[str] = []

    def work(stopper: Stopper) -> None:
        with stopper.held():
            with stopper.held():
                reached.append("inner")
            send(signal.SIGTERM)
            with stopper.spared():
                reached.append("save")
            with stopper.held():
                reached.append("another inner")
            reached.append("end of the outer")

    with listening() as stopper, pytest.raises(Stopped):
        work(stopper)
    assert reached == ["inner", "save", "another inner", "end of the outer"]


@pytest.mark.parametrize("end", [Stopped("over"), PalateError("over"), ValueError("over")], ids=repr)
def test_the_handlers_that_were_there_are_put_back(end: BaseException) -> None:
    heard: list[int] = []

    def mine(number: int, frame: object) -> None:
        heard.append(number)

    before = {number: signal.signal(number, mine) for number in SIGNALS}
    try:
        with pytest.raises(type(end), match="over"), listening():
            raise end
        for number in SIGNALS:
            assert signal.getsignal(number) is mine
            send(number)
        assert heard == SIGNALS
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_in_another_thread_it_listens_to_nothing_and_a_main_thread_still_does() -> None:
    """Only a main thread can take signals over; a run started from a notebook's worker thread goes on without."""
    before = [signal.getsignal(number) for number in SIGNALS]

    def work() -> list[object]:
        with listening() as stopper, stopper.held():
            return [signal.getsignal(number) for number in SIGNALS]

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(work).result() == before
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_a_signal_that_comes_while_another_thread_works_is_heard_by_the_main_one() -> None:
    started, go_on = threading.Event(), threading.Event()

    def work() -> str:
        started.set()
        go_on.wait(10)
        return "worked to its end"

    with listening() as stopper, ThreadPoolExecutor(1) as pool:
        running = pool.submit(work)
        started.wait(10)
        with pytest.raises(Stopped), stopper.held():
            send(signal.SIGTERM)
        go_on.set()
        assert running.result(10) == "worked to its end"


class TwoRanks(World):
    """A world in which the other rank was asked to stop, as far as `any` can tell."""

    def any(self, flag: bool) -> bool:
        return True


def test_ranks_stop_together_at_the_end_of_a_held_block_only() -> None:
    """Alone at once, together never in between: the others would wait for this rank's messages for ever."""
    stopper = Stopper(TwoRanks(size=2))
    reached: list[str] = []
    with stopper.listening():
        assert ended_by(lambda: send(signal.SIGTERM)) is None
        reached.append("between blocks")
        with pytest.raises(Stopped), stopper.held():
            reached.append("in the block")
    assert reached == ["between blocks", "in the block"]
    quiet = Stopper(TwoRanks(size=2))
    with pytest.raises(Stopped), quiet.held():
        pass  # this rank heard nothing, another did
