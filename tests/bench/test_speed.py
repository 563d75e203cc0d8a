"""The side-by-side bench without its systems: arithmetic by hand, the protocol, turns, records, page, picture."""

from __future__ import annotations

import io
import json
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.speed import __main__ as command
from bench.speed import accounting, gpu, machine, page, picture, results, runner, systems
from bench.speed.limit import products
from bench.speed.protocol import Link, serve
from bench.speed.runner import Taken, Turn, Worker, WorkerError, rounds
from bench.speed.workloads import GPU_ROWS, MODELS, ROWS, Row, Work, given_counts

TARGETS = {
    "ppo-small": 2.5,
    "ppo-small-ragged": 3.5,
    "ppo-mid": 2.3,
    "ppo-small-shared": 5,
    "ppo-small-hydra": 8,
    "dpo-small": 5,
    "dpo-mid": 4,
    "sft-small": 5,
    "reward-small": 4,
    "kto-small": 4,
    "orpo-small": 4,
    "grpo-small": 3.5,
    "rloo-small": 3.5,
    "generate-small": 4,
    "generate-mid": 3,
    "generate-llama15m": 4,
    "generate-llama15m-vllm": 1.3,
}


def test_every_ratio_that_is_asked_for_has_its_row() -> None:
    assert {name: row.target for name, row in ROWS.items() if row.target is not None} == TARGETS


def test_weights_are_counted_as_by_hand() -> None:
    small, llama = MODELS["small"], MODELS["llama15m"]
    assert (small.blocks, small.head) == (4 * 12 * 256 * 256, 6000 * 256) == (3_145_728, 1_536_000)
    assert llama.blocks == 6 * (4 * 288 * 288 + 3 * 288 * 768)
    for shape in MODELS.values():  # the limit is measured on just these
        assert sum(i * o * count for (i, o), count in products(shape).items()) == shape.blocks + shape.head


def test_an_iteration_of_ppo_is_as_counted_by_hand() -> None:
    found = accounting.parts(ROWS["ppo-small"], {"asked": 64 * 24, "drawn": 64 * 53})
    # 64 × 77 tokens are read, 64 × 53 scored: a pass that speaks is 2 · (3,145,728 · 4,928 + 1,536,000 · 3,392) FLOP.
    # Drawing leaves out the last tokens; three passes score, two of them without a head; 4 epochs train two models.
    assert found == pytest.approx({"generate": 41.022, "score": 103.435, "train": 869.146}, abs=0.002)


@pytest.mark.parametrize(
    ("name", "times", "head"), [("sft", 6, 1), ("orpo", 6, 1), ("dpo", 8, 1), ("kto", 12, 1), ("reward", 6, 0)]
)
def test_a_step_on_given_data_is_so_many_forward_passes(name: str, times: int, head: int) -> None:
    found = accounting.parts(ROWS[f"{name}-small"], {"read": 1000, "scored": 600})
    assert found["train"] == pytest.approx(times * (3_145_728 * 1000 + head * 1_536_000 * 600) / 1e9)


def test_methods_without_a_critic_have_no_critic_to_pay() -> None:
    counts = {"asked": 1536, "drawn": 3392}
    grpo, rloo = (accounting.parts(ROWS[f"{kind}-small"], counts) for kind in ("grpo", "rloo"))
    speaking = 2 * (3_145_728 * 4928 + 1_536_000 * 3392) / 1e9
    assert (grpo["score"], rloo["score"], grpo["train"]) == (0.0, pytest.approx(speaking), pytest.approx(3 * speaking))


def work_of(name: str, **data: Any) -> Work:
    return Work(ROWS[name], "policy", "", "", data)


def test_tokens_of_given_data_are_those_of_the_turns_own_rows() -> None:
    sft = work_of("sft-small", sequences=[[0] * (n % 32 + 1) for n in range(512)])
    assert given_counts(sft, 1) == {"read": sum(range(17, 33)), "scored": sum(range(17, 33)) - 16}
    assert given_counts(sft, 33) == given_counts(sft, 1)
    pairs = {"prompts": [[0] * 4] * 512, "chosen": [[0] * 5] * 512, "rejected": [[0] * 7] * 512}
    assert given_counts(work_of("dpo-small", **pairs), 0) == {"read": 16 * (4 + 5 + 4 + 7), "scored": 16 * 12}


def test_a_row_comes_back_from_disk_as_it_was(tmp_path: Path) -> None:
    for row in ROWS.values():
        work = Work(row, "a", "b", "c", {"prompts": [[1, 2]]})
        work.write(tmp_path / "row.json")
        assert Work.read(tmp_path / "row.json") == work
    assert len(work_of("grpo-small").batch(3)) == 8  # prompts, of which each has 8 answers


def test_a_worker_answers_a_line_with_a_line() -> None:
    told = io.StringIO()
    link = Link(io.StringIO("go\ngo\n"), told)
    link.ready(palate="0")
    serve(link, lambda turn: {"loss": turn + 0.5})
    ready, *turns = [json.loads(line) for line in told.getvalue().splitlines()]
    assert ready == {"ready": True, "palate": "0"}
    assert [turn["loss"] for turn in turns] == [0.5, 1.5]
    assert all({"seconds", "cpu", "peak_mb"} <= set(turn) and turn["peak_mb"] > 1 for turn in turns)


FAKE = """
import sys
from bench.speed.protocol import Link, serve
link = Link()
print("a library chats")
link.ready(fake="1")
def turn(number):
    print("and chats")
    if number == 2:
        raise SystemExit("no third turn")
    return {"counts": {}, "row": sys.argv[1]}
serve(link, turn)
"""


def test_a_process_takes_turns_and_its_last_words_are_kept(tmp_path: Path) -> None:
    (tmp_path / "fake_worker.py").write_text(FAKE)
    fake = systems.System("fake", "fake_worker", Path(sys.executable), (tmp_path,))
    worker = Worker(fake, Path("row.json"))
    try:
        assert worker.facts == {"ready": True, "fake": "1"}
        assert [worker.take()["row"] for _ in range(2)] == ["row.json"] * 2
        with pytest.raises(WorkerError, match=r"(?s)fake: its worker ended.*no third turn"):
            worker.take()
    finally:
        worker.close()


def test_peers_are_there_only_with_their_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(systems.PEERS, raising=False)
    assert systems.peers_folder() is None
    assert systems.peer("trl", None) is systems.peer("trl", tmp_path) is None
    (tmp_path / "venv" / "bin").mkdir(parents=True)
    (tmp_path / "venv" / "bin" / "python").touch()
    trl = systems.peer("trl", tmp_path)
    assert trl is not None
    assert systems.peer("trl-ppo", tmp_path) is systems.peer("vllm", tmp_path) is None
    assert trl.environment({"PALATE": "x"})["OMP_NUM_THREADS"] == "2"


class Clockwork:
    """A worker whose turns are known, with the disturbance each meets."""

    def __init__(self, name: str, others: list[float], log: list[str]) -> None:
        self.name, self.others, self.log = name, iter(others), log

    def take(self) -> Mapping[str, Any]:
        self.log.append(self.name)
        return {"cpu": next(self.others)}


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a report says of processor time stands for what others used."""
    monkeypatch.setattr(runner, "wait_for_quiet", lambda patience: 0.0)
    monkeypatch.setattr(machine.Watch, "others", lambda self, cpu: cpu)


def test_systems_take_turns_and_disturbed_ones_are_taken_again(quiet: None) -> None:
    log: list[str] = []
    ours, theirs = Clockwork("a", [0, 0, 0.5, 0, 0, 0], log), Clockwork("b", [0] * 6, log)
    first, second = rounds([ours, theirs], 3)
    assert "".join(log) == "ab" + "abababa"  # a warm-up each, then rounds; the fourth only for the disturbed one
    assert (len(first.turns), first.clean, len(second.turns)) == (4, 3, 3)


def test_a_machine_that_is_never_quiet_does_not_hold_the_bench_for_ever(quiet: None) -> None:
    taken = rounds([Clockwork("a", [0.9] * 99, [])], 3)[0]
    assert (taken.clean, len(taken.turns)) == (0, 9)


def turn(seconds: float, others: float = 0.0, loss: float = 1.0, **more: Any) -> Turn:
    report = {"seconds": seconds, "cpu": 0.0, "peak_mb": 100.0 * seconds, "loss": loss, **more}
    return Turn({"counts": {"read": 1000, "scored": 600}, **report}, others)


def taken(*seconds: float, losses: tuple[float, ...] = (1.0, 0.5, 0.25)) -> Taken:
    return Taken(turn(9.0), [turn(s, loss=x) for s, x in zip(seconds, losses, strict=True)])


def record(row: Row, ours: Taken, theirs: Taken | None) -> results.Record:
    limits = {"best": 400.0, "mkl": 200.0, "onednn": 400.0}
    sides = [results.measured(row, t, 3, {"ready": True, "torch": "2"}) if t else None for t in (ours, theirs)]
    about = {"limit": {"read": limits, "write": limits}, "machine": {"processor": "P"}, "date": "2026-11-25"}
    return {"palate": sides[0], "peer": sides[1], "peer_name": "TRL 1.16" if theirs else None, **about}


def test_a_record_has_medians_ratio_share_and_the_gap_of_the_losses() -> None:
    row = ROWS["sft-small"]
    found = record(row, taken(1.0, 2.0, 3.0), taken(8.0, 10.0, 40.0, losses=(1.0, 0.5, 0.25003)))
    assert found["palate"]["seconds"] == {"median": 2.0, "min": 1.0, "max": 3.0}
    assert found["palate"]["tokens_per_second"] == 500.0
    assert found["palate"]["gflops"] == pytest.approx(6 * (3_145_728 * 1000 + 1_536_000 * 600) / 1e9 / 2.0)
    assert results.ratio(found) == 5.0
    assert results.memory(found) == pytest.approx(300 / 4000)
    assert results.apart(found) == pytest.approx(3e-5)
    assert found["palate"]["compared"] == [1.0, 1.0, 0.5, 0.25]


def test_the_least_disturbed_turns_stand_in_and_are_marked() -> None:
    turns = Taken(turn(1.0), [turn(5.0, 0.5), turn(2.0, 0.1), turn(3.0, 0.0), turn(9.0, 0.9)])
    found = results.measured(ROWS["sft-small"], turns, 2, {})
    assert (found["seconds"]["median"], found["disturbed"], found["taken"]) == (2.5, 1, 4)
    assert page.seconds(found).endswith("†1")


def test_a_part_has_its_own_share() -> None:
    row = ROWS["ppo-small"]
    parts = {"generate": 1.0, "score": 1.0, "train": 4.0}
    one = turn(6.0, parts=parts, counts={"asked": 1536, "drawn": 3392})
    found = results.measured(row, Taken(one, [one]), 1, {})
    assert found["parts"]["train"] == {"seconds": 4.0, "gflops": pytest.approx(869.107 / 4, abs=0.01)}
    sides = {"palate": found, "peer": found, "peer_name": "TRL 1.12", "machine": {}, "date": "2026-11-25"}
    rows = {"ppo-small": {**sides, "limit": {"read": {"best": 400.0}, "write": {"best": 200.0}}}}
    assert "| train | 4.000 | 4.000 | 1.00× | 217 = 54 % |" in "\n".join(page.parts_table(rows))


def test_the_page_says_what_was_reached_and_what_was_not() -> None:
    sft, dpo = ROWS["sft-small"], ROWS["dpo-small"]
    good = record(sft, taken(1.0, 2.0, 3.0), taken(9.0, 11.0, 12.0))
    bad = record(dpo, taken(1.0, 2.0, 3.0), taken(3.0, 4.0, 5.0, losses=(1.0, 0.5, 0.26)))
    said = page.page({"sft-small": good, "dpo-small": bad})
    assert "| **5.50×** | 5× ✓ |" in said
    assert "| **2.00×** | 5× ✗ |" in said
    assert "1.0e-02 | ✗ |" in said  # the losses of the second row lie apart
    alone = page.page({"sft-small": record(sft, taken(1.0, 2.0, 3.0), None)})
    assert "palate was measured alone: SFT small, 16 × 128–256." in alone
    assert "different model" not in alone
    assert "(*different model*)" in page.page({"ppo-small-hydra": good})


def test_rows_of_a_gpu_have_a_page_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = record(GPU_ROWS["gpu-sft-llama-1b"], taken(1.0, 2.0, 3.0), taken(2.0, 3.0, 4.0))
    monkeypatch.setattr(command, "measure", lambda *given: found)
    raw = tmp_path / "gpu.json"
    monkeypatch.setattr(command, "has_gpu", lambda: False)
    assert command.main(["--gpu", "--raw", str(raw)]) == 2
    assert not raw.exists()
    monkeypatch.setattr(command, "has_gpu", lambda: True)
    assert command.main(["--gpu", "--rows", "gpu-sft-llama-1b", "--raw", str(raw)]) == 0
    said = raw.with_suffix(".md").read_text()
    assert said.startswith("# palate beside its peers on a GPU")
    assert "SFT Llama 0.9 B, 64 × 128–256 | TRL 1.16 | 2 (1–3) | 3 (2–4) | **1.50×**" in said
    assert raw.with_suffix(".svg").exists()
    assert command.asked(["--gpu"]).names == list(GPU_ROWS)
    assert not set(command.asked([]).names) & set(GPU_ROWS)
    with pytest.raises(SystemExit):
        command.asked(["--rows", "gpu-sft-llama-1b"])
    assert {(row.device, row.precision) for row in GPU_ROWS.values()} == {("cuda", "bfloat16")}


def test_clocks_wait_for_the_device_and_memory_is_its_own() -> None:
    told, waits = io.StringIO(), list[int]()
    link = Link(io.StringIO("go\n"), told)
    link.settle = lambda: waits.append(1)
    link.peak = lambda: 7.0
    serve(link, lambda turn: {})
    assert json.loads(told.getvalue())["peak_mb"] == 7.0
    assert len(waits) == 2, "before the clock starts and before it stops"


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks what happens without a GPU")
def test_a_row_for_a_gpu_says_that_there_is_none() -> None:
    gpu.watch(link := Link(io.StringIO(""), io.StringIO()), ROWS["sft-small"])
    assert link.peak() > 1
    with pytest.raises(SystemExit, match="gpu-sft-llama-1b is for a GPU, and torch finds none here"):
        gpu.watch(link, GPU_ROWS["gpu-sft-llama-1b"])


def test_a_peak_memory_that_is_asked_for_is_judged() -> None:
    ppo = replace(ROWS["sft-small"], memory=0.5)
    assert page.memory(ppo, record(ppo, taken(1.0, 2.0, 3.0), taken(1.0, 2.0, 7.0))).endswith("0.43 ≤ 0.5 ✓")
    assert page.memory(ppo, record(ppo, taken(1.0, 2.0, 3.0), taken(1.0, 2.0, 4.0))).endswith("0.75 ≤ 0.5 ✗")


def test_the_picture_has_a_bar_for_each_ratio_and_a_mark_for_each_that_is_asked() -> None:
    found = record(ROWS["sft-small"], taken(1.0, 2.0, 3.0), taken(9.0, 10.0, 12.0))
    drawn = picture.picture({"sft-small": found, "ppo-small-hydra": found, "generate-gpt2-124m": found})
    root = ElementTree.fromstring(drawn)
    kinds = [element.get("class") for element in root.iter() if element.get("class")]
    assert (kinds.count("bar"), kinds.count("bar other"), kinds.count("target")) == (2, 1, 2)
    assert picture.picture({}).startswith("<svg")


def test_rows_are_merged_and_unknown_ones_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    raw = tmp_path / "results.json"
    found = record(ROWS["sft-small"], taken(1.0, 2.0, 3.0), None)
    monkeypatch.setattr(command, "measure", lambda *given: found)
    monkeypatch.delenv(systems.PEERS, raising=False)
    for name in ("sft-small", "dpo-small"):
        assert command.main(["--rows", name, "--raw", str(raw)]) == 0
    assert set(json.loads(raw.read_text())["rows"]) == {"sft-small", "dpo-small"}
    assert "DPO small" in raw.with_suffix(".md").read_text()
    assert "measured alone" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        command.main(["--rows", "dpo-smal"])
    assert "there is no row 'dpo-smal'" in capsys.readouterr().err


def test_the_machine_is_named() -> None:
    assert {"processor", "cores", "instructions", "memory"} <= set(machine.facts())
    watch = machine.Watch.start()
    assert 0.0 <= watch.others(worker_cpu=1e6) == 0.0
