"""SimPO: golden numbers come out of the algorithm; no reference anywhere; a real run goes on after a stop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from palate.algorithms import simpo
from palate.batches import Pairs
from palate.metrics import lookup
from palate.settings import PalateError, build
from tests.algorithms import pair_cases as cases
from tests.algorithms.resuming import goes_on
from tests.laws import test_microbatch_law as law
from tests.stages import tiny_runs as tiny


def made(**settings: Any) -> simpo.Algorithm:
    found = build("algorithms", {"kind": "simpo", **settings}, "algorithm")
    assert isinstance(found, simpo.Algorithm)
    return found


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({}, "simpo_beta2_gamma1"),
        ({"beta": 2, "gamma": 1}, "simpo_beta2_gamma1"),
        ({"beta": 2, "simpo_gamma": 1}, "simpo_beta2_gamma1"),
        ({"beta": 10, "gamma_beta_ratio": 0.3}, "simpo_beta10_ratio0p3"),
    ],
    ids=["plain", "gamma", "simpo_gamma", "ratio"],
)
@pytest.mark.parametrize("rows", [1, 3])
def test_golden(settings: dict[str, Any], name: str, rows: int) -> None:
    cast, raw, case = cases.golden()
    assert cases.amount(made(**settings), cast, raw, rows) == pytest.approx(case["expected"][name], abs=1e-9)


def test_smoothing_soft_labels_and_the_mix() -> None:
    cast, raw, case = cases.golden(probability_B=torch.tensor([1.0, 0.6, 0.5], dtype=torch.float64))
    h = np.array([[np.mean(side) for side in pair] for pair in _tokens(case)])
    gap, p = 2 * (h[:, 0] - h[:, 1]), np.array([1.0, 0.6, 0.5]) * 0.8 + 0.1
    nls = lambda x: np.log1p(np.exp(-x))  # noqa: E731
    nll = -np.concatenate([pair[0] for pair in _tokens(case)]).mean()
    expected = (p * nls(gap - 1) + (1 - p) * nls(-gap - 1)).mean() + 0.5 * nll
    found = cases.amount(made(label_smoothing=0.1, sft_weight=0.5), cast, raw, 2)
    assert found == pytest.approx(expected, abs=1e-9)


def _tokens(case: dict[str, Any]) -> list[tuple[np.ndarray, np.ndarray]]:
    """The policy's log-probabilities of both answers of each pair, without what the mask hides."""
    sides = [
        [np.array(row)[np.array(mask) == 1] for row, mask in zip(case[said], case[where], strict=True)]
        for said, where in (("policy_chosen_tok", "mask_chosen"), ("policy_rejected_tok", "mask_rejected"))
    ]
    return list(zip(*sides, strict=True))


def test_what_is_reported() -> None:
    cast, raw, case = cases.golden()
    algorithm = made()
    loss = algorithm.loss(cast, cases.ready(algorithm, cast, raw))  # type: ignore[arg-type]
    seen = cases.seen(loss)
    assert seen["rewards/chosen"] == pytest.approx(2 * np.mean([pair[0].mean() for pair in _tokens(case)]))
    assert seen["logps/rejected"] == pytest.approx(np.mean(case["expected"]["policy_rejected_logp"]))
    assert seen["rewards/accuracies"] == pytest.approx(2 / 3)
    assert "logps/chosen_change" not in seen, "there is no reference to have moved away from"
    assert all(lookup(name) for name in (*seen, *loss.terms))


def test_any_cut_and_any_padding_gives_the_same_gradient_and_the_end_token_counts() -> None:
    cast, raw, algorithm = cases.moved(roles=("policy",)), cases.tiny_pairs(), made(sft_weight=0.5)
    whole = law.gradients(cast, raw, algorithm, raw.size)
    for size in (1, 2, 5):
        assert law.distance(whole, law.gradients(cast, raw, algorithm, size)) < 1e-6
    assert law.distance(whole, law.gradients(cast, cases.left_padded(raw), algorithm, 6)) < 1e-5
    without_last = raw.action_BKT & raw.action_BKT.roll(-1, -1)
    shorter = Pairs(**{**vars(raw), "action_BKT": without_last | (raw.action_BKT.sum(-1, keepdim=True) == 1)})
    assert law.distance(whole, law.gradients(cast, shorter, algorithm, 6)) > 1e-2


def test_a_margin_has_one_name() -> None:
    with pytest.raises(PalateError, match="the same margin"):
        made(gamma=1, gamma_beta_ratio=0.5)


def test_a_run_without_a_reference_goes_on_after_a_stop(tmp_path: Path) -> None:
    model, data = tiny.save_model(tmp_path / "model"), cases.write_pairs(tmp_path / "pairs.jsonl")
    stage = cases.stage(model, data, algorithm={"kind": "simpo"})
    rows = goes_on(tmp_path, simpo.Algorithm, stage, 4)
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.05
    with pytest.raises(PalateError, match="no fixed reference"):
        tiny.run(tmp_path, {**stage, "precompute_reference": True}, name="never")
