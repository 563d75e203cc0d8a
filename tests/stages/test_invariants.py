"""What must hold at the first look at a rollout: an honest engine passes, and each way to lie is named."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from palate.batches import Experience, Rollouts
from palate.cast import Cast, Layout, assemble
from palate.engines.engine import Sampling
from palate.engines.local import LocalEngine
from palate.engines.publication import CLOSE
from palate.models.load import Loaded
from palate.models.lora import adapter_parameters
from palate.models.make import Architecture, Make, make
from palate.models.tokenizer import Tokenizer
from palate.randomness import key
from palate.settings import NotFinite, PalateError
from palate.stages import _guard, _invariants
from tests.stages import tiny_runs
from tests.stages.tiny_runs import lines, online_loop, run

PROMPTS = [f"Number {n} is" for n in range(16)]
KEYS = [key("invariants", n) for n in range(16)]
FORMATS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@cache
def tiny(architecture: Architecture = "llama") -> Loaded:
    """A random model whose distributions are far from uniform."""
    shape = Make(architecture=architecture, hidden_size=32, layers=2, heads=2, vocabulary=280, context=64)
    made = make(shape, PROMPTS, 7)
    with torch.no_grad():
        for weight in made.trunk.parameters():
            if weight.dim() > 1:
                weight.mul_(4.0)
    return made


def cast_of(
    architecture: Architecture = "llama", layout: str = "separate", dtype: torch.dtype = torch.float32
) -> tuple[Cast, Tokenizer]:
    loaded = copy.deepcopy(tiny(architecture))
    loaded.trunk.model.to(dtype)  # pyright: ignore[reportCallIssue]
    settings = Layout.model_validate({"kind": layout, "lora_rank": 4})
    cast = assemble(settings, loaded, ("policy", "reference", "value"), 3)
    seat = cast.seat("policy")
    if seat.adapter is not None:
        with torch.no_grad():
            for path, weight in adapter_parameters(seat.trunk.model, seat.adapter).items():
                generator = torch.Generator().manual_seed(len(path))
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.1)
    return cast, loaded.tokenizer


def engine(cast: Cast, tokenizer: Tokenizer, adapter: str | None = "as the cast", **sampling: Any) -> LocalEngine:
    seat = cast.seat("policy")
    worn = seat.adapter if adapter == "as the cast" else adapter
    return LocalEngine(seat.trunk, tokenizer, Sampling(**{"max_new_tokens": 10, **sampling}), adapter=worn)


def answers(speaker: LocalEngine, version: int = 5, begin: tuple[int, ...] = ()) -> Rollouts:
    return speaker.generate([[*begin, *speaker.tokenizer.encode(p)] for p in PROMPTS], KEYS, version=version)


# --- the honest -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("temperature", [1.0, 0.7, 1.3])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("layout", ["separate", "shared", "adapters", "hydra"])
def test_an_honest_engine_agrees(layout: str, architecture: Architecture, temperature: float, dtype: str) -> None:
    cast, tokenizer = cast_of(architecture, layout, FORMATS[dtype])
    rollouts = answers(engine(cast, tokenizer, temperature=temperature))
    found = _invariants.require_agreement(cast, rollouts, 5)
    assert set(found) == {f"sampling/sampling_logp_difference/{name}" for name in ("mean", "max")}
    mean, largest = CLOSE[FORMATS[dtype]]
    assert found["sampling/sampling_logp_difference/mean"] <= mean / 2, "the bound has room for larger models"
    assert found["sampling/sampling_logp_difference/max"] <= largest / 2


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {name: tiny_runs.save_model(folder / name, name) for name in ("llama", "gpt2")}


HONEST: dict[str, dict[str, Any]] = {
    "separate": {},
    "shared": {"layout": {"kind": "shared"}},
    "adapters": {"layout": {"kind": "adapters", "lora_rank": 4}},
    "hydra": {"layout": {"kind": "hydra", "unfrozen_blocks": 1}},
    "sampled": {"algorithm": {"old_logprobs": "sampled"}},
    "another temperature": {"sampling": {"max_new_tokens": 6, "temperature": 0.7}},
    "the score behind": {"algorithm": {"score_position": "after"}, "shaping": {"missing_eos_penalty": -1.0}},
    "bfloat16": {"loading": {"dtype": "bfloat16"}, "layout": {"kind": "adapters", "lora_rank": 4}},
    "bfloat16, sampled": {
        "loading": {"dtype": "bfloat16"},
        "layout": {"kind": "adapters", "lora_rank": 4},
        "algorithm": {"old_logprobs": "sampled"},
    },
}


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("name", HONEST)
def test_an_honest_stage_passes_in_every_rollout(
    name: str, architecture: str, models: dict[str, Path], tmp_path: Path
) -> None:
    prompts = str(tiny_runs.write_prompts(tmp_path / "prompts.jsonl"))
    changes = copy.deepcopy(HONEST[name])
    folder = run(tmp_path, tiny_runs.ppo(models[architecture], prompts, total_episodes=24, **changes))
    rows = lines(folder / "1-ppo" / "metrics.jsonl")
    mean = CLOSE[FORMATS["bfloat16" if "bfloat16" in name else "float32"]][0]
    assert len(rows) == 3
    assert abs(rows[0]["objective/kl"]) <= mean
    if "sampled" not in name:
        assert rows[0]["objective/kl"] == 0.0 or layout_computes_twice(name)
    for row in rows:
        assert row["first_minibatch/ratio_error"] <= 2 * mean
        assert row["sampling/sampling_logp_difference/mean"] <= mean
    assert rows[2]["objective/kl"] != 0.0, "it learnt"


def layout_computes_twice(name: str) -> bool:
    """Whether policy and reference take other paths to the same numbers."""
    return name in ("adapters", "bfloat16")


# --- the liars --------------------------------------------------------------------------------------------------------


def refuse(cast: Cast, rollouts: Rollouts, cause: str) -> None:
    with pytest.raises(PalateError, match=rf"sampler and trainer .* Likely cause: {cause}"):
        _invariants.require_agreement(cast, rollouts, 5)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize(("drawn", "said"), [(0.7, 1.0), (1.0, 0.7), (1.3, 1.0), (1.05, 1.0), (0.5, 2.0), (1.37, 1.0)])
def test_another_temperature_than_it_says(drawn: float, said: float, architecture: Architecture) -> None:
    cast, tokenizer = cast_of(architecture)
    rollouts = answers(engine(cast, tokenizer, temperature=drawn))
    named = f"temperature: the sampler drew at {drawn:g}, the trainer reads at {said:g}"
    refuse(cast, replace(rollouts, temperature=said), named)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("cut", [{"top_k": 5}, {"top_k": 20}, {"top_p": 0.9}, {"top_k": 40, "temperature": 0.8}])
def test_a_truncated_distribution(cut: dict[str, Any], architecture: Architecture) -> None:
    cast, tokenizer = cast_of(architecture)
    refuse(cast, answers(engine(cast, tokenizer, **cut)), "a truncated distribution")


@pytest.mark.parametrize("where", ["in the trainer's pass", "in the sampler's pass"])
def test_dropout_in_one_of_the_passes(where: str) -> None:
    cast, tokenizer = cast_of("gpt2")
    dropouts = [m for m in cast.seat("policy").trunk.modules() if isinstance(m, nn.Dropout)]

    def active(now: bool) -> None:
        for module in dropouts:
            module.p = 0.2 if now else 0.0
            module.train(now)

    active(where == "in the sampler's pass")
    rollouts = answers(engine(cast, tokenizer))
    active(where == "in the trainer's pass")
    cause = "dropout, or another source of chance" if where == "in the trainer's pass" else "stale weights.* or dropout"
    refuse(cast, rollouts, cause)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_one_more_token_before_each_prompt(architecture: Architecture) -> None:
    """A template that begins with a token which the trainer does not read."""
    cast, tokenizer = cast_of(architecture)
    rollouts = answers(engine(cast, tokenizer), begin=(tokenizer.end,))
    refuse(cast, without_first(rollouts), f"template or begin token: the sampler reads one more token, {tokenizer.end}")


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_first_token_that_the_sampler_leaves_out(architecture: Architecture) -> None:
    cast, tokenizer = cast_of(architecture)
    rollouts = answers(engine(cast, tokenizer))
    longer = {"tokens_BT": tokenizer.encode("N")[0], "real_BT": True, "action_BT": False, "logp_BT": 0.0}
    padded = {n: nn.functional.pad(getattr(rollouts, n), (1, 0), value=value) for n, value in longer.items()}
    refuse(cast, replace(rollouts, **padded), "template or begin token: the sampler does not read the first token")


def without_first(rollouts: Rollouts) -> Rollouts:
    wide = ("tokens_BT", "real_BT", "action_BT", "logp_BT")
    return replace(rollouts, **{name: getattr(rollouts, name)[:, 1:] for name in wide})


@torch.no_grad()
def move(cast: Cast, by: float) -> None:
    for n, weight in enumerate(cast.parameters(["policy"]).values()):
        weight.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(n)) * by)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("by", [1e-2, 1e-1])
def test_weights_that_took_no_publication(by: float, architecture: Architecture) -> None:
    """An engine over weights of its own, which does not look whether they are the right ones."""
    cast, tokenizer = cast_of(architecture)
    stale = LocalEngine(copy.deepcopy(cast.seat("policy").trunk), tokenizer, Sampling(max_new_tokens=10))
    move(cast, by)
    refuse(cast, answers(stale), "stale weights: the sampler still speaks as the policy's start does")


def test_weights_of_the_version_before() -> None:
    cast, tokenizer = cast_of()
    move(cast, 1e-2)
    stale = LocalEngine(copy.deepcopy(cast.seat("policy").trunk), tokenizer, Sampling(max_new_tokens=10))
    move(cast, 1e-3)
    refuse(cast, answers(stale), "stale weights .*another version of the policy")


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_the_adapter_left_off(architecture: Architecture) -> None:
    cast, tokenizer = cast_of(architecture, "adapters")
    refuse(cast, answers(engine(cast, tokenizer, adapter=None)), "the adapter is left off")


def test_a_version_that_does_not_move() -> None:
    cast, tokenizer = cast_of()
    rollouts = answers(engine(cast, tokenizer), version=4)
    with pytest.raises(PalateError, match="policy version 4, but version 5 was published"):
        _invariants.require_agreement(cast, rollouts, 5)


def test_a_log_probability_that_is_no_number_is_met_as_one() -> None:
    """It is skipped and counted as every other nan, and no KL controller ever sees it."""
    cast, tokenizer = cast_of()
    rollouts = answers(engine(cast, tokenizer))
    logp_BT = rollouts.logp_BT.masked_fill(rollouts.action_BT & (rollouts.prompt_B == 2)[:, None], float("nan"))
    with pytest.raises(NotFinite):
        _invariants.require_agreement(cast, replace(rollouts, logp_BT=logp_BT), 5)


def test_one_token_of_one_answer_is_enough() -> None:
    """On average it would be rounding."""
    cast, tokenizer = cast_of()
    rollouts = answers(engine(cast, tokenizer))
    logp_BT = rollouts.logp_BT.clone()
    row, column = rollouts.action_BT.nonzero()[3].tolist()
    logp_BT[row, column] += 2e-3
    refuse(cast, replace(rollouts, logp_BT=logp_BT), "")


# --- ratio, clipping, KL ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1.1, 0.9, 1.001])
def test_a_ratio_that_is_not_one_stops_the_stage(scale: float, models: dict[str, Path], tmp_path: Path) -> None:
    """Old log-probabilities of another temperature, made by an algorithm of the user's own."""
    prompts = str(tiny_runs.write_prompts(tmp_path / "prompts.jsonl"))
    algorithm = {"kind": "tests.stages.tricks:ScaledOld", "scale": scale}
    with pytest.raises(PalateError, match=r"rollout 1: in its first minibatch the ratio is .*another temperature"):
        run(tmp_path, tiny_runs.ppo(models["llama"], prompts, algorithm=algorithm))
    assert not (tmp_path / "tiny" / "1-ppo" / "model").exists()


def test_a_reference_that_is_not_the_start_stops_the_stage(models: dict[str, Path], tmp_path: Path) -> None:
    prompts = str(tiny_runs.write_prompts(tmp_path / "prompts.jsonl"))
    algorithm = {"kind": "tests.stages.tricks:OwnReference"}
    with pytest.raises(PalateError, match=r"rollout 1: the KL to the reference is .* before any update, 0 is right"):
        run(tmp_path, tiny_runs.ppo(models["llama"], prompts, algorithm=algorithm))


@pytest.mark.parametrize(
    ("seen", "right"),
    [
        ({"val/ratio": 1.0, "policy/clipfrac_avg": 0.0}, True),
        ({"val/ratio": 1.0 + 9e-5, "policy/clipfrac_avg": 0.0}, True),
        ({}, True),
        ({"val/ratio": 1.0 + 2e-4}, False),
        ({"val/ratio": 1.0 - 2e-4}, False),
        ({"val/ratio": float("nan")}, False),
        ({"val/ratio": 1.0, "policy/clipfrac_avg": 0.01}, False),
    ],
)
def test_ratio_and_clipping_within_rounding_pass(seen: dict[str, float], right: bool) -> None:
    if right:
        _invariants.require_first_minibatch(seen, torch.float32, 3)
        return
    with pytest.raises(PalateError, match="rollout 3: in its first minibatch"):
        _invariants.require_first_minibatch(seen, torch.float32, 3)


def experience(**changes: Any) -> Experience:
    mask = torch.tensor([[False, True, True, False]])
    wide = mask | torch.tensor([[False, False, False, True]])
    x = torch.where(mask, 0.5, float("nan"))
    kept = {"logp_BT": x, "advantage_BT": x, "value_BT": x.nan_to_num(1.0), "returns_BT": x.nan_to_num(1.0)}
    kept |= {name: kept[name].index_fill(1, torch.tensor([place]), value) for name, (place, value) in changes.items()}
    tokens = torch.ones(1, 4, dtype=torch.long)
    return Experience(tokens, mask | True, mask, **kept, value_mask_BT=wide, temperature=1.0, memory={}, metrics={})


def test_what_is_off_the_masks_may_be_anything() -> None:
    _invariants.require_finite(experience(value_BT=(0, float("nan"))))


@pytest.mark.parametrize("name", ["logp_BT", "advantage_BT", "value_BT", "returns_BT"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_a_loss_would_read_must_be_a_number(name: str, value: float) -> None:
    place = 3 if name in ("value_BT", "returns_BT") else 2
    learnt = experience(**{name: (place, value)})
    with pytest.raises(_guard.Spoilt, match=f"{name.removesuffix('_BT')}: 1 of . numbers are not finite") as caught:
        _invariants.require_finite(learnt)
    assert caught.value.batch is learnt


# --- in a real stage --------------------------------------------------------------------------------------------------


class Lying:
    """A real engine whose rollouts are changed on the way out."""

    def __init__(self, inner: LocalEngine, lie: Callable[[Rollouts], Rollouts]) -> None:
        self.inner, self.lie, self.tokenizer = inner, lie, inner.tokenizer
        self.publish = inner.publish

    def generate(self, *args: Any, **more: Any) -> Rollouts:
        return self.lie(self.inner.generate(*args, **more))


@pytest.mark.parametrize(
    ("lie", "message"),
    [
        (lambda r: replace(r, temperature=0.9), "Likely cause: temperature"),
        (lambda r: replace(r, version=0), "policy version 0, but version 1 was published"),
    ],
    ids=["temperature", "version"],
)
def test_a_lie_stops_the_stage_before_anything_is_learnt_from_it(
    lie: Callable[[Rollouts], Rollouts], message: str, models: dict[str, Path], tmp_path: Path
) -> None:
    """The lie begins with the second rollout: the check is not of the first alone."""
    prompts = str(tiny_runs.write_prompts(tmp_path / "prompts.jsonl"))
    loop = online_loop(tmp_path / "stage", tiny_runs.ppo(models["llama"], prompts))
    honest: Any = loop.engine
    loop.engine = Lying(honest, lambda r: r if r.version == 0 else lie(r))  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(PalateError, match=message):
        loop.go()
    assert loop.done == 1
    assert loop.lesson is None
