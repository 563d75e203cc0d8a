"""The local engine against one row at a time, without cache, padding or batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from itertools import accumulate
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from palate import randomness
from palate.batches import Rollouts
from palate.cast import Cast, Seat
from palate.engines.engine import Sampling, stop_reasons
from palate.engines.local import LocalEngine
from palate.models.load import Loaded
from palate.models.lora import adapter_parameters, add_adapter
from palate.models.make import Architecture, Make, make
from palate.models.tokenizer import Tokenizer
from palate.models.trunk import Trunk
from palate.settings import PalateError

TEXTS = ["a small wine with a long finish and some salt", "the soup was hot, the bread was not"]
FAMILIES: tuple[Architecture, ...] = ("gpt2", "llama", "qwen2", "qwen3", "mistral", "opt", "bloom", "gpt_neox")


@cache
def tiny(architecture: Architecture = "llama") -> Loaded:
    """A random model with weights wide enough that its distributions are far from uniform."""
    settings = Make(architecture=architecture, hidden_size=32, layers=2, heads=2, context=64, vocabulary=280)
    loaded = make(settings, TEXTS, key=7)
    with torch.no_grad():
        for weight in loaded.trunk.parameters():
            if weight.dim() > 1:
                weight.mul_(4.0)
    return loaded


def engine(batch_size: int = 64, architecture: Architecture = "llama", **sampling: Any) -> LocalEngine:
    loaded = tiny(architecture)
    settings = Sampling(**{"max_new_tokens": 12, **sampling})
    return LocalEngine(loaded.trunk, loaded.tokenizer, settings, batch_size=batch_size)


def prompts(count: int) -> list[list[int]]:
    """Prompts of one to eleven tokens."""
    ids = tiny().tokenizer.encode(" ".join(TEXTS))
    return [ids[i % 17 : i % 17 + 1 + i * 7 % 11] for i in range(count)]


def keys(count: int) -> list[int]:
    return [randomness.key("test", i) for i in range(count)]


def answers(rows: Rollouts) -> list[list[int]]:
    return [tokens[mask].tolist() for tokens, mask in zip(rows.tokens_BT, rows.action_BT, strict=True)]


@torch.no_grad()
def full_logits(loaded: Loaded, ids: Sequence[int]) -> Tensor:
    """Next-token logits of one unpadded row by transformers' own forward, ids beyond the tokenizer at −inf."""
    logits_TV = cast(Any, loaded.trunk.model)(input_ids=torch.tensor([list(ids)])).logits[0].float()
    logits_TV[:, loaded.tokenizer.size :] = float("-inf")
    return logits_TV


@pytest.mark.parametrize("architecture", FAMILIES)
@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_captured_logp_is_what_teacher_forcing_says(architecture: Architecture, temperature: float) -> None:
    rows = engine(5, architecture, temperature=temperature).generate(prompts(12), keys(12))
    for row in range(rows.size):
        ids = rows.tokens_BT[row][rows.real_BT[row]]
        logp_TV = (full_logits(tiny(architecture), ids.tolist()) / temperature).log_softmax(-1)
        expected = logp_TV[:-1].gather(-1, ids[1:, None])[:, 0]
        start = len(prompts(12)[row])
        torch.testing.assert_close(rows.logp_BT[row][rows.action_BT[row]], expected[start - 1 :], atol=1e-5, rtol=0)
    assert bool((rows.logp_BT[~rows.action_BT] == 0).all())


def test_answers_are_those_of_a_sampler_that_knows_one_row_and_one_token() -> None:
    """Token by token without cache or batch: the first id whose cumulative probability exceeds the uniform number."""
    rows = engine(7, temperature=0.9).generate(prompts(20), keys(20))
    for asked, answer, key in zip(prompts(20), answers(rows), keys(20), strict=True):
        said: list[int] = []
        while len(said) < 12 and tiny().tokenizer.end not in said:
            probability = (full_logits(tiny(), [*asked, *said])[-1].double() / 0.9).softmax(-1).tolist()
            uniform = float(randomness.uniforms(np.array([key], dtype=np.uint64), len(said))[0])
            sums = accumulate(probability)
            said.append(next(token for token, below in enumerate(sums) if below > uniform))
        assert answer == said


def test_an_answer_does_not_depend_on_the_batch_around_it() -> None:
    """128 answers alone, in sevens, all at once, and in reverse order: the same tokens."""
    count = 128
    alone = answers(engine(1).generate(prompts(count), keys(count)))
    assert len({len(a) for a in alone}) > 3, "the test needs answers that stop at different places"
    for size in (7, 128):
        assert answers(engine(size).generate(prompts(count), keys(count))) == alone
    backwards = engine(64).generate(prompts(count)[::-1], keys(count)[::-1])
    assert answers(backwards)[::-1] == alone
    some = engine(64).generate(prompts(count)[40:50], keys(count)[40:50])
    assert answers(some) == alone[40:50]


def test_several_answers_to_a_prompt_are_those_of_the_prompt_repeated() -> None:
    asked = prompts(6)
    together = engine(8).generate(asked, keys(24))
    apart = engine(64).generate([p for p in asked for _ in range(4)], keys(24))
    assert answers(together) == answers(apart)
    assert together.prompt_B.tolist() == [i // 4 for i in range(24)]
    assert apart.prompt_B.tolist() == list(range(24))
    assert len({tuple(a) for a in answers(together)}) > 12


def test_prompts_come_back_as_they_were_given() -> None:
    rows = engine(4).generate(prompts(9), keys(9), version=5)
    before = rows.real_BT & ~rows.action_BT
    assert [t[m].tolist() for t, m in zip(rows.tokens_BT, before, strict=True)] == prompts(9)
    assert rows.version == 5


def test_first_tokens_come_as_often_as_the_model_says() -> None:
    """Chi-square of 4,000 one-token answers over the likeliest eight tokens and the rest; 8 d.f., 0.1 %: 26.1."""
    asked, count = prompts(4)[3], 4000
    rows = engine(500, max_new_tokens=1, temperature=0.8).generate([asked], keys(count))
    probability = (full_logits(tiny(), asked)[-1] / 0.8).double().softmax(-1)
    top = probability.topk(8)
    drawn = rows.tokens_BT[rows.action_BT]
    counts = torch.stack([(drawn == i).sum() for i in top.indices]).double()
    counts = torch.cat([counts, count - counts.sum(0, keepdim=True)])
    expected = count * torch.cat([top.values, 1 - top.values.sum(0, keepdim=True)])
    assert float(((counts - expected) ** 2 / expected).sum()) < 26.1


def test_greedy_takes_the_likeliest_token_and_needs_no_luck() -> None:
    rows = engine(3).generate(prompts(5), keys(5), greedy=True)
    again = engine(64).generate(prompts(5), [k + 1 for k in keys(5)], greedy=True)
    assert answers(rows) == answers(again)
    for asked, answer in zip(prompts(5), answers(rows), strict=True):
        for t, token in enumerate(answer):
            assert int(full_logits(tiny(), [*asked, *answer[:t]])[-1].argmax()) == token


def test_answers_stop_at_the_first_stop_token_and_keep_it() -> None:
    unstopped = answers(engine(fixed_length=True).generate(prompts(40), keys(40)))
    common = max({t for a in unstopped for t in a}, key=lambda t: sum(t in a for a in unstopped))
    rows = engine(stop_token_ids=(common,)).generate(prompts(40), keys(40))
    eos = tiny().tokenizer.eos
    reasons = stop_reasons(rows, eos)
    assert {"stop", "length"} <= set(reasons)
    for whole, answer, reason in zip(unstopped, answers(rows), reasons, strict=True):
        place = next((i for i, t in enumerate(whole) if t in (common, eos)), None)
        assert answer == (whole if place is None else whole[: place + 1])
        assert reason == ("length" if place is None else "eos" if whole[place] == eos else "stop")


def test_fixed_length_never_stops() -> None:
    rows = engine(fixed_length=True).generate(prompts(100), keys(100))
    eos = tiny().tokenizer.eos
    assert rows.length_B.tolist() == [12] * 100
    assert not bool(rows.finished_B.any())
    assert any(eos in a[:-1] for a in answers(rows)), "the test needs an EOS in the middle"


def test_no_end_before_the_minimum_length() -> None:
    """A fifth of the vocabulary ends an answer: the shortest are exactly six other tokens and an end."""
    ends = tuple(range(10, 70))
    free = engine(stop_token_ids=ends).generate(prompts(60), keys(60))
    assert int(free.length_B.min()) < 6, "the test needs answers that would end early"
    rows = engine(stop_token_ids=ends, min_new_tokens=6).generate(prompts(60), keys(60))
    assert int(rows.length_B.min()) == 7
    start = len(prompts(1)[0])
    ids = rows.tokens_BT[0][rows.real_BT[0]].tolist()
    logits_V = full_logits(tiny(), ids[:start])[-1]
    logits_V[[*ends, tiny().tokenizer.end]] = float("-inf")
    first = rows.logp_BT[0][rows.action_BT[0]][0]
    assert float(first) == pytest.approx(float(logits_V.log_softmax(-1)[ids[start]]), abs=1e-5)


@pytest.mark.parametrize("cut", [{"top_k": 4}, {"top_p": 0.6}])
def test_a_truncated_sampler_reports_the_distribution_it_drew_from(cut: dict[str, Any]) -> None:
    """Its log-probability is the full one plus −log(kept mass): at least as large at every token."""
    rows = engine(**cut).generate(prompts(8), keys(8))
    for row in range(rows.size):
        ids = rows.tokens_BT[row][rows.real_BT[row]]
        start = len(prompts(8)[row])
        logp_TV = full_logits(tiny(), ids.tolist()).log_softmax(-1)[start - 1 : -1]
        sorted_TV = logp_TV.exp().sort(-1, descending=True).values
        before_TV = sorted_TV.cumsum(-1) - sorted_TV
        kept_T = sorted_TV[:, :4].sum(-1) if "top_k" in cut else (sorted_TV * (before_TV < 0.6)).sum(-1)
        expected = logp_TV.gather(-1, ids[start:, None])[:, 0] - kept_T.log()
        torch.testing.assert_close(rows.logp_BT[row][rows.action_BT[row]], expected, atol=1e-5, rtol=0)


def test_ids_beyond_the_tokenizer_are_never_drawn() -> None:
    loaded = tiny()
    config = AutoConfig.for_model("gpt2", vocab_size=loaded.tokenizer.size + 500, n_embd=16, n_layer=1, n_head=2)
    trunk = Trunk(AutoModelForCausalLM.from_config(config), loaded.tokenizer.size)
    rows = LocalEngine(trunk, loaded.tokenizer, Sampling(max_new_tokens=8)).generate(prompts(64), keys(64))
    assert int(rows.tokens_BT.max()) < loaded.tokenizer.size


def test_a_prompt_that_does_not_fit_is_named() -> None:
    asked = [prompts(1)[0], [5] * 53]
    with pytest.raises(PalateError, match=r"prompt 1 .* 53 tokens.* context of 64 leaves 52"):
        engine().generate(asked, keys(2))
    assert engine().generate([[5] * 52], keys(1)).size == 1
    with pytest.raises(PalateError, match="prompt 0 has no token"):
        engine().generate([[]], keys(1))


def test_logits_that_are_not_numbers_stop_the_run() -> None:
    loaded = make(Make(hidden_size=16, layers=1, heads=2, context=32, vocabulary=280), TEXTS, key=1)
    with torch.no_grad():
        next(loaded.trunk.parameters()).fill_(float("nan"))
    broken = LocalEngine(loaded.trunk, loaded.tokenizer, Sampling(max_new_tokens=4))
    with pytest.raises(PalateError, match=r"token 0 of the answer to prompt 0: .*not numbers"):
        broken.generate(prompts(2), keys(2))


def test_what_cannot_write_or_stop_is_refused() -> None:
    loaded = tiny()
    with pytest.raises(PalateError, match="no token 99999"):
        engine(stop_token_ids=(99999,))
    config = AutoConfig.for_model("bert", vocab_size=300, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    encoder = Trunk(AutoModel.from_config(config), loaded.tokenizer.size)
    with pytest.raises(PalateError, match="cannot write"):
        LocalEngine(encoder, loaded.tokenizer, Sampling())


def endless() -> Tokenizer:
    """A tokenizer without an end-of-sequence token."""
    inner: Any = make(Make(hidden_size=16, layers=1, heads=2, vocabulary=270), TEXTS, key=1).tokenizer.inner
    inner.eos_token = None
    return Tokenizer(inner)


def test_a_tokenizer_without_an_end_needs_another_way_to_stop() -> None:
    build: Callable[..., LocalEngine] = lambda **s: LocalEngine(tiny().trunk, endless(), Sampling(**s))  # noqa: E731
    with pytest.raises(PalateError, match="no EOS"):
        build(max_new_tokens=4)
    assert build(max_new_tokens=4, fixed_length=True).generate([[5]], keys(1)).length_B.tolist() == [4]
    assert build(max_new_tokens=4, stop_token_ids=(7,)).generate([[5]], keys(1)).size == 1


@pytest.mark.parametrize("adapter", [None, "policy"])
def test_the_cast_agrees_with_the_sampler(adapter: str | None) -> None:
    """Old and new log-probabilities of a first minibatch: the ratio is 1, with an adapter worn or without."""
    loaded = make(Make(hidden_size=32, layers=2, heads=2, context=64, vocabulary=280), TEXTS, key=3)
    add_adapter(loaded.trunk.model, "policy", 4, 8.0, "all-linear", key=5)
    with torch.no_grad():
        for parameter in adapter_parameters(loaded.trunk.model, "policy").values():
            parameter.add_(0.1)
    settings = Sampling(max_new_tokens=10, temperature=0.7)
    rows = LocalEngine(loaded.trunk, loaded.tokenizer, settings, adapter=adapter).generate(prompts(16), keys(16))
    seats = {name: Seat(loaded.trunk, worn, None) for name, worn in (("me", adapter), ("other", "policy"))}
    with torch.no_grad():
        mine_BT = Cast(seats).logp("me", rows, rows.temperature)
        other_BT = Cast(seats).logp("other", rows, rows.temperature)
    torch.testing.assert_close(mine_BT, rows.logp_BT, atol=1e-5, rtol=0)
    assert ((other_BT - rows.logp_BT).abs().max() > 0.01) == (adapter is None)
