"""The Adam ablation at a tiny size: which Adam moves further, and when the difference goes away."""

from __future__ import annotations

import math

import pytest

from bench import adam_ablation as ablation
from palate.models.make import Make, make
from palate.models.save import Card, save
from palate.stages.online import Stage


def vowels(prompts: list[str], completions: list[str]) -> list[float]:
    return [sum(c in "aeiou" for c in text) / 4 for text in completions]


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> ablation.Recorded:
    folder = tmp_path_factory.mktemp("model")
    texts = [f"A note about dish {n}, warm and {n % 7} times tasted." for n in range(60)]
    fresh = make(Make(hidden_size=16, layers=1, heads=2, vocabulary=300, context=96, initializer_range=0.2), texts, 1)
    save(folder, fresh.trunk, fresh.tokenizer, Card(title="tiny", base="", data={}, settings={}, metrics={}))
    stage = Stage.model_validate(
        {
            "model": str(folder),
            "reward": {"kind": "function", "function": vowels},
            "prompts": {"path": "world:tasting_room/prompts", "rows": 8},
            "algorithm": {"kind": "ppo", "old_logprobs": "sampled"},
            "layout": {"kind": "shared", "value_init": "zero"},
            "encoding": {"max_prompt_length": 12, "long_prompts": "keep_start"},
            "sampling": {"max_new_tokens": 6, "fixed_length": True},
            "microbatch_size": 4,
        }
    )
    return ablation.record(stage, seed=1, episodes=8)


def test_small_gradients_move_far_less_under_tensorflows_adam(recorded: ablation.Recorded) -> None:
    tf, torch_ = (ablation.two_updates(recorded, v, 1e-4, 1.0) for v in ("tensorflow", "torch"))
    assert float(tf.gradient_N.abs().max()) < 1.0  # every entry is far below ε/√(1 − β₂) = 31.6
    # Updates differ by √(1 − β₂) at the first step where |g| ≪ ε; approxkl goes as the square, 1000 at most.
    assert 500 < torch_.after[0]["approxkl"] / tf.after[0]["approxkl"] <= 1001


def test_large_gradients_move_alike_under_both(recorded: ablation.Recorded) -> None:
    tf, torch_ = (ablation.two_updates(recorded, v, 1e-4, 1e-12) for v in ("tensorflow", "torch"))
    for update in (0, 1):
        assert torch_.after[update]["approxkl"] == pytest.approx(tf.after[update]["approxkl"], rel=1e-2)


def test_every_trace_starts_from_the_same_weights(recorded: ablation.Recorded) -> None:
    once, again = (ablation.two_updates(recorded, "torch", 1e-3, 1e-5) for _ in range(2))
    assert once.after == again.after
    assert once.gradient_N.equal(again.gradient_N)
    assert once.gradient_N.numel() == recorded.size
    recorded.cast.restore(recorded.start)
    unmoved = ablation.change(recorded)
    assert unmoved["approxkl"] < 1e-10  # the sampler's log-probabilities against a fresh forward pass
    assert unmoved["clipfrac"] == 0.0


def test_the_rate_is_set_to_the_published_approxkl(recorded: ablation.Recorded) -> None:
    rate = ablation.rate_for(recorded, 1e-3, rounds=4)
    seen = ablation.two_updates(recorded, "tensorflow", rate, 1e-3).after[1]["approxkl"]
    assert seen == pytest.approx(3.717e-4, rel=0.2)


def test_the_table_has_a_line_for_each_setting(recorded: ablation.Recorded) -> None:
    settings = [ablation.Setting("small steps", 1e-5, 1e-6), ablation.Setting("scaled", 1e-2, 1e-3)]
    results = [ablation.compare([recorded, recorded], setting) for setting in settings]
    page = ablation.table(results)
    assert page.count("| small steps |") == page.count("| scaled |") == 1
    assert results[0].quantiles() == sorted(results[0].quantiles())
    assert not any(math.isnan(r) for r in results[1].ratios(1, "approxkl"))
    assert all(math.isnan(r) for r in results[0].ratios(1, "clipfrac"))  # nothing is clipped: no ratio is made up
    assert "–" in ablation.row(results[0])


def test_epsilon_grows_with_the_root_of_how_much_smaller_a_model_is() -> None:
    assert ablation.scaled_eps(ablation.GPT2) == 1e-5
    assert ablation.scaled_eps(ablation.GPT2 // 100) == pytest.approx(1e-4)
