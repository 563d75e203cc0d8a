"""KTO and its relatives: z is of the whole batch, golden numbers come out of the algorithm, real runs go on."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from palate.algorithms import _labels, kto
from palate.algorithms._labels import balancing_weights, middle, mismatched
from palate.batches import Labelled, Tokens
from palate.cast import Cast
from palate.data.encode import TokenRow
from palate.data.encode_pairs import LabelRow
from palate.metrics import lookup
from palate.settings import PalateError
from tests.algorithms.resuming import goes_on
from tests.laws import test_microbatch_law as law
from tests.losses.golden import part_of
from tests.stages import tiny_runs as tiny

ROLES = ("policy", "reference")
LENGTHS = (5, 14, 9, 4, 11, 7)


def moved(layout: str = "separate") -> Cast:
    """A policy that has left its reference."""
    cast = law.cast_for(ROLES, layout)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in cast.parameters(("policy",)).values():
            parameter.add_(0.02 * torch.randn(parameter.shape))
    return cast


def thumbs(*up: int, lengths: tuple[int, ...] = LENGTHS) -> Labelled:
    labels = torch.tensor([i in up for i in range(len(lengths))])
    return Labelled(*law.rows(*lengths), labels)


def prepared(cast: Cast, batch: Labelled, **settings: Any) -> tuple[kto.Algorithm, Labelled]:
    algorithm = kto.Algorithm(**settings)
    with torch.no_grad():
        return algorithm, algorithm.prepare(cast, batch)


def total(cast: Cast, batch: Labelled, **settings: Any) -> float:
    algorithm, ready = prepared(cast, batch, **settings)
    return float(algorithm.loss(cast, ready).terms["loss"].total.detach()) / batch.size


def written(tokens: Tokens, row: int) -> tuple[list[int], list[int]]:
    """(prompt, answer) of a row, without its padding."""
    real = tokens.tokens_BT[row][tokens.real_BT[row]].tolist()
    said = int(tokens.action_BT[row].sum())
    return real[: len(real) - said], real[len(real) - said :]


# --- z ---------------------------------------------------------------------------------------------------------------


def test_each_prompt_meets_the_next_rows_answer() -> None:
    batch = thumbs(0)
    found = mismatched(batch, 64)
    order = part_of("kto")["expected"]["pairing_shift_B5"]
    five = batch.select(torch.arange(5))
    for i, j in enumerate(order):
        assert written(mismatched(five, 64), i) == (written(five, i)[0], written(five, j)[1])
    for i in range(6):
        assert written(found, i) == (written(batch, i)[0], written(batch, (i + 1) % 6)[1])
    assert not (found.action_BT & ~found.real_BT).any()


def test_sabotaged_pairings_and_terms_are_told_apart() -> None:
    """Reversed order meets its own answer, the other direction another one; a z of one kind or unclamped is not z."""
    batch = thumbs(0, 2).select(torch.arange(5))
    right = [written(mismatched(batch, 64), i)[1] for i in range(5)]
    reverse = part_of("kto")["must_not"]["pairing_reverse_B5_has_fixed_point"]
    assert reverse[2] == 2
    for order in (reverse, [4, 0, 1, 2, 3], range(5)):
        assert [written(batch, j)[1] for j in order] != right
    gain, good = torch.tensor([2.0, -0.5, -1.25, 2.5, 0.0]), torch.tensor([True, False, True, False, False])
    for wrong in (float(gain.mean()), float(gain[good].mean()), float(gain[~good].mean())):
        assert abs(middle(gain, good) - wrong) > 1e-2


def test_mixed_rows_are_cut_to_the_context_and_padding_does_not_matter() -> None:
    batch = thumbs(0)
    whole, cut = mismatched(batch, 64), mismatched(batch, 8)
    assert cut.tokens_BT.shape[1] == 8
    for name in ("tokens_BT", "real_BT", "action_BT"):
        assert getattr(cut, name).equal(getattr(whole, name)[:, :8])
    shift = 3
    left = replace(
        batch,
        **{
            n: torch.roll(torch.nn.functional.pad(getattr(batch, n), (0, shift)), shift, 1)
            for n in ("tokens_BT", "real_BT", "action_BT")
        },
    )
    for i in range(6):
        assert written(mismatched(left, 64), i) == written(whole, i)


@torch.no_grad()
def kl_by_hand(cast: Cast, batch: Labelled) -> float:
    """z one unpadded row at a time."""
    gaps: list[float] = []
    for i in range(batch.size):
        ids = [*written(batch, i)[0], *written(batch, (i + 1) % batch.size)[1]]
        start = len(written(batch, i)[0])
        row = Tokens(torch.tensor([ids]), torch.ones(1, len(ids)).bool(), torch.arange(len(ids))[None] >= start)
        gaps.append(float((cast.logp("policy", row) - cast.logp("reference", row)).sum()))
    return max(0.0, sum(gaps) / len(gaps))


@pytest.mark.parametrize("layout", ["separate", "adapters"])
def test_z_is_the_mean_over_the_whole_batch(layout: str) -> None:
    cast, batch = moved(layout), thumbs(0, 2, 5)
    other = Cast({"policy": cast.seat("reference"), "reference": cast.seat("policy")})  # its mean is the negative one
    for one in (cast, other):
        for one.budget in (1, 40, 4096):
            assert prepared(one, batch)[1].kl == pytest.approx(kl_by_hand(one, batch), abs=1e-5)
    low, high = sorted(prepared(one, batch)[1].kl for one in (cast, other))
    assert low == 0.0
    assert high > 1e-3


def test_z_gets_no_gradient_and_is_one_number_for_every_micro_batch() -> None:
    _, ready = prepared(moved(), thumbs(0, 2, 5))
    assert isinstance(ready.kl, float)
    assert {part.kl for part in ready.split(2)} == {ready.kl}


# --- the loss --------------------------------------------------------------------------------------------------------


class _Told(Cast):
    """A cast whose policy says what the test says it says."""

    def __init__(self, logp_BT: Tensor) -> None:
        super().__init__({})
        self.said_BT = logp_BT

    def logp(self, role: str, batch: Tokens, *_: object, **__: object) -> Tensor:  # type: ignore[override]
        return self.said_BT


def golden_loss(algorithm: kto.Algorithm, z: float, rows: tuple[int, ...] = (0, 1, 2, 3, 4)) -> tuple[float, Tensor]:
    """(mean loss, its gradient) of the golden case, its answers spread over three tokens beside garbage."""
    case = part_of("kto")
    share = torch.tensor([0.0, 0.5, 0.25, 0.25])
    logp = torch.tensor(case["policy_logp"], requires_grad=True)
    action = (share > 0).expand(5, 4)
    said = torch.where(action, logp[:, None] * share, torch.tensor(-77.0))
    ref = torch.where(action, torch.tensor(case["ref_logp"])[:, None] * share, torch.tensor(55.0))
    good = torch.tensor(case["label_desirable"]).bool()
    batch = Labelled(torch.zeros(5, 4).long(), torch.ones(5, 4).bool(), action, good, ref, z)
    index = torch.tensor(rows)
    batch = batch.select(index)
    found = algorithm.loss(_Told(said[index]), batch).terms["loss"]
    assert found.per == "rows"
    mean = found.total / batch.counts()["rows"]
    return float(mean.detach()), torch.autograd.grad(mean, logp)[0]


def test_golden_numbers_come_out_of_the_algorithm() -> None:
    case = part_of("kto")
    expected, beta = case["expected"], case["beta"]
    mean, slope = golden_loss(kto.Algorithm(beta=beta), expected["z0"])
    assert mean == pytest.approx(expected["loss"], abs=1e-6)
    assert torch.allclose(slope, torch.tensor(expected["grad_policy_logp"]), atol=1e-7)
    assert abs(mean - case["must_not"]["mean_of_desirable_plus_mean_of_undesirable"]) > 0.1
    heavier = kto.Algorithm(beta=beta, undesirable_weight=1.33)
    assert golden_loss(heavier, expected["z0"])[0] == pytest.approx(expected["lambda_U_1p33"]["loss"], abs=1e-6)
    without = kto.Algorithm(beta=beta, loss_type="apo_zero_unpaired")
    assert golden_loss(without, 0.0)[0] == pytest.approx(expected["z0_negative_is_clamped"]["loss"], abs=1e-6)
    alike = expected["all_desirable_batch"]
    assert golden_loss(kto.Algorithm(beta=beta), alike["z0"], (0, 2))[0] == pytest.approx(alike["loss"], abs=1e-6)


def test_bco_is_a_classifier_about_the_middle_of_both_kinds() -> None:
    case, beta = part_of("kto"), 0.1
    gain = [p - r for p, r in zip(case["policy_logp"], case["ref_logp"], strict=True)]
    good = [bool(x) for x in case["label_desirable"]]
    up = [g for g, kind in zip(gain, good, strict=True) if kind]
    down = [g for g, kind in zip(gain, good, strict=True) if not kind]
    point = (sum(up) / len(up) + sum(down) / len(down)) / 2
    assert middle(torch.tensor(gain), torch.tensor(good)) == pytest.approx(point)
    assert middle(torch.tensor(up), torch.ones(len(up)).bool()) == pytest.approx(sum(up) / len(up))
    logits = torch.tensor([beta * (g - point) for g in gain])
    weights = torch.tensor([2.0 if kind else 3.0 for kind in good])
    oracle = torch.nn.functional.binary_cross_entropy_with_logits(logits, torch.tensor(good).float(), weights)
    algorithm = kto.Algorithm(beta=beta, loss_type="bco", desirable_weight=2.0, undesirable_weight=3.0)
    assert golden_loss(algorithm, point)[0] == pytest.approx(float(oracle), abs=1e-6)


@pytest.mark.parametrize(("loss_type", "value"), [("kto", 0.5), ("apo_zero_unpaired", 0.5), ("bco", 0.69314718)])
def test_at_step_0_the_loss_is_known(loss_type: str, value: float) -> None:
    cast = law.cast_for(ROLES)
    assert total(cast, thumbs(0, 2), loss_type=loss_type) == pytest.approx(value, abs=1e-6)
    algorithm, ready = prepared(cast, thumbs(0, 2), loss_type=loss_type)
    seen = algorithm.loss(cast, ready).metrics
    assert {"rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected", "logps/chosen_change", "kl"} == set(
        seen
    )
    assert abs(float(seen["rewards/chosen"].total)) < 1e-4
    assert (seen["rewards/chosen"].count, seen["rewards/rejected"].count) == (2.0, 4.0)


@pytest.mark.parametrize("loss_type", ["kto", "bco", "apo_zero_unpaired"])
@pytest.mark.parametrize("layout", ["separate", "adapters"])
def test_laws_of_micro_batches_and_padding(loss_type: str, layout: str) -> None:
    cast = moved(layout)
    batch = thumbs(0, 2, 5)
    algorithm, ready = prepared(cast, batch, loss_type=loss_type)
    whole = law.gradients(cast, ready, algorithm, 6)
    assert any(g.abs().max() > 0 for g in whole.values())
    for most in (1, 2, 5, *law.BY_TOKENS):
        assert law.distance(whole, law.gradients(cast, ready, algorithm, most)) < 1e-6
    _, spoiled = prepared(cast, law.widened(law.spoiled(batch)), loss_type=loss_type)
    assert spoiled.kl == pytest.approx(ready.kl, abs=1e-5)
    assert spoiled.ref_logp_BT is not None
    garbage = torch.where(spoiled.action_BT, spoiled.ref_logp_BT, torch.tensor(float("nan")))
    found = law.gradients(cast, replace(spoiled, ref_logp_BT=garbage), algorithm, 6)
    assert law.distance(whole, found) < 2e-6


@pytest.mark.parametrize("loss_type", ["bco", "apo_zero_unpaired"])
def test_a_precomputed_reference_is_the_live_one(loss_type: str) -> None:
    cast, batch = moved(), thumbs(0, 2, 5)
    with torch.no_grad():
        known = replace(batch, ref_logp_BT=cast.logp("reference", batch))
    alone = Cast({"policy": cast.seat("policy")})
    assert total(alone, known, loss_type=loss_type) == pytest.approx(total(cast, batch, loss_type=loss_type), abs=1e-6)


# --- what cannot be learnt from ---------------------------------------------------------------------------------------


def test_batches_that_have_no_other_row_are_refused() -> None:
    one = thumbs(0, lengths=(6,))
    for loss_type in ("kto", "bco"):
        with pytest.raises(PalateError, match=r"a batch of one row has no other row.*batch_size of 2"):
            kto.Algorithm(loss_type=loss_type).prepare(moved(), one)
    assert total(moved(), one, loss_type="apo_zero_unpaired") > 0
    known = replace(thumbs(0), ref_logp_BT=torch.zeros(6, 14))
    with pytest.raises(PalateError, match="precompute_reference: the KL term reads prompts with other rows' answers"):
        kto.Algorithm().prepare(moved(), known)


def labelled(up: int, down: int) -> list[LabelRow]:
    row = TokenRow([1, 2, 3], [False, True, True])
    return [LabelRow(row, i < up) for i in range(up + down)]


def test_one_kind_of_label_is_refused_and_unequal_ones_are_told() -> None:
    for up, down, has in ((4, 0, "up"), (0, 3, "down")):
        with pytest.raises(PalateError, match=f"all {up + down} answers have a thumb {has}"):
            kto.Algorithm().survey(labelled(up, down))
    with pytest.warns(UserWarning, match=r"weigh 0\.1 times.*desirable_weight: 12\.5 and undesirable_weight: 1\."):
        kto.Algorithm().survey(labelled(10, 100))
    for up, down in ((5, 5), (6, 4)):
        assert len(kto.Algorithm().survey(labelled(up, down))) == 10
    kto.Algorithm(desirable_weight=13.33).survey(labelled(10, 100))  # the published example


def test_balancing_weights() -> None:
    assert _labels.FAIR == (1.0, 1.5)
    for up in (1, 3, 10, 99, 100, 150, 151, 4000):
        high, low = balancing_weights(up, 100)
        assert 1.0 <= high * up / (low * 100) <= 1.5
        assert min(high, low) == 1.0
    assert balancing_weights(120, 100) == (1.0, 1.0)
    with pytest.raises(ValueError, match="both kinds"):
        balancing_weights(0, 5)


# --- real runs --------------------------------------------------------------------------------------------------------


def write_thumbs(path: Path, rows: int = 16) -> Path:
    said = [
        {"prompt": p, "completion": " even" if n % 2 else " odd", "label": n % 2 == 0}
        for n, p in enumerate(tiny.PROMPTS)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in said[:rows]))
    return path


def stage(model: Path, data: Any, **changes: Any) -> dict[str, Any]:
    algorithm = {"kind": "kto", **changes.pop("algorithm", {})}
    return {**tiny.sft(model, data), "name": "kto", "algorithm": algorithm, **changes}


def test_a_run_learns_and_goes_on_after_a_stop_bit_for_bit(tmp_path: Path) -> None:
    model, data = tiny.save_model(tmp_path / "start"), write_thumbs(tmp_path / "thumbs.jsonl")
    asked = stage(model, {"path": str(data), "held_out": 0.3}, batch_size=2, eval_steps=4)
    rows = goes_on(tmp_path, kto.Algorithm, asked, 3)
    assert rows[0]["loss"] == pytest.approx(0.5, abs=1e-5)
    assert rows[-1]["rewards/chosen"] > rows[-1]["rewards/rejected"]
    assert rows[-1]["eval/loss"] < 0.5
    assert all(lookup(name) for row in rows for name in row if name != "step")


def test_a_run_says_what_is_wrong(tmp_path: Path) -> None:
    model = tiny.save_model(tmp_path / "start")
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text(
        "".join(json.dumps({"prompt": p, "chosen": " odd", "rejected": " even"}) + "\n" for p in tiny.PROMPTS)
    )
    bco = {"loss_type": "bco", "desirable_weight": 2.0}
    done = tiny.run(tmp_path / "a", stage(model, str(pairs), algorithm=bco, precompute_reference=True, max_steps=2))
    assert "weigh 2 times the 16 with a thumb down" in tiny.warnings(done / "1-kto")[0]
    up = tmp_path / "up.jsonl"
    up.write_text("".join(line + "\n" for line in write_thumbs(up).read_text().splitlines() if "true" in line))
    with pytest.raises(PalateError, match="all 8 answers have a thumb up"):
        tiny.run(tmp_path / "b", stage(model, str(up)))
    with pytest.raises(PalateError, match="precompute_reference: the KL term"):
        tiny.run(tmp_path / "c", stage(model, str(pairs), precompute_reference=True))
