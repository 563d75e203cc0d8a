"""CPO: golden numbers come out of the algorithm, its other losses by hand, a real run goes on after a stop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from palate.algorithms import cpo
from palate.metrics import lookup
from palate.settings import PalateError, build
from tests.algorithms import pair_cases as cases
from tests.algorithms.resuming import goes_on
from tests.laws import test_microbatch_law as law
from tests.stages import tiny_runs as tiny


def made(**settings: Any) -> cpo.Algorithm:
    found = build("algorithms", {"kind": "cpo", **settings}, "algorithm")
    assert isinstance(found, cpo.Algorithm)
    return found


def nls(x: Any) -> Any:
    return np.log1p(np.exp(-x))


@pytest.mark.parametrize("rows", [1, 3])
def test_golden(rows: int) -> None:
    """A uniform reference is none; the cross-entropy is the one that RPO adds to DPO."""
    cast, raw, case = cases.golden()
    expected = case["expected"]
    nll = expected["rpo_dpo_plus_1x_nll_tokenmean"] - expected["dpo"]
    free = expected["dpo_reference_free"]
    assert cases.amount(made(cpo_alpha=0), cast, raw, rows) == pytest.approx(free, abs=1e-9)
    assert cases.amount(made(), cast, raw, rows) == pytest.approx(free + nll, abs=1e-9)
    assert cases.amount(made(cpo_alpha=0.25), cast, raw, rows) == pytest.approx(free + 0.25 * nll, abs=1e-9)
    margin = made(loss_type="simpo", beta=2, simpo_gamma=1, cpo_alpha=0)
    assert cases.amount(margin, cast, raw, rows) == pytest.approx(expected["simpo_beta2_gamma1"], abs=1e-9)


def test_its_other_losses_by_hand() -> None:
    cast, raw, case = cases.golden(probability_B=torch.tensor([1.0, 0.6, 0.5], dtype=torch.float64))
    expected = case["expected"]
    d = np.subtract(expected["policy_chosen_logp"], expected["policy_rejected_logp"])
    lengths = raw.action_BKT.sum(-1).numpy()
    mean = np.array(expected["policy_chosen_logp"]) / lengths[:, 0]
    mean = mean - np.array(expected["policy_rejected_logp"]) / lengths[:, 1]
    p = np.array([1.0, 0.6, 0.5]) * 0.8 + 0.1
    by_hand = {
        "sigmoid": p * nls(0.1 * d) + (1 - p) * nls(-0.1 * d),
        "hinge": p * np.maximum(0, 1 - 0.1 * d) + (1 - p) * np.maximum(0, 1 + 0.1 * d),
        "ipo": p * (mean - 5) ** 2 + (1 - p) * (mean + 5) ** 2,
        "simpo": p * nls(0.1 * mean - 0.5) + (1 - p) * nls(-0.1 * mean - 0.5),
    }
    for name, loss_B in by_hand.items():
        algorithm = made(loss_type=name, label_smoothing=0.1, cpo_alpha=0)
        assert cases.amount(algorithm, cast, raw, 2) == pytest.approx(loss_B.mean(), abs=1e-9), name


def test_any_cut_and_any_padding_gives_the_same_gradient() -> None:
    cast, raw, algorithm = cases.moved(roles=("policy",)), cases.tiny_pairs(), made()
    whole = law.gradients(cast, raw, algorithm, raw.size)
    for size in (1, 2, 5):
        assert law.distance(whole, law.gradients(cast, raw, algorithm, size)) < 1e-6
    assert law.distance(whole, law.gradients(cast, cases.left_padded(raw), algorithm, 6)) < 1e-5
    loss = algorithm.loss(cast, raw)
    seen = cases.seen(loss)
    assert seen["rewards/margins"] == pytest.approx(0.1 * (seen["logps/chosen"] - seen["logps/rejected"]), abs=1e-5)
    assert all(lookup(name) for name in (*seen, *loss.terms))


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"simpo_gamma": 1}, "only loss_type simpo reads it"),
        ({"loss_type": "sigmod"}, "'sigmoid', 'hinge', 'ipo' or 'simpo'"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(PalateError, match=told):
        made(**settings)


def test_a_run_without_a_reference_goes_on_after_a_stop(tmp_path: Path) -> None:
    model, data = tiny.save_model(tmp_path / "model"), cases.write_pairs(tmp_path / "pairs.jsonl")
    rows = goes_on(tmp_path, cpo.Algorithm, cases.stage(model, data, algorithm={"kind": "cpo"}), 4)
    assert rows[-1]["loss/sft"] < rows[0]["loss/sft"] - 0.1
    assert "loss" in rows[0]
