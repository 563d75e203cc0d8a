"""Reward models beyond hard pairs: soft labels, smoothing, ratings, thumbs and steps."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from palate.algorithms import reward
from palate.batches import Comparisons, Labelled, Tokens, Trajectories
from palate.cast import Cast
from palate.data.collate import comparisons
from palate.data.encode import RankedRow, TokenRow
from palate.data.encode_pairs import LabelRow, RatedRow
from palate.data.formats.known import read_rows
from palate.data.formats.row import Row
from palate.metrics import lookup
from palate.records import Ranking
from palate.settings import PalateError
from tests.algorithms.resuming import goes_on
from tests.laws import test_microbatch_law as law
from tests.losses.golden import part_of
from tests.stages import tiny_runs as tiny


class _Told(Cast):
    """A cast whose reward model gives the scores that the test says."""

    def __init__(self, score_R: Tensor) -> None:
        super().__init__({})
        self.score_R = score_R

    def scores(self, role: str, batch: Tokens) -> Tensor:
        return self.score_R


def pairs(
    probability: Sequence[float] | None = None, margin: Sequence[float] = (0, 0, 0, 0)
) -> tuple[_Told, Comparisons]:
    """The golden pairs; every second one has its better answer in the second place."""
    case = part_of("rm_pairwise")
    both = torch.tensor([case["chosen"], case["rejected"]]).T
    ranks = torch.tensor([[0, 1], [1, 0], [0, 1], [1, 0]])
    grid = torch.where(ranks == 0, both[:, :1], both[:, 1:])
    cells = torch.zeros(4, 2, 3)
    sure = None if probability is None else torch.tensor(probability)
    batch = Comparisons(
        cells.long(), ~cells.bool(), torch.ones(4, 2).bool(), ranks, torch.tensor(margin).float(), ~cells.bool(), sure
    )
    return _Told(grid.flatten()), batch


def mean(cast: Cast, batch: Any, **settings: Any) -> float:
    return float(reward.Algorithm(**settings).loss(cast, batch).terms["loss"].total) / batch.size


def test_golden_soft_labels_and_smoothing() -> None:
    case = part_of("rm_pairwise")
    expected = case["expected"]
    assert mean(*pairs()) == pytest.approx(expected["logsig"], abs=1e-6)
    assert mean(*pairs([1.0] * 4)) == pytest.approx(expected["logsig"], abs=1e-6)
    assert mean(*pairs(case["soft_target"])) == pytest.approx(expected["soft_label"], abs=1e-6)
    assert mean(*pairs(), label_smoothing=0.1) == pytest.approx(expected["smoothed"], abs=1e-6)
    assert mean(*pairs(margin=case["margin"]), margin=True) == pytest.approx(expected["margin"], abs=1e-6)
    assert abs(expected["soft_label"] - expected["logsig"]) > 1e-2
    unsure = mean(*pairs([0.5] * 4))
    assert mean(*pairs([0.5] * 4), label_smoothing=0.3) == pytest.approx(unsure, abs=1e-6)


def test_golden_margins_and_beliefs_together() -> None:
    """−p log σ(d − m) − (1 − p) log σ(m − d), by hand."""
    case = part_of("rm_pairwise")
    cast, batch = pairs(case["soft_target"], case["margin"])
    gap = [c - r - m for c, r, m in zip(case["chosen"], case["rejected"], case["margin"], strict=True)]
    nls = [torch.nn.functional.softplus(torch.tensor([-g, g], dtype=torch.float64)) for g in gap]
    hand = sum(float(p * x[0] + (1 - p) * x[1]) for p, x in zip(case["soft_target"], nls, strict=True)) / 4
    assert mean(cast, batch, margin=True) == pytest.approx(hand, abs=1e-6)


def test_smoothing_of_a_ranking_is_the_mean_over_its_pairs() -> None:
    scores = torch.tensor([0.9, -0.4, 0.1])
    batch = Comparisons(
        torch.zeros(1, 3, 2).long(), torch.ones(1, 3, 2).bool(), torch.ones(1, 3).bool(),
        torch.tensor([[0, 2, 1]]), torch.zeros(1), torch.ones(1, 3, 2).bool(),
    )  # fmt: skip
    gaps = torch.tensor([0.9 - 0.1, 0.9 + 0.4, 0.1 + 0.4])
    nls = torch.nn.functional.softplus
    hand = float((0.8 * nls(-gaps) + 0.2 * nls(gaps)).mean())
    assert mean(_Told(scores), batch, label_smoothing=0.2) == pytest.approx(hand, abs=1e-6)


def test_ratings_and_thumbs() -> None:
    rows = law.rows(5, 9, 7)
    rated = Trajectories(*rows, torch.zeros(3, 14))
    rated.reward_BT[0, 4], rated.reward_BT[1, 8], rated.reward_BT[2, 6] = 2.0, -1.0, 0.5
    scores = torch.tensor([1.5, 0.0, -0.25])
    assert mean(_Told(scores), rated, loss_type="regression") == pytest.approx((0.25 + 1 + 0.5625) / 3)
    thumbs = Labelled(*rows, torch.tensor([True, False, True]))
    oracle = torch.nn.functional.binary_cross_entropy_with_logits
    assert mean(_Told(scores), thumbs, loss_type="binary") == pytest.approx(
        float(oracle(scores, torch.tensor([1.0, 0.0, 1.0]))), abs=1e-6
    )
    assert mean(_Told(scores), thumbs, loss_type="binary", label_smoothing=0.1) == pytest.approx(
        float(oracle(scores, torch.tensor([0.9, 0.1, 0.9]))), abs=1e-6
    )
    seen = reward.Algorithm(loss_type="binary").loss(_Told(scores), thumbs).metrics["label_accuracy"]
    assert (float(seen.total), seen.count) == (1.0, 3.0)  # a score of 0 says nothing, so it is wrong


CASES = {
    "soft": ({"label_smoothing": 0.1, "margin": True}, "pairs"),
    "regression": ({"loss_type": "regression", "language_loss_coefficient": 0.1}, "rated"),
    "binary": ({"loss_type": "binary", "label_smoothing": 0.1}, "thumbs"),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("layout", ["separate", "adapters"])
def test_laws_of_micro_batches_and_padding(name: str, layout: str) -> None:
    settings, kind = CASES[name]
    cast, algorithm = law.cast_for(("reward",), layout), reward.Algorithm(**settings)
    tokens, real, action = law.rows(5, 14, 9, 4, 11, 7)
    batch: Any = Labelled(tokens, real, action, torch.tensor([True, False] * 3))
    if kind == "rated":
        batch = Trajectories(tokens, real, action, torch.where(action & (tokens % 5 == 0), 0.3, 0.0))
    if kind == "pairs":
        three = [x.unflatten(0, (3, 2)) for x in (tokens, real, action)]
        ranks, margin = torch.tensor([[0, 1], [1, 0], [0, 1]]), torch.tensor([0.1, 0.0, 0.5])
        sure = torch.tensor([0.6, 1.0, 0.3])
        batch = Comparisons(three[0], three[1], torch.ones(3, 2).bool(), ranks, margin, three[2], sure)
    whole = law.gradients(cast, batch, algorithm, 6)
    assert any(g.abs().max() > 0 for g in whole.values())
    for most in (1, 2, 5, *law.BY_TOKENS):
        assert law.distance(whole, law.gradients(cast, batch, algorithm, most)) < 1e-6
    other = law.gradients(cast, law.widened(law.spoiled(batch)), algorithm, 6)
    assert law.distance(whole, other) < 1e-6


# --- what cannot be learnt from ---------------------------------------------------------------------------------------

ROW = TokenRow([1, 2], [False, True])


@pytest.mark.parametrize(
    ("settings", "rows", "fault"),
    [
        ({"loss_type": "regression"}, [RatedRow(ROW, 2.0)] * 3, "all 3 ratings are 2"),
        ({"loss_type": "binary"}, [LabelRow(ROW, False)] * 2, "all 2 thumbs are down"),
        ({}, [RankedRow("p", [ROW] * 3, [0, 1, 2], None, 0.7)], "which of \\*two\\* answers"),
        ({"loss_type": "best_of"}, [RankedRow("p", [ROW] * 2, [0, 1], None, 0.7)], "loss_type ranking"),
    ],
)
def test_data_that_teach_nothing_are_refused(settings: dict[str, Any], rows: list[Any], fault: str) -> None:
    with pytest.raises(PalateError, match=fault):
        reward.Algorithm(**settings).survey(rows)


def test_settings_that_do_not_go_together() -> None:
    for settings in ({"loss_type": "binary", "margin": True}, {"loss_type": "best_of", "label_smoothing": 0.1}):
        with pytest.raises(ValueError, match=r"margin and center|label_smoothing"):
            reward.Algorithm(**settings)


def test_a_stated_probability_is_read_and_travels() -> None:
    row = {"prompt": "p", "chosen": "a", "rejected": "b", "probability": 0.7}
    ((_, record),) = read_rows([Row(row, "f:1")])
    assert isinstance(record, Ranking)
    assert (record.probability, dict(record.columns)) == (0.7, {})
    with pytest.raises(PalateError, match=r"f:1: probability: expected a number from 0 to 1, got 70"):
        list(read_rows([Row({**row, "probability": 70}, "f:1")]))
    told = RankedRow("p", [ROW, ROW], [0, 1], None, 0.7)
    found = comparisons([told, replace(told, probability=None)], 0).probability_B
    assert found is not None
    assert found.tolist() == pytest.approx([0.7, 1.0])
    assert comparisons([replace(told, probability=None)], 0).probability_B is None


# --- real runs --------------------------------------------------------------------------------------------------------


def write(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def stage(model: Path, data: Any, **algorithm: Any) -> dict[str, Any]:
    return {**tiny.sft(model, str(data)), "name": "reward", "algorithm": {"kind": "reward", **algorithm}}


RUNS: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = {
    "soft": (
        {"label_smoothing": 0.05},
        [{"prompt": p, "chosen": " odd", "rejected": " even", "probability": 0.9} for p in tiny.PROMPTS],
    ),
    "ratings": (
        {"loss_type": "regression"},
        [
            {"prompt": p, "completion": (" bad", " good")[n % 2], "rating": 3.0 * (n % 2)}
            for n, p in enumerate(tiny.PROMPTS)
        ],
    ),
    "steps": (
        {"loss_type": "binary"},
        [
            {"prompt": p, "completions": ["one", "two"], "labels": [True, n % 2 == 0]}
            for n, p in enumerate(tiny.PROMPTS)
        ],
    ),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_learns_and_goes_on_after_a_stop_bit_for_bit(name: str, tmp_path: Path) -> None:
    algorithm, rows = RUNS[name]
    model, data = tiny.save_model(tmp_path / "start"), write(tmp_path / "rows.jsonl", rows)
    found = goes_on(tmp_path, reward.Algorithm, {**stage(model, data, **algorithm), "num_train_epochs": 3}, 3)
    assert found[-1]["loss"] < found[0]["loss"]
    assert all(lookup(metric) for row in found for metric in row if metric != "step")
