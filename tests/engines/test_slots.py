"""Answers from slots that are filled again, against one row at a time and against transformers' own forward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from palate import randomness
from palate.batches import Rollouts
from palate.engines.engine import Sampling
from palate.engines.local import LocalEngine
from palate.models import decode, linear
from palate.models.attention import Asked
from palate.models.decode import Padded, Slots
from palate.models.heads import ScalarHead
from palate.models.make import Make, make
from palate.models.one_query import of_one
from palate.models.tokenizer import Tokenizer
from palate.models.trunk import Trunk
from tests.models.conftest import FAMILIES, VOCABULARY
from tests.models.conftest import _build as build  # pyright: ignore[reportPrivateUsage]

ENDS = (2, 7, 11, 13)


class Ids:
    """A tokenizer of which only the ids are asked."""

    size, eos, pad = VOCABULARY, 2, 0

    def decode(self, ids: Sequence[int]) -> str:
        return " ".join(map(str, ids))


def engine(trunk: Trunk, batch_size: int = 64, value: ScalarHead | None = None, **sampling: Any) -> LocalEngine:
    settings = Sampling(**{"max_new_tokens": 9, "stop_token_ids": ENDS, **sampling})
    return LocalEngine(trunk, cast(Tokenizer, Ids()), settings, batch_size=batch_size, value=value)


def prompts(count: int) -> list[list[int]]:
    """One to thirteen ids, ragged; some begin alike for long, some are the same."""
    common = [3 + i * 5 % 50 for i in range(12)]
    return [[*common[: i * 7 % 13], 3 + i * 11 % 40] for i in range(count)]


def keys(count: int) -> list[int]:
    return [randomness.key("slots", i) for i in range(count)]


def answers(rows: Rollouts) -> list[list[int]]:
    return [tokens[mask].tolist() for tokens, mask in zip(rows.tokens_BT, rows.action_BT, strict=True)]


def padded(trunk: Trunk) -> Trunk:
    trunk.packs = False
    return trunk


@pytest.mark.parametrize("family", list(FAMILIES))
def test_slots_and_transformers_cache_write_the_same(family: str) -> None:
    """37 answers through five slots of each kind; log-probabilities as transformers' own forward gives them."""
    trunk = Trunk(build(family), VOCABULARY)
    assert trunk.packs or family == "bloom", "the test is of the fast path"
    fast = engine(trunk, 5).generate(prompts(37), keys(37))
    lengths = {len(a) for a in answers(fast)}
    assert len(lengths) > 2, "the test needs answers that end at different places"
    for row in range(0, fast.size, 5):
        ids = fast.tokens_BT[row][fast.real_BT[row]]
        with torch.no_grad():
            more = {"position_ids": torch.arange(len(ids))[None] + trunk.first_position} if trunk.first_position else {}
            logits_TV = cast(Any, trunk.model)(input_ids=ids[None], **more).logits[0].float()
        expected_T = logits_TV.log_softmax(-1)[:-1].gather(-1, ids[1:, None])[:, 0]
        action_T = fast.action_BT[row][: len(ids)]
        torch.testing.assert_close(fast.logp_BT[row][: len(ids)][action_T], expected_T[action_T[1:]], atol=2e-5, rtol=0)
    slow = engine(padded(trunk), 5).generate(prompts(37), keys(37))
    assert answers(slow) == answers(fast)
    torch.testing.assert_close(slow.logp_BT, fast.logp_BT, atol=2e-5, rtol=0)
    assert slow.finished_B.equal(fast.finished_B)


@pytest.mark.parametrize("more", [{"sliding_window": 4}, {"sliding_window": 4, "num_key_value_heads": 1}])
def test_a_sliding_window_holds_while_writing(more: dict[str, Any]) -> None:
    trunk = Trunk(build("mistral", **more), VOCABULARY)
    wide = Trunk(build("mistral", **{**more, "sliding_window": None}), VOCABULARY)
    fast = engine(trunk, 4, fixed_length=True, stop_token_ids=()).generate(prompts(11), keys(11))
    other = engine(wide, 4, fixed_length=True, stop_token_ids=()).generate(prompts(11), keys(11))
    assert not fast.logp_BT.allclose(other.logp_BT, atol=1e-3), "the window must matter"
    slow = engine(padded(trunk), 4, fixed_length=True, stop_token_ids=()).generate(prompts(11), keys(11))
    torch.testing.assert_close(slow.logp_BT, fast.logp_BT, atol=2e-5, rtol=0)
    assert answers(slow) == answers(fast)


@pytest.mark.parametrize("size", [1, 3, 16])
def test_slots_that_are_filled_again_change_no_answer(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Little memory at first, so that rows move and memory grows on the way."""
    trunk = Trunk(build("llama"), VOCABULARY)
    expected = engine(trunk, 64).generate(prompts(20), keys(60))
    monkeypatch.setattr(decode, "_AHEAD", 2)
    found = engine(trunk, size).generate(prompts(20), keys(60))
    assert answers(found) == answers(expected)
    torch.testing.assert_close(found.logp_BT, expected.logp_BT, atol=1e-5, rtol=0)


class Counted:
    """A trunk's passes, counted: prompts read, and how many rows each step has."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.read: list[tuple[int, ...]] = []
        self.steps: list[int] = []
        read, step = Slots.read, Slots.step

        def counted_read(slots: Slots, asked: Sequence[Sequence[int]]) -> decode.Read:
            self.read += [tuple(ids) for ids in asked]
            return read(slots, asked)

        def counted_step(slots: Slots, token_B: Tensor) -> Tensor:
            self.steps.append(len(token_B))
            return step(slots, token_B)

        monkeypatch.setattr(Slots, "read", counted_read)
        monkeypatch.setattr(Slots, "step", counted_step)


def test_each_prompt_is_read_once_and_free_slots_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Six answers to each prompt and four slots: no prompt's answers fit at once."""
    trunk = Trunk(build("llama"), VOCABULARY)
    asked = [[3 + i, 5, 9 + i] for i in range(5)]
    counted = Counted(monkeypatch)
    rows = engine(trunk, 4).generate(asked, keys(30))
    assert sorted(counted.read) == sorted(map(tuple, asked))
    steps = int(rows.length_B.sum()) - rows.size  # the first token of an answer needs none
    assert sum(counted.steps) == steps, "no pass is made for answers that have ended"
    assert max(counted.steps) <= 4
    assert len(counted.steps) < 1.35 * steps / 4, "slots stay empty while answers wait"


def test_a_family_that_bypasses_the_registry_has_the_other_memory() -> None:
    trunk = Trunk(build("llama"), VOCABULARY)
    assert isinstance(decode.remember(trunk, 2, 3), Slots)
    assert isinstance(decode.remember(padded(trunk), 2, 3), Padded)


@pytest.mark.parametrize("packs", [True, False])
def test_values_are_spoken_with_the_tokens(packs: bool) -> None:
    trunk = Trunk(build("gpt2"), VOCABULARY)
    trunk.packs = packs
    head = ScalarHead(trunk.width)
    nn.init.normal_(head.last.weight)
    rows = engine(trunk, 4, value=head).generate(prompts(13), keys(13))
    assert rows.value_BT is not None
    with torch.no_grad():
        after_BT = head(trunk.hidden(rows.tokens_BT, rows.real_BT))
    before_BT = torch.nn.functional.pad(after_BT[:, :-1], (1, 0))
    torch.testing.assert_close(rows.value_BT, before_BT * rows.action_BT, atol=2e-5, rtol=0)
    assert engine(trunk, 4).generate(prompts(13), keys(13)).value_BT is None


def test_what_is_heard_of_a_text_is_what_was_drawn_with() -> None:
    trunk = Trunk(build("gemma2"), VOCABULARY)
    asked = [[3, 4, 5, 6], [9, 8, 7, 6]]
    speaks = engine(trunk, temperature=0.7, fixed_length=True, stop_token_ids=())
    rows = speaks.generate(asked, keys(2))
    torch.testing.assert_close(speaks.listen(rows), rows.logp_BT, atol=1e-5, rtol=0)


@pytest.mark.parametrize("backend", ["writing", "onednn"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_weights_turned_over_leave_no_trace(
    family: str, backend: linear.Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Copies are made anew for each call, so an update between two calls is heard; the modules are as before."""
    trunk = Trunk(build(family), VOCABULARY)
    layers = [m for m in trunk.model.modules() if type(m) in (nn.Linear, Conv1D)]
    linear.use(backend)
    try:
        ways = [layer.forward for layer in layers]
        with decode.turned(trunk):
            changed = [layer.forward for layer in layers]
        assert [layer.forward for layer in layers] == ways
        assert (changed != ways) == (linear.backend() == backend)
        first = engine(trunk).generate(prompts(4), keys(4), greedy=True)
        with torch.no_grad():
            for layer in layers:
                cast(Tensor, layer.weight).mul_(1.5)
        second = engine(trunk).generate(prompts(4), keys(4), greedy=True)
        monkeypatch.setattr(decode, "_TURN", 0)
        again = engine(trunk).generate(prompts(4), keys(4), greedy=True)
    finally:
        linear.use(None)
    assert answers(again) == answers(second)
    assert not torch.equal(first.logp_BT[:, :20], second.logp_BT[:, :20])


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("cap", [None, 3.0])
@pytest.mark.parametrize("heads", [(4, 4), (2, 6)], ids=["own keys", "shared keys"])
def test_one_query_attends_over_the_columns_it_is_given(
    heads: tuple[int, int], cap: float | None, masked: bool
) -> None:
    """Every way of one query against the sums written out, in a memory of which only a span counts."""
    random = torch.Generator().manual_seed(1)
    groups, queries = heads
    q_BGhd = torch.randn((3, groups, queries // groups, 8), generator=random)
    k_BGRd, v_BGRd = (torch.randn((3, groups, 11, 8), generator=random) for _ in range(2))
    mask_B11L = torch.zeros(3, 1, 1, 5)
    mask_B11L[1, ..., :2] = -torch.inf
    found = of_one(
        q_BGhd, k_BGRd, v_BGRd, slice(4, 9), Asked(0.3, True, None, cap), mask_B11L if masked else None
    ).reshape(3, groups, -1, 8)
    score = torch.einsum("bghd,bgld->bghl", q_BGhd, k_BGRd[:, :, 4:9]) * 0.3
    score = score if cap is None else torch.tanh(score / cap) * cap
    weight = functional.softmax(score + mask_B11L if masked else score, -1)
    torch.testing.assert_close(found, torch.einsum("bghl,bgld->bghd", weight, v_BGRd[:, :, 4:9]), rtol=1e-5, atol=1e-6)


def test_stop_texts_are_looked_for_where_they_may_end() -> None:
    """The shortest beginning of each unstopped answer that holds a stop text, and no other; few tails are read."""
    loaded = make(Make(hidden_size=32, layers=2, heads=2, context=64, vocabulary=280), ["the soup was hot"], key=7)
    with torch.no_grad():
        for weight in loaded.trunk.parameters():
            if weight.dim() > 1:
                weight.mul_(4.0)
    size = loaded.tokenizer.size
    asked = [[5 + i] for i in range(20)]
    free = Sampling(max_new_tokens=20, fixed_length=True)
    whole = answers(LocalEngine(loaded.trunk, loaded.tokenizer, free).generate(asked, keys(60)))
    texts = [loaded.tokenizer.decode(a) for a in whole]
    stop = tuple(sorted({t[i : i + 2] for t in texts for i in range(4, 9) if t[i : i + 2].isprintable()})[:3])
    heard: list[list[int]] = []
    decoded = loaded.tokenizer.decode
    loaded.tokenizer.decode = lambda ids, *more: (heard.append(list(ids)), decoded(ids, *more))[1]  # type: ignore[method-assign]
    rows = LocalEngine(loaded.trunk, loaded.tokenizer, Sampling(max_new_tokens=20, stop=stop)).generate(asked, keys(60))
    eos, cut = loaded.tokenizer.eos, 0
    for full, answer in zip(whole, answers(rows), strict=True):
        ends = (n for n in range(1, 21) if full[n - 1] == eos or any(s in decoded(full[:n]) for s in stop))
        place = next(ends, 20)
        cut += place < 20
        assert answer == full[:place]
    assert cut > 3
    tails = [ids for ids in heard if len(ids) > 1]
    assert len(tails) < 0.9 * int(rows.length_B.sum()), "rows are read that cannot end"
    assert sum(len(ids) == 1 for ids in heard) <= size + len(tails)
