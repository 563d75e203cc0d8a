"""ORPO: golden numbers come out of the algorithm, it stays finite in bfloat16, a real run goes on after a stop."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from palate.algorithms import orpo
from palate.batches import Pairs
from palate.metrics import lookup
from palate.settings import PalateError, build
from palate.stages import train
from tests.algorithms import pair_cases as cases
from tests.algorithms.resuming import goes_on
from tests.laws import test_microbatch_law as law
from tests.losses.golden import part_of
from tests.stages import tiny_runs as tiny


def made(**settings: Any) -> orpo.Algorithm:
    found = build("algorithms", {"kind": "orpo", **settings}, "algorithm")
    assert isinstance(found, orpo.Algorithm)
    return found


@pytest.mark.parametrize("rows", [1, 3])
def test_golden(rows: int) -> None:
    """The cross-entropy is a mean over the batch's tokens, not of the rows' means."""
    cast, raw, _ = cases.golden()
    case = part_of("orpo")
    expected = case["expected"]
    found = cases.amount(made(**{"lambda": case["lambda_"]}), cast, raw, rows)
    assert found == pytest.approx(expected["loss_with_token_mean_nll"], abs=1e-9)
    assert abs(found - expected["loss_with_sequence_mean_nll"]) > 1e-3
    doubled = cases.amount(made(beta=2), cast, raw, rows)
    assert doubled == pytest.approx(expected["nll_token_mean"] + 2 * expected["l_or"], abs=1e-9)
    assert cases.amount(made(beta=0), cast, raw, rows) == pytest.approx(expected["nll_token_mean"], abs=1e-9)


def test_what_is_reported() -> None:
    cast, raw, _ = cases.golden()
    expected, algorithm = part_of("orpo")["expected"], made()
    loss = algorithm.loss(cast, cases.ready(algorithm, cast, raw))  # type: ignore[arg-type]
    seen = cases.seen(loss)
    assert seen["log_odds_chosen"] == pytest.approx(np.mean(expected["log_odds_ratio"]))
    assert seen["log_odds_ratio"] == pytest.approx(-expected["l_or"])
    assert seen["rewards/accuracies"] == pytest.approx(expected["log_odds_accuracy"])
    assert seen["rewards/chosen"] == pytest.approx(0.1 * np.mean(expected["avg_chosen"]))
    assert "logps/chosen_change" not in seen
    assert all(lookup(name) for name in (*seen, *loss.terms))


def test_a_soft_label_counts_in_both_directions() -> None:
    cast, raw, _ = cases.golden(probability_B=torch.tensor([1.0, 0.6, 0.5], dtype=torch.float64))
    expected, p = part_of("orpo")["expected"], np.array([1.0, 0.6, 0.5])
    odds = np.array(expected["log_odds_ratio"])
    soft = (p * np.log1p(np.exp(-odds)) + (1 - p) * np.log1p(np.exp(odds))).mean()
    assert cases.amount(made(beta=1), cast, raw, 2) == pytest.approx(expected["nll_token_mean"] + soft, abs=1e-9)


def test_a_model_that_is_sure_of_everything_has_finite_odds_and_gradients() -> None:
    """The released code's log1p(−e^lp) is −inf there."""
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        for sure in (0.0, -1e-12, -1e-4, -800.0):
            cast, raw = cases.random_said(4)
            said = torch.full_like(cast.said["policy"], sure, dtype=dtype).requires_grad_()
            cast.said["policy"] = said
            found = cases.total(made(), cast, raw, 2)
            (slope_RT,) = torch.autograd.grad(found, [said])
            assert torch.isfinite(found).all()
            assert torch.isfinite(slope_RT).all()


def test_a_bfloat16_model_gives_nearly_the_loss_of_the_float32_one() -> None:
    cast, raw = cases.moved(roles=("policy",)), cases.tiny_pairs()
    exact = cases.amount(made(beta=1), cast, raw)
    cast.seat("policy").trunk.to(torch.bfloat16)
    found = cases.total(made(beta=1), cast, raw, 2)
    slopes = torch.autograd.grad(found, list(cast.parameters(("policy",)).values()))
    assert all(torch.isfinite(g).all() for g in slopes)
    assert float(found.detach()) == pytest.approx(exact, rel=2e-2)


def test_any_cut_and_any_padding_gives_the_same_gradient_and_the_end_token_is_learnt() -> None:
    cast, raw, algorithm = cases.moved(roles=("policy",)), cases.tiny_pairs(), made(beta=0)
    whole = law.gradients(cast, raw, made(), raw.size)
    for size in (1, 2, 5):
        assert law.distance(whole, law.gradients(cast, raw, made(), size)) < 1e-6
    assert law.distance(whole, law.gradients(cast, cases.left_padded(raw), made(), 6)) < 1e-5
    last_BT = raw.action_BKT[:, 0] & ~raw.action_BKT[:, 0].roll(-1, -1)
    tokens_BKT = raw.tokens_BKT.clone()
    tokens_BKT[:, 0][last_BT] = 2
    other = replace(raw, tokens_BKT=tokens_BKT)
    assert abs(cases.amount(algorithm, cast, raw) - cases.amount(algorithm, cast, other)) > 1e-4
    rejected = replace(raw, tokens_BKT=torch.where(raw.action_BKT & _second(raw), 9, raw.tokens_BKT))
    assert cases.amount(algorithm, cast, raw) == pytest.approx(cases.amount(algorithm, cast, rejected), abs=1e-6)


def _second(raw: Pairs) -> torch.Tensor:
    return torch.tensor([False, True])[None, :, None].expand_as(raw.action_BKT)


def test_one_weight_has_one_name() -> None:
    with pytest.raises(PalateError, match="the same setting"):
        made(**{"lambda": 1, "beta": 1})


def test_a_run_goes_on_after_a_stop_and_holds_one_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    roles: list[set[str]] = []
    honest = train._seats.offline_cast  # pyright: ignore[reportPrivateUsage]

    def watched(*given: Any, **more: Any) -> Any:
        cast = honest(*given, **more)
        roles.append(set(cast.roles))
        return cast

    monkeypatch.setattr(train._seats, "offline_cast", watched)  # pyright: ignore[reportPrivateUsage]
    model, data = tiny.save_model(tmp_path / "model"), cases.write_pairs(tmp_path / "pairs.jsonl")
    rows = goes_on(tmp_path, orpo.Algorithm, cases.stage(model, data, algorithm={"kind": "orpo"}), 4)
    assert rows[-1]["loss/sft"] < rows[0]["loss/sft"] - 0.1
    assert rows[-1]["log_odds_chosen"] > rows[0]["log_odds_chosen"]
    assert roles == [{"policy"}] * 3
