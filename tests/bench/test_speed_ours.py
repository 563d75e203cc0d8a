"""palate's side of the bench on a model of a few thousand weights: every kind of row takes real turns."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from bench.speed import material, ours, workloads
from bench.speed.workloads import EOS, GPU_ROWS, ROWS, Row, Shape, Work

POOL = 16
TEXT = Path(ours.__file__).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("material")


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tiny model under the name of a real one, local text of a few lines, and few rows."""
    monkeypatch.setitem(workloads.MODELS, "small", Shape("gpt2", 2, 16, 2, 300, 64))  # type: ignore[arg-type]
    monkeypatch.setattr(material, "corpus", lambda limit: iter([TEXT]))
    monkeypatch.setattr(workloads, "POOL", POOL)


def tiny(row: Row) -> Row:
    sizes = {"prompt": (5, 5) if row.prompt[1] else (0, 0), "answer": (8, 12) if row.answer[0] < 53 else (6, 6)}
    return replace(row, batch=8, group=min(row.group, 4), **sizes)


def made(folder: Path, row: Row) -> Work:
    ids, words = material.token_ids(folder, "small"), material.tokenizer(folder, 300)
    path = material.work(folder, row)
    return replace(Work.read(path), data=material.data(row, words, ids, POOL))


@pytest.mark.parametrize(
    "name",
    ["ppo-small", "ppo-small-shared", "ppo-small-hydra", "grpo-small", "rloo-small"],
)
def test_an_online_row_takes_whole_iterations(
    folder: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = tiny(ROWS[name])
    if row.layout["kind"] == "hydra":
        row = replace(row, layout={"kind": "hydra", "unfrozen_blocks": 1})
    monkeypatch.setitem(ours.ALGORITHMS, row.kind, _grouped(row))
    first = ours.turns_of(made(folder, row), tmp_path)(0)
    assert set(first["parts"]) == {"generate", "score", "train"}
    assert min(first["parts"].values()) > 0
    assert first["counts"]["asked"] == 8 * 5
    assert 8 <= first["counts"]["drawn"] <= 8 * 6
    if row.kind == "ppo":
        assert first["counts"]["drawn"] == 8 * 6  # no answer ends before its time
    assert math.isfinite(first["loss"])


def _grouped(row: Row) -> dict[str, object]:
    given = dict(ours.ALGORITHMS[row.kind])
    return given if row.kind == "ppo" else {**given, "num_generations": row.group}


@pytest.mark.parametrize("name", ["sft-small", "reward-small", "dpo-small", "kto-small", "orpo-small"])
def test_a_row_of_given_data_takes_steps_that_learn(folder: Path, tmp_path: Path, name: str) -> None:
    row = tiny(ROWS[name])
    work = made(folder, row)
    take = ours.turns_of(work, tmp_path)
    losses = [take(n)["loss"] for n in range(2 * POOL // row.batch)]
    assert all(math.isfinite(loss) for loss in losses)
    start = {"dpo-small": math.log(2), "kto-small": 0.5}.get(name)
    if start is not None:  # the policy is its reference still
        assert losses[0] == pytest.approx(start, abs=1e-5)
    assert losses[0] != losses[-1]


def test_the_loss_of_a_row_is_that_of_its_own_tokens(folder: Path, tmp_path: Path) -> None:
    work = made(folder, tiny(ROWS["sft-small"]))
    found = ours.turns_of(work, tmp_path)(0)
    model = AutoModelForCausalLM.from_pretrained(work.policy)
    total, count = 0.0, 0
    with torch.no_grad():
        for i in work.batch(0):
            ids_1T = torch.tensor([work.data["sequences"][i]])
            logp_TV = model(ids_1T).logits[0, :-1].log_softmax(-1)
            total -= float(logp_TV.gather(-1, ids_1T[0, 1:, None]).sum())
            count += ids_1T.shape[1] - 1
    assert found["loss"] == pytest.approx(total / count, abs=1e-5)
    assert found["counts"]["scored"] == count


def test_generation_draws_what_it_says(folder: Path, tmp_path: Path) -> None:
    row = replace(tiny(ROWS["generate-small"]), answer=(6, 6))
    assert ours.turns_of(made(folder, row), tmp_path)(1)["counts"] == {"asked": 40, "drawn": 48}


@pytest.mark.parametrize("name", ["gpu-sft-gpt2-124m", "gpu-ppo-gpt2-124m", "gpu-generate-gpt2-124m"])
def test_rows_of_a_gpu_take_their_turns_in_half_precision(folder: Path, tmp_path: Path, name: str) -> None:
    """Here on the CPU, with the tiny model: the same numbers up to bfloat16's rounding, and not to float32's."""
    half = replace(tiny(GPU_ROWS[name]), model="small", device="cpu")
    found, whole = (
        ours.turns_of(made(folder, replace(half, precision=precision)), tmp_path)(0)
        for precision in ("bfloat16", "float32")
    )
    assert found["counts"] == whole["counts"]
    if half.kind == "sft":
        assert found["loss"] == pytest.approx(whole["loss"], rel=1e-2)
        assert found["loss"] != pytest.approx(whole["loss"], rel=1e-6)


def test_answers_end_with_the_chance_that_is_asked(folder: Path) -> None:
    leaning = AutoModelForCausalLM.from_pretrained(material.model(folder, "small", "policy", 0.05))
    plain = AutoModelForCausalLM.from_pretrained(material.model(folder, "small", "policy"))
    text_BT = torch.tensor(material.token_ids(folder, "small")[: 64 * 32]).view(-1, 64)
    with torch.no_grad():
        chance, before = (m(text_BT).logits.softmax(-1)[..., EOS] for m in (leaning, plain))
    assert float(chance.mean()) == pytest.approx(0.05, rel=0.1)
    assert float(before.mean()) < 0.01


def test_every_piece_of_text_is_its_own_tokens(folder: Path) -> None:
    words, ids = material.tokenizer(folder, 300), material.token_ids(folder, "small")
    pieces = material.spans(words, ids, 1, 20, (5, 9))
    assert all(words.encode(words.decode(piece)) == piece and 5 <= len(piece) <= 9 for piece in pieces)
    assert pieces == material.spans(words, ids, 1, 20, (5, 9))
