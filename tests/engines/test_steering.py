"""Steered decoding: β 0 is plain sampling, β is the formula, and what is not legal is never said."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from palate import losses
from palate.batches import Tokens
from palate.cast import Layout, assemble
from palate.engines.draw import drawn_from
from palate.engines.engine import Sampling
from palate.engines.local import LocalEngine
from palate.engines.steering import Steer, Steering, bigrams
from palate.models.heads import ActionHead, Head, ScalarHead
from palate.models.load import load
from palate.models.save import Card, save
from palate.models.seats import ACTING
from palate.settings import PalateError, build, parse
from tests.engines.test_local import answers, full_logits, keys, prompts, tiny
from tests.losses.golden import part_of

NOTHING = torch.empty(0, dtype=torch.long)


@cache
def heads() -> dict[str, Head]:
    """Heads beside the tiny model whose values differ much from token to token."""
    roles = ("policy", "q1", "q2", "value", "target_q1", "target_q2")
    found = assemble(Layout(kind="shared", value_init="random"), tiny(), roles, 3).acting()
    draw = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for role in ACTING:
            for parameter in found[role].parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=draw) / 4)
    return found


def engine(
    beta: float = 0.0, legal: Sequence[tuple[int, int]] = (), steer: bool = True, **sampling: Any
) -> LocalEngine:
    loaded = tiny()
    settings = Sampling(**{"max_new_tokens": 12, **sampling})
    how = Steer(loaded.trunk, heads(), beta, legal) if steer else None
    return LocalEngine(loaded.trunk, loaded.tokenizer, settings, steer=how)


@pytest.mark.parametrize("greedy", [False, True])
def test_beta_0_is_plain_sampling_bit_for_bit(greedy: bool) -> None:
    plain = engine(steer=False).generate(prompts(24), keys(24), greedy=greedy)
    steered = engine(0.0).generate(prompts(24), keys(24), greedy=greedy)
    assert torch.equal(plain.tokens_BT, steered.tokens_BT)
    assert torch.equal(plain.logp_BT, steered.logp_BT)
    far = engine(4.0).generate(prompts(24), keys(24), greedy=greedy)
    assert answers(far) != answers(plain)


@torch.no_grad()
def steered_by_hand(ids: Sequence[int], beta: float) -> Tensor:
    """log π + β (min Q̂ − V) after each token of one row, from transformers' own forward."""
    states = tiny().trunk.base(torch.tensor([list(ids)])).last_hidden_state[0]
    least = torch.minimum(heads()["target_q1"](states), heads()["target_q2"](states))
    logits = full_logits(tiny(), ids)[:, : tiny().trunk.vocabulary]
    return logits.log_softmax(-1) + beta * (least - heads()["value"](states)[:, None])


def test_what_is_drawn_from_is_the_formula_with_top_k_and_temperature() -> None:
    rows = engine(1.5, temperature=0.7, top_k=5).generate(prompts(8), keys(8))
    for row in range(rows.size):
        ids = rows.tokens_BT[row][rows.real_BT[row]]
        logits = steered_by_hand(ids.tolist(), 1.5) / 0.7
        kept = logits.masked_fill(logits < logits.topk(5).values[:, -1:], -torch.inf).log_softmax(-1)
        expected = kept[:-1].gather(-1, ids[1:, None])[:, 0][len(prompts(8)[row]) - 1 :]
        torch.testing.assert_close(rows.logp_BT[row][rows.action_BT[row]], expected, atol=2e-5, rtol=0)


def test_greedy_takes_the_likeliest_of_the_steered_distribution() -> None:
    rows = engine(3.0).generate(prompts(8), keys(8), greedy=True)
    for row in range(rows.size):
        ids = rows.tokens_BT[row][rows.real_BT[row]].tolist()
        best = steered_by_hand(ids, 3.0).argmax(-1).tolist()
        start = len(prompts(8)[row])
        assert ids[start:] == best[start - 1 : -1]


def test_listening_hears_the_distribution_that_is_drawn_from() -> None:
    speaker = engine(2.0)
    rows = speaker.generate(prompts(1), keys(1))
    heard = speaker.listen(Tokens(rows.tokens_BT, rows.real_BT, rows.action_BT))
    torch.testing.assert_close(heard[rows.action_BT], rows.logp_BT[rows.action_BT], atol=1e-5, rtol=0)


def golden_steer(beta: float) -> tuple[Steer, Tensor, Tensor]:
    """The golden state: heads that answer with its numbers, its logits, its state."""
    case = part_of("ilql")
    found: dict[str, Head] = {"value": ScalarHead(1), "target_q1": ActionHead(1, 4), "target_q2": ActionHead(1, 4)}
    numbers = {"value": [case["v"][0][0]]} | {f"target_q{k}": case[f"target_q{k}"][0][0] for k in (1, 2)}
    for role, values in numbers.items():
        layer = nn.Linear(1, len(values), bias=False)
        layer.weight = nn.Parameter(torch.tensor(values)[:, None])
        found[role].layers = layer  # type: ignore[assignment]
    trunk: Any = SimpleNamespace(vocabulary=4, device=torch.device("cpu"))
    wide = nn.functional.pad(torch.tensor([case["policy_logits"][0][0]]), (0, 2), value=-torch.inf)
    return Steer(trunk, found, beta), wide, torch.ones(1, 1)


def test_golden() -> None:
    """Two columns beyond the tokenizer's ids stay impossible."""
    steer, logits, state = golden_steer(1.0)
    expected = part_of("ilql")["expected"]
    found = steer(logits, state, torch.tensor([0]))
    torch.testing.assert_close(found[0, :4], torch.tensor(expected["decode_scores_row0_t0_beta1"]), atol=1e-6, rtol=0)
    for more, name in (({}, "decode_probs_full"), ({"top_k": 2}, "decode_probs_top2")):
        drawn = drawn_from(found, Sampling(**more), NOTHING, early=False).exp()  # type: ignore[arg-type]
        torch.testing.assert_close(drawn[0, :4], torch.tensor(expected[name]), atol=1e-6, rtol=0)
        assert not drawn[0, 4:].any()


@pytest.mark.parametrize("twin", ["the larger Q", "no beta", "against V"])
def test_the_golden_numbers_reject(twin: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(logits: Tensor, target: list[Tensor], v: Tensor, beta: float) -> Tensor:
        q = torch.stack(target)
        if twin == "the larger Q":
            return logits.log_softmax(-1) + beta * (q.amax(0) - v[:, None])
        return logits.log_softmax(-1) + (beta * (q.amin(0) + v[:, None]) if twin == "against V" else 0)

    monkeypatch.setattr(losses, "ilql_logits", wrong)
    with pytest.raises(AssertionError):
        test_golden()


# --- legal bigrams ---------------------------------------------------------------------------------------------------


def ring(step: int = 1) -> tuple[tuple[int, int], ...]:
    """Each of sixteen tokens may be followed by the next one of them, the one behind it, or the end."""
    letters = list(range(60, 76))
    end = tiny().tokenizer.end
    after = ((letters[(i + step) % 16], letters[(i + 2 * step) % 16], end) for i in range(16))
    return tuple((letter, other) for letter, others in zip(letters, after, strict=True) for other in others)


@pytest.mark.parametrize("beta", [0.0, 5.0])
@pytest.mark.parametrize("greedy", [False, True])
def test_what_is_not_legal_is_never_said(beta: float, greedy: bool) -> None:
    asked = [[60 + i % 16] for i in range(48)]
    free = engine(beta, temperature=5.0).generate(asked, keys(48), greedy=greedy)
    held = engine(beta, ring(), temperature=5.0).generate(asked, keys(48), greedy=greedy)
    for rows, law_abiding in ((free, False), (held, True)):
        said = [tokens[real].tolist() for tokens, real in zip(rows.tokens_BT, rows.real_BT, strict=True)]
        assert all(pair in ring() for row in said for pair in pairwise(row)) == law_abiding
    assert bool(held.finished_B.any()) or greedy
    assert bool(held.logp_BT.isfinite().all())


def test_a_token_that_begins_no_pair_may_be_followed_by_anything() -> None:
    plain = engine(steer=False).generate([[30]] * 8, keys(8))
    held = engine(0.0, ring(), max_new_tokens=1).generate([[30]] * 8, keys(8))
    assert torch.equal(held.tokens_BT[:, 1], plain.tokens_BT[:, 1])
    assert torch.equal(held.logp_BT[:, 1], plain.logp_BT[:, 1])


def test_a_matrix_becomes_the_pairs_of_its_limited_rows() -> None:
    legal = np.array([[1, 1, 1], [0, 0, 1], [1, 0, 1]], dtype=bool)
    assert bigrams(legal) == ((1, 2), (2, 0), (2, 2))
    assert bigrams(legal.tolist()) == bigrams(torch.from_numpy(legal))
    legal[1] = False
    with pytest.raises(PalateError, match="legal_bigrams: nothing may follow token 1"):
        bigrams(legal)


# --- settings and doors ----------------------------------------------------------------------------------------------


def test_a_list_of_betas_is_each_once_in_order() -> None:
    assert parse(Steering, {"beta": [4, 0, 1, 4]}).betas == (0.0, 1.0, 4.0)
    assert parse(Steering, {"beta": 2}).betas == (2.0,)
    assert Steering().betas == (0.0,)
    for bad in (-1, [1, -1], []):
        with pytest.raises(PalateError, match="beta"):
            parse(Steering, {"beta": bad})


def test_beta_without_values_and_ids_that_are_none_are_refused() -> None:
    with pytest.raises(PalateError, match=r"steering\.beta: 2 needs values of actions, and this model learnt none"):
        Steer(tiny().trunk, {}, 2.0)
    with pytest.raises(PalateError, match=r"steering\.legal_bigrams: there is no token 999; ids run from 0 to 279"):
        Steer(tiny().trunk, {}, 0.0, ((3, 4), (4, 999)))
    assert Steer(tiny().trunk, {}, 0.0).beta == 0


@pytest.mark.parametrize("where", ["", "sampling."])
def test_training_on_own_answers_knows_no_steering(where: str) -> None:
    """Its ratios would be of a distribution that no loss knows of."""
    plain = {"kind": "online", "model": "m", "prompts": "p", "reward": {"kind": "length", "at_most": 3}}
    steered = {"steering": {"beta": 1}} if not where else {"sampling": {"beta": 1}}
    build("stages", {**plain, "algorithm": {"kind": "ppo"}}, "stages.0")
    with pytest.raises(PalateError, match=f"there is no setting '{'beta' if where else 'steering'}'"):
        build("stages", {**plain, **steered, "algorithm": {"kind": "ppo"}}, "stages.0")


def test_loaded_again_a_model_is_steered_to_the_same_answers(tmp_path: Path) -> None:
    here = tiny()
    save(tmp_path / "m", here.trunk, here.tokenizer, Card("t", "b"), heads=heads())
    there = load(tmp_path / "m")
    steer = Steer(there.trunk, there.heads, 2.0)
    again = LocalEngine(there.trunk, there.tokenizer, Sampling(max_new_tokens=12), steer=steer)
    ours, theirs = (e.generate(prompts(12), keys(12)) for e in (engine(2.0), again))
    assert torch.equal(ours.tokens_BT, theirs.tokens_BT)
    assert torch.equal(ours.logp_BT, theirs.logp_BT)
