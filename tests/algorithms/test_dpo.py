"""DPO and its losses: golden numbers come out of the algorithm, whole-batch losses survive any cut, real runs go on."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor

from palate import losses
from palate.algorithms import dpo
from palate.batches import Pairs
from palate.cast import Cast
from palate.check.recipe import check_recipe
from palate.data.encode import TokenRow
from palate.data.encode_pairs import PairRow
from palate.metrics import lookup
from palate.settings import PalateError, build
from palate.stages import train
from tests.algorithms import pair_cases as cases
from tests.algorithms.resuming import goes_on
from tests.laws import test_microbatch_law as law
from tests.losses.golden import part_of
from tests.stages import tiny_runs as tiny

EVERY = "sigmoid sigmoid_norm robust hinge ipo exo_pair nca_pair bco_pair sppo_hard apo_zero apo_down aot aot_unpaired"
EVERY_LOSS = (*EVERY.split(), "discopop", "sft")


def made(**settings: Any) -> dpo.Algorithm:
    found = build("algorithms", {"kind": "dpo", **settings}, "algorithm")
    assert isinstance(found, dpo.Algorithm)
    return found


# --- golden numbers through the algorithm -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({}, "dpo"),
        ({"label_smoothing": 0.1}, "cdpo_eps0p1"),
        ({"loss_type": "robust", "label_smoothing": 0.1}, "robust_eps0p1"),
        ({"loss_type": "hinge"}, "hinge"),
        ({"loss_type": "ipo"}, "ipo_avg"),
        ({"loss_type": "ipo", "logp_reduce": "sum"}, "ipo_sum"),
        ({"logp_reduce": "mean"}, "dpo_length_normalised"),
        ({"loss_type": "sigmoid_norm"}, "dpo_length_normalised"),
        ({"reference_free": True}, "dpo_reference_free"),
        ({"dpop_lambda": 5}, "dpop_lambda5"),
        ({"sft_weight": 1}, "rpo_dpo_plus_1x_nll_tokenmean"),
        ({"loss_type": ["sigmoid", "sft"]}, "rpo_dpo_plus_1x_nll_tokenmean"),
        ({"rpo_alpha": 1}, "rpo_dpo_plus_1x_nll_tokenmean"),
        ({"loss_type": "apo_zero"}, "apo_zero"),
        ({"loss_type": "apo_down"}, "apo_down"),
        ({"loss_type": "nca_pair"}, "nca"),
        ({"loss_type": "exo_pair", "label_smoothing": 0.1}, "exo_eps0p1"),
    ],
    ids=lambda x: "" if isinstance(x, dict) else x,
)
@pytest.mark.parametrize("rows", [3, 2, 1])
def test_golden(settings: dict[str, Any], name: str, rows: int) -> None:
    cast, raw, case = cases.golden()
    found = cases.total(made(**settings), cast, raw, rows)
    assert float(found.detach()) == pytest.approx(case["expected"][name], abs=1e-9)
    assert abs(float(found.detach()) - case["must_not"]["dpo_without_mask"]) > 1e-3


def test_the_gradient_and_what_is_reported_are_golden() -> None:
    cast, raw, case = cases.golden()
    algorithm, expected = made(), case["expected"]
    loss = algorithm.loss(cast, cases.ready(algorithm, cast, raw))  # type: ignore[arg-type]
    (slope_RT,) = torch.autograd.grad(cases.value(loss, raw), [cast.said["policy"]])
    chosen_BT, mask_BT = slope_RT[0::2], raw.action_BKT[:, 0]
    for row, mask, golden in zip(chosen_BT, mask_BT, expected["dpo_grad_wrt_policy_chosen_logp"], strict=True):
        assert row[mask].tolist() == pytest.approx([golden] * int(mask.sum()), abs=1e-9)
        assert row[~mask].eq(0).all()
    seen = cases.seen(loss)
    means = {name: np.mean(expected[name]) for name in expected if isinstance(expected[name], list)}
    assert seen == pytest.approx(
        {
            "rewards/chosen": means["dpo_reward_chosen"],
            "rewards/rejected": means["dpo_reward_rejected"],
            "rewards/accuracies": expected["dpo_accuracy"],
            "rewards/margins": expected["dpo_margin"],
            "logps/chosen": means["policy_chosen_logp"],
            "logps/rejected": means["policy_rejected_logp"],
            "logps/chosen_change": means["policy_chosen_logp"] - means["ref_chosen_logp"],
        }
    )
    assert all(lookup(name) for name in (*seen, *loss.terms))


def test_at_the_reference_exactly_nothing_is_gained_and_no_pair_is_in_order() -> None:
    """Equal rewards are wrong: `accuracy_strict` of the golden step 0."""
    cast, raw, _ = cases.golden()
    cast.said["reference"] = cast.said["policy"].detach()
    expected = part_of("preference_losses_step0")["expected"]
    for settings, name in (({}, "dpo"), ({"label_smoothing": 0.1}, "cdpo"), ({"loss_type": "ipo"}, "ipo")):
        algorithm = made(**settings)
        loss = algorithm.loss(cast, cases.ready(algorithm, cast, raw))  # type: ignore[arg-type]
        assert float(cases.value(loss, raw).detach()) == pytest.approx(expected[name], abs=1e-12)
        seen = cases.seen(loss)
        assert seen["rewards/accuracies"] == expected["accuracy_strict"]
        assert seen["rewards/margins"] == expected["margins"]
        assert seen["logps/chosen_change"] == 0.0


# --- numbers that are not golden, the slow way ------------------------------------------------------------------------


def by_hand(cast: cases.Scripted, raw: Pairs, average: bool = False) -> list[np.ndarray]:
    """Log-probabilities of chosen, rejected, and of both under the reference."""
    found: list[np.ndarray] = []
    for role in ("policy", "reference"):
        said = cast.said[role].detach().numpy().reshape(raw.size, 2, -1)
        for k in range(2):
            rows = [said[b, k][raw.action_BKT[b, k].numpy()] for b in range(raw.size)]
            found.append(np.array([row.mean() if average else row.sum() for row in rows]))
    return found


def sigmoid(x: Any) -> Any:
    return 1 / (1 + np.exp(-np.asarray(x)))


def nls(x: Any) -> Any:
    return -np.log(sigmoid(x))


def margin_by_hand(c: Any, r: Any, qc: Any, qr: Any) -> Any:
    return nls(0.3 * (c - qc - r + qr) - MARGINS)


MARGINS = np.array([0.0, 0.5, 2.0, 1.0, 0.1])
SURE = np.array([1.0, 0.7, 0.5, 0.2, 0.9])
BY_HAND: dict[str, tuple[dict[str, Any], Any]] = {
    "sppo_hard": ({}, lambda c, r, qc, qr: (c - qc - 1 / 0.6) ** 2 + (r - qr + 1 / 0.6) ** 2),
    "discopop": (
        {"discopop_tau": 0.4},
        lambda c, r, qc, qr: (
            (1 - sigmoid(0.3 * (c - qc - r + qr) / 0.4)) * nls(0.3 * (c - qc - r + qr))
            + sigmoid(0.3 * (c - qc - r + qr) / 0.4) * np.exp(-0.3 * (c - qc - r + qr))
        ),
    ),
    "exo_pair": (
        {},
        lambda c, r, qc, qr: (
            sigmoid(0.3 * (c - qc - r + qr)) * np.log(sigmoid(0.3 * (c - qc - r + qr)) / (1 - 1e-3))
            + sigmoid(-0.3 * (c - qc - r + qr)) * np.log(sigmoid(-0.3 * (c - qc - r + qr)) / 1e-3)
        ),
    ),
    "sigmoid": (
        {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.4},
        lambda c, r, qc, qr: nls(0.3 * (1 - np.exp(-0.4 * (c - qc))) / 0.4 - 0.3 * (1 - np.exp(-0.4 * (r - qr))) / 0.4),
    ),
}


@pytest.mark.parametrize("name", list(BY_HAND))
def test_other_losses_are_those_of_their_papers(name: str) -> None:
    cast, raw = cases.random_said(5)
    settings, formula = BY_HAND[name]
    found = cases.total(made(loss_type=name, beta=0.3, **settings), cast, raw, 2)
    assert float(found.detach()) == pytest.approx(formula(*by_hand(cast, raw)).mean(), abs=1e-9)


def test_js_and_forward_divergences_with_smoothing() -> None:
    cast, raw = cases.random_said(5)
    c, r, qc, qr = by_hand(cast, raw)
    slopes = {"js": lambda u: np.log(u / (1 + u)), "forward_kl": lambda u: -1 / u}
    for name, slope in slopes.items():
        gap = 0.3 * (slope(np.exp(c - qc)) - slope(np.exp(r - qr)))
        found = cases.total(made(f_divergence=name, beta=0.3, label_smoothing=0.2), cast, raw, 2)
        assert float(found.detach()) == pytest.approx((0.8 * nls(gap) + 0.2 * nls(-gap)).mean(), abs=1e-9)


def test_a_margin_is_asked_for_only_where_it_is_wanted() -> None:
    cast, raw = cases.random_said(5)
    raw = Pairs(**{**vars(raw), "margin_B": torch.tensor(MARGINS)})
    wanted = cases.amount(made(beta=0.3, use_margin=True), cast, raw, 2)
    assert wanted == pytest.approx(margin_by_hand(*by_hand(cast, raw)).mean(), abs=1e-9)
    assert cases.amount(made(beta=0.3), cast, raw) < wanted - 0.1


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_soft_labels_are_the_target_of_sigmoid(smoothing: float) -> None:
    """−p log σ(βh) − (1−p) log σ(−βh), where p is what remains of the stated probability after ε."""
    cast, raw = cases.random_said(5)
    raw = Pairs(**{**vars(raw), "probability_B": torch.tensor(SURE)})
    c, r, qc, qr = by_hand(cast, raw)
    gap, p = 0.3 * (c - qc - r + qr), SURE * (1 - smoothing) + (1 - SURE) * smoothing
    found = cases.total(made(beta=0.3, label_smoothing=smoothing), cast, raw, 2)
    assert float(found.detach()) == pytest.approx((p * nls(gap) + (1 - p) * nls(-gap)).mean(), abs=1e-9)


@pytest.mark.parametrize("name", sorted(set(EVERY_LOSS) - {"aot", "aot_unpaired", "sft"}))
def test_a_soft_label_is_the_loss_to_be_expected(name: str) -> None:
    cast, raw = cases.random_said(5)
    other = Pairs(**{n: x if x.dim() == 1 else x.flip(1) for n, x in vars(raw).items() if x is not None})
    soft = Pairs(**{**vars(raw), "probability_B": torch.full((5,), 0.7, dtype=torch.float64)})
    straight, turned, mixed = (cases.amount(made(loss_type=name), cast, x) for x in (raw, other, soft))
    assert mixed == pytest.approx(0.7 * straight + 0.3 * turned, abs=1e-9)
    assert abs(straight - turned) > 1e-3


def test_sppo_with_a_soft_label_pulls_to_its_papers_target() -> None:
    """Wu et al.'s (u_w − (p − ½)/β)², up to a constant."""
    cast, raw = cases.random_said(4)
    raw = Pairs(**{**vars(raw), "probability_B": torch.full((4,), 0.8, dtype=torch.float64)})
    (slope_RT,) = torch.autograd.grad(cases.total(made(loss_type="sppo_hard"), cast, raw), [cast.said["policy"]])
    c, _, qc, _ = by_hand(cast, raw)
    assert slope_RT[0::2, 0].tolist() == pytest.approx(list(2 * (c - qc - 0.3 / 0.1) / 4))


def test_several_losses_add_up_by_their_weights() -> None:
    cast, raw, _ = cases.golden()
    together = made(loss_type=["sigmoid", "ipo", "sft"], loss_weights=[2, 0.01, 0.5], sft_weight=0.25)
    one, two, three = (cases.amount(made(loss_type=n), cast, raw) for n in ("sigmoid", "ipo", "sft"))
    assert cases.amount(together, cast, raw, 2) == pytest.approx(2 * one + 0.01 * two + 0.75 * three)
    loss = together.loss(cast, cases.ready(together, cast, raw))  # type: ignore[arg-type]
    assert set(loss.terms) == {"loss", "loss/sft"}
    assert set(made(loss_type="sft").loss(cast, cases.ready(made(loss_type="sft"), cast, raw)).terms) == {"loss"}  # type: ignore[arg-type]


def test_length_desensitised_sums_count_the_longer_rest_by_alpha() -> None:
    cast, raw = cases.random_said(5)
    found: list[np.ndarray] = []
    for role in ("policy", "reference"):
        said = cast.said[role].detach().numpy().reshape(5, 2, -1)
        for k in range(2):
            sums = []
            for b in range(5):
                here, shared = int(raw.action_BKT[b, k].sum()), int(raw.action_BKT[b].sum(-1).min())
                sums.append(said[b, k, :shared].sum() + 0.3 * said[b, k, shared:here].sum())
            found.append(np.array(sums))
    c, r, qc, qr = found
    assert cases.amount(made(ld_alpha=0.3), cast, raw, 2) == pytest.approx(nls(0.1 * (c - qc - r + qr)).mean())
    plain = made(), made(ld_alpha=1)
    assert cases.amount(plain[0], cast, raw) == cases.amount(plain[1], cast, raw)


def test_wpo_weighs_pairs_by_the_policys_own_likelihood_and_has_no_gradient_there() -> None:
    cast, raw = cases.random_said(5)
    c, r, qc, qr = by_hand(cast, raw)
    mean_c, mean_r, *_ = by_hand(cast, raw, average=True)
    weight = np.minimum(1, np.exp(mean_c + mean_r))
    found = cases.total(made(use_wpo_weighting=True), cast, raw, 2)
    assert float(found.detach()) == pytest.approx((weight * nls(0.1 * (c - qc - r + qr))).mean(), abs=1e-9)
    (slope_RT,) = torch.autograd.grad(found, [cast.said["policy"]])
    expected = -0.1 * weight * sigmoid(-0.1 * (c - qc - r + qr)) / 5
    assert slope_RT[0::2, 0].tolist() == pytest.approx(list(expected), abs=1e-9)


# --- losses of the whole batch ----------------------------------------------------------------------------------------


def whole_batch_losses(cast: cases.Scripted, raw: Pairs) -> dict[str, Tensor]:
    """The same through torch.sort and a mean over all rows, gradients included."""
    mask_RT = raw.action_BKT.flatten(0, 1)
    own, ref = (losses.answer_logp(cast.said[role], mask_RT) for role in ("policy", "reference"))
    four = (own[0::2], own[1::2], ref[0::2], ref[1::2])
    shift = 0.1 * (own - ref).mean()
    return {
        "aot": losses.aot(*four, 0.1, 0.05).mean(),
        "aot_unpaired": losses.aot_unpaired(*four, 0.1, 0.05).mean(),
        "bco_pair": losses.bco_pair(*four, 0.1, shift).mean(),
    }


@pytest.mark.parametrize("name", ["aot", "aot_unpaired", "bco_pair"])
@pytest.mark.parametrize("rows", [1, 2, 3, 7])
def test_a_loss_of_the_whole_batch_is_that_of_any_cut_value_and_gradient(name: str, rows: int) -> None:
    cast, raw = cases.random_said(7, seed=3)
    smoothing = {} if name == "bco_pair" else {"label_smoothing": 0.05}
    found = cases.total(made(loss_type=name, **smoothing), cast, raw, rows)
    expected = whole_batch_losses(cast, raw)[name]
    assert float(found.detach()) == pytest.approx(float(expected.detach()), abs=1e-12)
    ours, theirs = (torch.autograd.grad(x, [cast.said["policy"]])[0] for x in (found, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


def test_cut_first_and_sorted_then_it_would_be_another_loss() -> None:
    """Why prepare sees the whole batch: sorting inside micro-batches compares other rows."""
    cast, raw = cases.random_said(6, seed=3)
    for name in ("aot", "aot_unpaired", "bco_pair"):
        algorithm = made(loss_type=name)
        parts = [cases.amount(algorithm, cast, part) for part in raw.split(2)]
        assert abs(np.mean(parts) - cases.amount(algorithm, cast, raw)) > 1e-5


# --- a real model -----------------------------------------------------------------------------------------------------

AT_REFERENCE = {
    "sigmoid": math.log(2), "robust": math.log(2), "hinge": 1.0, "ipo": 25.0, "nca_pair": 2 * math.log(2),
    "bco_pair": 2 * math.log(2), "sppo_hard": 50.0, "apo_zero": 1.0, "apo_down": 1.0, "aot": math.log(2),
    "aot_unpaired": math.log(2), "discopop": 0.5 * math.log(2) + 0.5,
}  # fmt: skip


@pytest.mark.parametrize("layout", ["separate", "shared", "adapters", "hydra"])
def test_at_the_reference_each_loss_has_its_known_value(layout: str) -> None:
    cast, raw = law.cast_for(("policy", "reference"), layout), cases.tiny_pairs()
    if layout == "adapters":
        with torch.no_grad():
            for parameter in cast.parameters(("policy",)).values():
                parameter.zero_()
    for name, known in AT_REFERENCE.items() if layout == "separate" else [("sigmoid", math.log(2))]:
        algorithm = made(loss_type=name)
        batch = cases.ready(algorithm, cast, raw)
        loss = algorithm.loss(cast, batch)
        assert float(cases.value(loss, raw).detach()) == pytest.approx(known, abs=1e-6), name
        seen = cases.seen(loss)
        assert abs(seen["rewards/chosen"]) < 1e-6
        assert abs(seen["logps/chosen_change"]) < 1e-5
    assert seen["logps/chosen"] < -1


def test_every_loss_keeps_the_law_of_micro_batches_and_of_padding() -> None:
    """All of them at once, then the two that no list can hold with them."""
    cast, raw = cases.moved(), cases.tiny_pairs()
    for settings in ({"loss_type": list(EVERY_LOSS)}, {"ld_alpha": 0.3, "use_wpo_weighting": True}, {"dpop_lambda": 5}):
        algorithm = made(**settings)
        batch = cases.ready(algorithm, cast, raw)
        whole = law.gradients(cast, batch, algorithm, batch.size)
        assert all(torch.isfinite(g).all() for g in whole.values())
        for most in (1, 2, 5, *law.BY_TOKENS):
            assert law.distance(whole, law.gradients(cast, batch, algorithm, most)) < 1e-6
        left = cases.ready(algorithm, cast, cases.left_padded(raw))
        assert law.distance(whole, law.gradients(cast, left, algorithm, 6)) < 1e-5
        torch.testing.assert_close(
            cases.value(algorithm.loss(cast, left), left), cases.value(algorithm.loss(cast, batch), batch)
        )
        spoiled = torch.where(batch.action_BKT, batch.ref_logp_BKT, torch.tensor(float("nan")))
        tokens = torch.where(batch.real_BKT, batch.tokens_BKT, torch.tensor(19))
        garbage = type(batch)(**{**vars(batch), "ref_logp_BKT": spoiled, "tokens_BKT": tokens})
        assert law.distance(whole, law.gradients(cast, garbage, algorithm, 6)) < 1e-6


def test_the_reference_is_asked_once_and_has_no_gradient() -> None:
    cast, raw, algorithm = cases.moved(), cases.tiny_pairs(), made()
    batch = cases.ready(algorithm, cast, raw)
    cases.value(algorithm.loss(cast, batch), batch).backward()
    assert all(p.grad is None for p in cast.seat("reference").trunk.parameters())
    assert batch.ref_logp_BKT.requires_grad is False
    silent = Cast({"policy": cast.seat("policy")})
    again = cases.ready(algorithm, silent, Pairs(**_pairs_of(batch)))
    torch.testing.assert_close(again.ref_logp_BKT, batch.ref_logp_BKT)  # known beforehand: nobody is asked
    free = made(reference_free=True)
    assert free.needs == ()
    assert "logps/chosen_change" not in free.loss(silent, cases.ready(free, silent, raw)).metrics


def _pairs_of(batch: Any) -> dict[str, Any]:
    return {name: x for name, x in vars(batch).items() if name not in ("shift", "partner_B")}


# --- the moving reference ---------------------------------------------------------------------------------------------


def weights_of(cast: Cast, role: str) -> Tensor:
    return torch.cat([p.detach().flatten() for p in cast.seat(role).trunk.parameters()])


@pytest.mark.parametrize("layout", ["separate", "hydra"])
def test_the_reference_moves_at_its_steps_by_its_share_and_at_no_other(layout: str) -> None:
    cast = cases.moved(layout)
    algorithm = made(sync_ref=True, ref_model_mixup_alpha=0.25, ref_model_sync_steps=3)
    policy, start = weights_of(cast, "policy"), weights_of(cast, "reference")
    reference = start.clone()
    for step in range(1, 8):
        algorithm.after(cast, step)
        if step % 3 == 0:
            reference = 0.75 * reference + 0.25 * policy
        torch.testing.assert_close(weights_of(cast, "reference"), reference, rtol=1e-5, atol=1e-7)
        assert weights_of(cast, "policy").equal(policy)
    assert not reference.equal(start)
    still = made()
    still.after(cast, 512)
    torch.testing.assert_close(weights_of(cast, "reference"), reference, rtol=1e-5, atol=1e-7)
    assert (algorithm.moves, still.moves) == (("reference",), ())


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"loss_type": "sigmiod"}, "no loss is called 'sigmiod'. Did you mean 'sigmoid'? Known: sigmoid,"),
        ({"loss_type": ["sigmoid", "hing"]}, "Did you mean 'hinge'?"),
        ({"loss_type": "kto_pair"}, "Write kind: kto."),
        ({"loss_type": "simpo"}, "Write kind: simpo."),
        ({"loss_type": ["ipo", "ipo"]}, "name each loss once"),
        ({"loss_type": []}, "one at least"),
        ({"loss_type": ["ipo", "sft"], "loss_weights": [1]}, "1 for 2 losses"),
        ({"loss_type": ["ipo", "sft"], "loss_weights": [1, 0]}, "must be above 0"),
        ({"loss_type": "hinge", "label_smoothing": 0.1}, "hinge does not read it"),
        ({"label_smoothing": 0.5}, "less than 0.5"),
        ({"loss_type": "ipo", "dpop_lambda": 5}, "It belongs to sigmoid"),
        ({"loss_type": "ipo", "use_margin": True}, "It belongs to sigmoid"),
        ({"f_divergence": "js", "dpop_lambda": 5}, "Take one"),
        ({"loss_type": "ipo", "ld_alpha": 0.5}, "Set logp_reduce: sum"),
        ({"reference_free": True, "sync_ref": True}, "there is no reference"),
        ({"reference_free": True, "dpop_lambda": 1}, "there is no reference"),
        ({"ref_model_sync_steps": 8}, "Set sync_ref: true"),
        ({"rpo_alpha": 1, "sft_weight": 1}, "the same setting"),
        ({"btea": 1}, "Did you mean 'beta'?"),
        ({"f_divergence": "jsd"}, "reverse_kl"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(PalateError) as caught:
        made(**settings)
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


def test_names_of_other_libraries_are_understood() -> None:
    found = made(loss_type="aot_pair", sync_ref_model=True, use_weighting=True, rpo_alpha=0.5)
    assert (found.loss_type, found.sync_ref, found.use_wpo_weighting, found.sft_weight) == (
        "aot_unpaired", True, True, 0.5,
    )  # fmt: skip
    assert made(f_divergence_type="js_divergence").f_divergence == "js"


def pair(chosen: list[int], rejected: list[int], probability: float = 1.0) -> PairRow:
    rows = [TokenRow([1, *answer], [False, *[True] * len(answer)]) for answer in (chosen, rejected)]
    return PairRow(rows[0], rows[1], probability)


def test_data_that_teaches_nothing_is_refused() -> None:
    good = pair([5, 2], [6, 2])
    assert made().survey([good]) == [good]
    cases_of = [
        ([good, pair([5], [5]), pair([7], [7])], made(), "the same in 2 of 3 pairs, first in pair 2"),
        ([good, pair([], [5])], made(), "empty in 1 of 2 pairs, first in pair 2"),
        ([good], made(loss_type="aot"), "compares pairs with one another"),
        ([good, pair([5], [6], 0.7)], made(loss_type="aot_unpaired"), "first pair 2, and aot_unpaired cannot read it"),
    ]
    for rows, algorithm, told in cases_of:
        with pytest.raises(PalateError, match=told):
            algorithm.survey(rows)
    assert len(made().survey([good, pair([5], [6], 0.7)])) == 2


# --- whole runs -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cases.write_pairs(tmp_path_factory.mktemp("data") / "pairs.jsonl")


def test_precomputed_is_live_and_the_reference_is_not_in_memory(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    roles: list[set[str]] = []
    honest = train._seats.offline_cast  # pyright: ignore[reportPrivateUsage]

    def watched(*given: Any, **more: Any) -> Cast:
        cast = honest(*given, **more)
        roles.append(set(cast.roles))
        return cast

    monkeypatch.setattr(train._seats, "offline_cast", watched)  # pyright: ignore[reportPrivateUsage]
    split = {"path": str(data), "held_out": 0.25}
    rows = [
        tiny.lines(
            tiny.run(tmp_path, cases.stage(model, split, num_train_epochs=3, **more), name=name)
            / "1-pairs/metrics.jsonl"
        )
        for name, more in (("live", {}), ("disk", {"precompute_reference": True}))
    ]
    assert roles == [{"policy", "reference"}, {"policy"}]
    assert rows[0][0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert rows[0][-1]["loss"] < 0.6
    assert rows[0][-1]["rewards/accuracies"] == 1.0
    assert {"eval/loss", "eval/logps/chosen_change", "eval/rewards/accuracies"} <= set(rows[0][-1])
    for live, disk in zip(*(tiny.timeless(x) for x in rows), strict=True):
        assert live == pytest.approx(disk, rel=1e-6, abs=2e-5)
        assert live["loss"] == pytest.approx(disk["loss"], abs=1e-6)


def test_a_run_with_the_reference_on_disk_goes_on_after_a_stop(model: Path, data: Path, tmp_path: Path) -> None:
    goes_on(tmp_path, dpo.Algorithm, cases.stage(model, data, precompute_reference=True), 4)


def test_a_run_whose_reference_moves_goes_on_after_a_stop(model: Path, data: Path, tmp_path: Path) -> None:
    moving = {"sync_ref": True, "ref_model_sync_steps": 2, "loss_type": ["aot", "bco_pair"]}
    rows = goes_on(tmp_path, dpo.Algorithm, cases.stage(model, data, algorithm=moving), 5)
    changes = [row["logps/chosen_change"] for row in rows]
    assert abs(changes[0]) < 1e-5
    fixed = tiny.run(tmp_path, cases.stage(model, data, algorithm={"loss_type": ["aot", "bco_pair"]}), name="fixed")
    still = [row["logps/chosen_change"] for row in tiny.lines(fixed / "1-pairs/metrics.jsonl")]
    assert changes[:2] == still[:2]  # the first two steps know nothing of the move behind the second
    assert changes[2] != still[2]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"algorithm": {"sync_ref": True}, "precompute_reference": True}, "no fixed reference"),
        ({"algorithm": {"sync_ref": True}, "layout": {"kind": "adapters"}}, "no weights of its own to move"),
        ({"algorithm": {"reference_free": True}, "precompute_reference": True}, "no fixed reference"),
    ],
)
def test_a_reference_that_cannot_move_is_refused(
    changes: dict[str, Any], told: str, model: Path, data: Path, tmp_path: Path
) -> None:
    with pytest.raises(PalateError, match=told):
        tiny.run(tmp_path, cases.stage(model, data, **changes))


def test_equal_answers_in_a_file_end_the_run_with_one_line(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "same.jsonl"
    path.write_text('{"prompt": "a", "chosen": " b", "rejected": " b"}\n' * 4)
    with pytest.raises(PalateError, match="the same") as caught:
        tiny.run(tmp_path, cases.stage(model, path))
    assert "\n" not in str(caught.value)


def test_palate_check_sets_it_up(model: Path, data: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    given = {"name": "small", "output_dir": str(tmp_path / "runs"), "stages": [cases.stage(model, data)]}
    recipe.write_text(yaml.safe_dump(given))
    (stage,) = check_recipe(recipe, [], True, lambda text: None).stages
    assert stage.seen.faults == ()
    assert stage.seen.memory is not None
    assert stage.seen.time is not None
    assert "chosen" in stage.seen.examples[0].title
