"""PPO's options beside the published runs: each against an oracle of its own, and real runs of all of them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from palate import credit
from palate.algorithms import _graded, ppo
from palate.batches import Experience, Rollouts, Scored, without_shown
from palate.cast import Cast
from palate.settings import PalateError
from tests.laws import test_microbatch_law as micro
from tests.stages import tiny_runs as tiny
from tests.stages.test_pretraining import stopped_equals_whole

KL = json.loads((Path(__file__).parents[1] / "golden" / "losses.json").read_text())["kl_estimators"]


def scored(scores: list[float] | None = None, **memory: float) -> Scored:
    tokens, real, action = micro.rows(5, 14, 9, 4, 11, 7)
    noise = torch.randn(tokens.shape, generator=torch.Generator().manual_seed(6))
    rollouts = Rollouts(tokens, real, action, -2 + 0.1 * noise, torch.ones(6).bool(), torch.arange(6), 0, 0.8)
    score_B = torch.tensor(scores or [1.0, -0.5, 2.0, 0.25, -1.0, 0.75])
    return Scored(rollouts, score_B, torch.zeros(tokens.shape), {}, {"kl_coef": 0.1, **memory})


def prepared(cast: Cast, given: Scored, **settings: Any) -> tuple[ppo.Algorithm, Experience]:
    algorithm = ppo.Algorithm(**{"old_logprobs": "sampled", **settings})
    with torch.no_grad():
        return algorithm, algorithm.prepare(cast, given)


def everyone(layout: str = "separate") -> Cast:
    return micro.cast_for(("policy", "reference", "value"), layout)


# ── Micro-batches, masks, padding ──────────────────────────────────────────────────────────────────────────────────

OPTIONS: dict[str, dict[str, Any]] = {
    "everything": {
        "kl_in": "loss",
        "kl_estimator": "k3_ratio",
        "entropy_coef": 0.05,
        "dual_clip": 1.5,
        "lam_value": 1.0,
        "scale_scores": "running",
        "center_scores": True,
    },
    "warming": {"critic_warmup": 1},
    "k2": {"kl_in": "loss", "kl_estimator": "k2"},
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("layout", ["separate", "shared"])
def test_the_micro_batch_and_padding_laws_hold(name: str, layout: str) -> None:
    cast = everyone(layout)
    algorithm, experience = prepared(cast, scored(), cliprange=0.05, score_position="after", **OPTIONS[name])
    batch = without_shown(experience)
    whole = micro.gradients(cast, batch, algorithm, batch.size)
    assert any(g.abs().max() > 0 for g in whole.values())
    for most in (1, 4, *micro.BY_TOKENS):
        assert micro.distance(whole, micro.gradients(cast, batch, algorithm, most)) < 1e-6
    spoiled = micro.spoiled(batch)
    if batch.ref_logp_BT is not None:
        nan = torch.tensor(math.nan)
        spoiled = replace(spoiled, ref_logp_BT=torch.where(batch.action_BT, batch.ref_logp_BT, nan))
    changed = micro.gradients(cast, micro.widened(spoiled), algorithm, batch.size)
    assert micro.distance(whole, changed) < 1e-6


# ── Entropy, dual clip, KL as a loss ───────────────────────────────────────────────────────────────────────────────


def terms_of(cast: Cast, algorithm: ppo.Algorithm, batch: Experience) -> dict[str, Tensor]:
    return {name: term.total * term.weight for name, term in algorithm.loss(cast, batch).terms.items()}


def test_the_entropy_bonus_is_the_mean_entropy_of_the_next_token() -> None:
    cast = everyone()
    algorithm, batch = prepared(cast, scored(), entropy_coef=0.3)
    logits_BTV = cast.seat("policy").trunk.hidden(batch.tokens_BT, batch.real_BT)
    logits_BTV = cast.seat("policy").trunk.logits(logits_BTV)[..., : cast.seat("policy").trunk.vocabulary]
    entropies = []
    for row, place in batch.action_BT.nonzero().tolist():
        p = np.exp(logits_BTV[row, place - 1].detach().double().numpy() / 0.8)
        p /= p.sum()
        entropies.append(-(p * np.log(p)).sum())
    found = terms_of(cast, algorithm, batch)["loss/entropy_avg"]
    assert float(found.detach()) == pytest.approx(-0.3 * sum(entropies), rel=1e-5)
    gradient = torch.autograd.grad(found, list(cast.parameters(("policy",)).values()), allow_unused=True)
    assert any(g is not None and g.abs().max() > 0 for g in gradient), "it is trained, not only watched"
    assert "loss/entropy_avg" not in terms_of(cast, ppo.Algorithm(), batch)


def test_the_dual_clip_bounds_what_a_bad_token_costs() -> None:
    cast = everyone()
    _, batch = prepared(cast, scored())
    far = replace(batch, logp_BT=batch.logp_BT - 8.0)  # every ratio is about e^8
    bounded = ppo.Algorithm(dual_clip=3.0, cliprange=0.2)
    advantage = batch.advantage_BT[batch.action_BT]
    with torch.no_grad():
        logp_BT = cast.logp("policy", batch, batch.temperature)
        ratio = (logp_BT - far.logp_BT)[batch.action_BT].exp()
        oracle = torch.where(
            advantage < 0,
            torch.minimum(-ratio * advantage, -3.0 * advantage),
            -torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage),
        )
        found = bounded.loss(cast, far).terms["loss/policy_avg"].total
        free = ppo.Algorithm(cliprange=0.2).loss(cast, far).terms["loss/policy_avg"].total
    assert float(found) == pytest.approx(float(oracle.sum()), rel=1e-5)
    assert float(free) > 10 * float(found.abs())


def test_kl_as_a_loss_and_what_is_left_of_it_in_the_reward() -> None:
    cast = everyone()
    with torch.no_grad():
        for parameter in cast.seat("reference").trunk.parameters():
            parameter.mul_(1.1)
    for estimator, formula in (("k1", credit.kl_k1), ("k2", credit.kl_k2), ("k3", credit.kl_k3)):
        algorithm, batch = prepared(cast, scored(), kl_in="loss", kl_estimator=estimator, kl_coef=0.1)
        with torch.no_grad():
            logp_BT = cast.logp("policy", batch, 0.8)
            ref_BT = cast.logp("reference", batch, 0.8)
        oracle = 0.1 * formula(logp_BT, ref_BT)[batch.action_BT].sum()
        assert float(terms_of(cast, algorithm, batch)["loss/kl_avg"].detach()) == pytest.approx(float(oracle), rel=1e-4)
        assert batch.metrics["objective/non_score_reward"] == 0.0
        assert float(batch.shown_BT["kl_penalty"].abs().max()) == 0.0
    _, inside = prepared(cast, scored(), whiten_advantages=False)
    assert inside.metrics["objective/non_score_reward"] == pytest.approx(
        -0.1 * inside.metrics["objective/kl"], rel=1e-5
    )
    assert inside.ref_logp_BT is None


@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_other_estimators_in_the_reward_are_what_each_token_pays(estimator: str) -> None:
    cast = everyone()
    _, batch = prepared(cast, scored(), kl_estimator=estimator)
    paid = -0.1 * getattr(credit, f"kl_{estimator}")(batch.logp_BT, batch.shown_BT["reference_logp"])
    close = batch.action_BT
    torch.testing.assert_close(batch.shown_BT["kl_penalty"][close], paid[close])
    assert float(batch.shown_BT["kl_penalty"][~close].abs().max()) == 0.0


def policy_gradient(pay: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Exact gradient, at the logits, of the expected *given* number each token pays: Σ_x ∇p(x) · pay(x)."""
    logits = torch.tensor(KL["policy_logits"], dtype=torch.float64, requires_grad=True)
    ref = torch.tensor(KL["ref_logits"], dtype=torch.float64).log_softmax(-1)
    logp = logits.log_softmax(-1)
    (logp.exp() * pay(logp.detach(), ref)).sum().backward()
    assert logits.grad is not None
    return logits.grad


def gradient_of(what: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    logits = torch.tensor(KL["policy_logits"], dtype=torch.float64, requires_grad=True)
    what(logits.log_softmax(-1), torch.tensor(KL["ref_logits"], dtype=torch.float64).log_softmax(-1)).backward()
    assert logits.grad is not None
    return logits.grad


def kl(p: Tensor, q: Tensor) -> Tensor:
    return (p.exp() * (p - q)).sum()


def test_what_each_estimator_in_the_reward_is_the_gradient_of() -> None:
    """As `credit.shape_reward` says: k1 of KL(p‖q), k2 of E[k2] − KL(p‖q), k3 of KL(p‖q) − KL(q‖p)."""
    exact = torch.tensor(KL["expected"]["grad_exact_kl"], dtype=torch.float64)
    torch.testing.assert_close(policy_gradient(credit.kl_k1), exact, rtol=0, atol=1e-12)
    k2 = gradient_of(lambda p, q: (p.exp() * credit.kl_k2(p, q)).sum() - kl(p, q))
    torch.testing.assert_close(policy_gradient(credit.kl_k2), k2, rtol=0, atol=1e-12)
    k3 = gradient_of(lambda p, q: kl(p, q) - kl(q, p))
    torch.testing.assert_close(policy_gradient(credit.kl_k3), k3, rtol=0, atol=1e-12)
    assert not torch.allclose(policy_gradient(credit.kl_k3), exact, atol=1e-2)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_what_each_estimator_as_a_loss_is_the_gradient_of(estimator: str) -> None:
    """Samples held fixed, weighted by how often they come: the golden gradients."""
    logits = torch.tensor(KL["policy_logits"], dtype=torch.float64, requires_grad=True)
    ref = torch.tensor(KL["ref_logits"], dtype=torch.float64).log_softmax(-1)
    logp = logits.log_softmax(-1)
    often = logp.exp().detach()
    (often * _graded.kl_loss(estimator, logp, logp.detach(), ref)).sum().backward()  # pyright: ignore
    expected = torch.tensor(KL["expected"][f"grad_{estimator}_as_loss"], dtype=torch.float64)
    torch.testing.assert_close(logits.grad, expected, rtol=0, atol=1e-12)


def test_who_chooses_a_biased_estimate_is_told() -> None:
    assert ppo.Algorithm().warnings() == []
    assert "gradient 0" in ppo.Algorithm(kl_in="loss").warnings()[0]
    assert "biased" in ppo.Algorithm(kl_in="loss", kl_estimator="k3").warnings()[0]
    assert "later ones" in ppo.Algorithm(kl_in="loss", kl_estimator="k2").warnings()[0]
    assert "KL(π_ref‖π)" in ppo.Algorithm(kl_estimator="k3").warnings()[0]
    assert ppo.Algorithm(kl_estimator="k3", kl_coef=0.0).warnings() == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kl_estimator": "k3_ratio"}, "is a loss"),
        ({"kl_in": "loss", "target_kl": 6.0}, "target_kl steers"),
        ({"center_scores": True}, "Set scale_scores"),
        ({"ref_model_sync_steps": 0}, "1 or more"),
        ({"dual_clip": 1.0}, "greater than 1"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ppo.Algorithm(**settings)


# ── Scores, λ, dense rewards ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("by", ["running", "ref"])
@pytest.mark.parametrize("center", [False, True])
def test_scores_are_divided_by_the_deviation_met_so_far(by: str, center: bool) -> None:
    cast, memory, met = everyone(), {}, []
    for turn in range(3):
        scores = [float(x) for x in np.random.default_rng(turn).normal(3.0, 2.0 + turn, 6)]
        met += scores if by == "running" or not met else []
        given = scored(scores, **memory)
        _, batch = prepared(cast, given, kl_coef=0.0, scale_scores=by, center_scores=center)
        memory = {k: v for k, v in batch.memory.items() if k != "kl_coef"}
        std, mean = np.std(met, ddof=1), np.mean(met) if center else 0.0
        assert batch.metrics["objective/score_scale"] == pytest.approx(std, rel=1e-6)
        assert batch.metrics["objective/scores"] == pytest.approx(np.mean(scores), rel=1e-5), "logged as they came"
        landed = batch.shown_BT["score"].sum(-1).numpy()
        np.testing.assert_allclose(landed, (np.array(scores) - mean) / std, rtol=1e-5)
        assert json.loads(json.dumps(memory)) == memory, "a checkpoint can hold it"


def test_equal_scores_are_not_divided_by_nothing() -> None:
    _, batch = prepared(everyone(), scored([2.0] * 6), scale_scores="running")
    assert batch.metrics["objective/score_scale"] == 1.0
    assert bool(batch.advantage_BT.isfinite().all())


def test_running_moments_are_those_of_all_numbers_at_once() -> None:
    numbers = torch.randn(50, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 3 + 1e3
    found = credit.RunningMoments()
    for part in numbers.split([1, 7, 30, 12]):
        found.update(part)
    assert found.mean == pytest.approx(float(numbers.mean()), rel=1e-12)
    assert found.std == pytest.approx(float(numbers.std()), rel=1e-9)
    assert credit.RunningMoments().std == 1.0


def test_values_learn_returns_of_their_own_lambda() -> None:
    cast = everyone()
    _, plain = prepared(cast, scored(), gamma=0.9, lam=0.5, whiten_advantages=False)
    _, apart = prepared(cast, scored(), gamma=0.9, lam=0.5, lam_value=1.0, whiten_advantages=False)
    assert torch.equal(plain.advantage_BT, apart.advantage_BT)
    reward_BT = apart.shown_BT["reward"]
    for row in range(6):  # λ = 1: what the tokens still earn, discounted, whatever the values say
        here = apart.action_BT[row].nonzero()[:, 0].tolist()
        for i, t in enumerate(here):
            to_go = sum(0.9**k * float(reward_BT[row, s]) for k, s in enumerate(here[i:]))
            assert float(apart.returns_BT[row, t]) == pytest.approx(to_go, abs=1e-5)
    assert not torch.allclose(plain.returns_BT, apart.returns_BT, atol=1e-3)
    _, same = prepared(cast, scored(), gamma=0.9, lam=0.5, lam_value=0.5)
    torch.testing.assert_close(same.returns_BT, plain.returns_BT)


@pytest.mark.parametrize("settings", [{}, {"whiten_rewards": True}, {"scale_scores": "running"}, {"kl_coef": 0.0}])
def test_a_dense_reward_with_all_on_the_last_token_is_the_score(settings: dict[str, Any]) -> None:
    cast, given = everyone(), scored()
    last_B = credit.last_true_index(given.rollouts.action_BT)
    dense_BT = torch.zeros_like(given.token_reward_BT)
    dense_BT[torch.arange(6), last_B] = given.score_B
    dense = replace(given, score_B=torch.zeros(6), token_reward_BT=dense_BT)
    ends = []
    for one in (given, dense):
        algorithm, batch = prepared(cast, one, **settings)
        loss = algorithm.loss(cast, batch)
        ends.append((batch.advantage_BT, batch.returns_BT, *(t.total for t in loss.terms.values())))
    for scalar, per_token in zip(*ends, strict=True):
        assert torch.equal(scalar, per_token), "bit for bit"
    dense_BT[torch.arange(6), last_B] = 0.0
    dense_BT[torch.arange(6), last_B - 1] = given.score_B
    _, early = prepared(cast, replace(dense, token_reward_BT=dense_BT), **settings)
    assert not torch.equal(early.advantage_BT, ends[0][0])


# ── Critic warm-up, moving reference, value branch ─────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("layout", ["separate", "shared", "adapters", "hydra"])
def test_while_the_critic_is_warmed_up_the_policy_rests(layout: str, tmp_path: Path) -> None:
    model = tiny.save_model(tmp_path / "model")
    prompts = str(tiny.write_prompts(tmp_path / "prompts.jsonl"))
    layouts = {"layout": {"kind": layout, "unfrozen_blocks": 1, "lora_rank": 4}}
    texts = {"data": prompts, "coef": 1.0}
    given = tiny.ppo(model, prompts, algorithm={"critic_warmup": 2}, total_episodes=24, pretraining=texts, **layouts)
    loop = tiny.online_loop(tmp_path / "loop", given)
    policy, value = (loop.cast.parameters((role,)) for role in ("policy", "value"))
    start = {n: p.detach().clone() for n, p in (policy | value).items()}
    for number in (1, 2, 3):
        seen = loop._iteration(number)  # pyright: ignore[reportPrivateUsage]
        moved = {n for n, p in policy.items() if not torch.equal(p.detach(), start[n])}
        critic = {n for n, p in value.items() if n not in policy and not torch.equal(p.detach(), start[n])}
        assert any(".head." in n for n in critic)
        assert any(".head." not in n for n in critic) is (layout in ("separate", "adapters")), (
            "all of the critic learns"
        )
        assert ("loss/policy_avg" in seen) is ("loss/pretraining_avg" in seen) is (number == 3)
        assert bool(moved) is (number == 3)
        assert seen["loss/value_avg"] > 0


def test_the_reference_follows_the_policy_every_so_many_steps(tmp_path: Path) -> None:
    model = tiny.save_model(tmp_path / "model")
    prompts = str(tiny.write_prompts(tmp_path / "prompts.jsonl"))
    for layout, every in (("separate", "rollout"), ("shared", 3), ("hydra", 3)):
        moving = {"ref_model_sync_steps": every, "ref_model_mixup_alpha": 0.25}
        shape = {"kind": layout, "unfrozen_blocks": 1}
        given = tiny.ppo(model, prompts, algorithm=moving, total_episodes=16, layout=shape)
        loop = tiny.online_loop(tmp_path / layout, given)
        trunks = [loop.cast.seat(role).trunk for role in ("policy", "reference")]
        policy, reference = (dict(trunk.model.named_parameters()) for trunk in trunks)
        names = [n for n in reference if reference[n] is not policy[n]]
        path: list[dict[str, Tensor]] = []
        loop.stepper.adam.register_step_post_hook(
            lambda *_, p=policy, n=names, at=path: at.append({name: p[name].detach().clone() for name in n})
        )
        expected = {n: reference[n].detach().clone() for n in names}
        loop.go()
        for step, now in enumerate(path, 1):
            if step % (4 if every == "rollout" else every) == 0:
                expected = {n: 0.75 * w + 0.25 * now[n] for n, w in expected.items()}
        assert len(path) == 8
        for n in names:
            torch.testing.assert_close(reference[n].detach(), expected[n], rtol=1e-5, atol=1e-6)
        assert any(not torch.equal(reference[n].detach(), path[-1][n]) for n in names)


@pytest.mark.parametrize("layout", [{"kind": "adapters", "lora_rank": 4}, {"kind": "hydra", "unfrozen_blocks": 0}])
def test_a_reference_without_weights_of_its_own_cannot_move(layout: dict[str, Any], tmp_path: Path) -> None:
    model = tiny.save_model(tmp_path / "model")
    prompts = str(tiny.write_prompts(tmp_path / "prompts.jsonl"))
    given = tiny.ppo(model, prompts, algorithm={"ref_model_sync_steps": "rollout"}, layout=layout)
    with pytest.raises(PalateError, match=r"ref_model_sync_steps: the reference has no weights of its own"):
        tiny.run(tmp_path, given)


@pytest.mark.parametrize("unfrozen", [0, 1, 2, -1])
def test_hydra_runs_with_any_number_of_blocks_and_a_value_branch(unfrozen: int, tmp_path: Path) -> None:
    model = tiny.save_model(tmp_path / "model")
    prompts = str(tiny.write_prompts(tmp_path / "prompts.jsonl"))
    shape = {"kind": "hydra", "unfrozen_blocks": unfrozen, "value_blocks": 2 if unfrozen >= 0 else -1}
    loop = tiny.online_loop(tmp_path / "loop", tiny.ppo(model, prompts, layout=shape, total_episodes=16))
    policy, reference, value = (loop.cast.seat(role).trunk for role in ("policy", "reference", "value"))
    rows = torch.tensor([[5, 9, 17, 33]])
    real = torch.ones_like(rows).bool()
    start = policy.logits(policy.hidden(rows, real)).detach()
    assert torch.equal(reference.logits(reference.hidden(rows, real)), start)
    assert torch.equal(value.hidden(rows, real), policy.hidden(rows, real))
    critic = loop.cast.parameters(("value",))
    assert not {id(p) for p in critic.values()} & {id(p) for p in loop.cast.parameters(("policy",)).values()}
    before = {n: p.detach().clone() for n, p in critic.items()}
    loop.go()
    assert torch.equal(reference.logits(reference.hidden(rows, real)), start)
    assert torch.equal(policy.logits(policy.hidden(rows, real)), start) is (unfrozen == 0)
    assert sum(not torch.equal(p.detach(), before[n]) for n, p in critic.items()) > 4, (
        "the branch learns, not its head alone"
    )


@pytest.mark.parametrize(
    "settings",
    [
        {"scale_scores": "running", "center_scores": True, "critic_warmup": 1, "lam_value": 1.0, "entropy_coef": 0.01},
        {"ref_model_sync_steps": 3, "kl_in": "loss", "kl_estimator": "k2", "dual_clip": 3.0, "scale_scores": "ref"},
    ],
)
def test_a_stop_in_the_middle_of_a_rollout_loses_nothing(settings: dict[str, Any], tmp_path: Path) -> None:
    model = tiny.save_model(tmp_path / "model")
    prompts = str(tiny.write_prompts(tmp_path / "prompts.jsonl"))
    assert stopped_equals_whole(tmp_path, tiny.ppo(model, prompts, algorithm=settings, total_episodes=24), step=6)
