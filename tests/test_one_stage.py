"""Flat settings find their place; words of the command line become settings."""

from __future__ import annotations

import pytest

from palate.one_stage import OneStage, words_to_assignments
from palate.settings import PalateError, value_of

PPO = OneStage("online", "ppo", "ppo")


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("seed", "seed"),
        ("name", "name"),
        ("model", "stages.0.model"),
        ("total_episodes=64", "stages.0.total_episodes=64"),
        ("kl_coef", "stages.0.algorithm.kl_coef"),
        ("algorithm.kl_coef=0.1", "stages.0.algorithm.kl_coef=0.1"),
        ("learning_rate", "stages.0.optimiser.learning_rate"),
        ("sampling.max_new_tokens", "stages.0.sampling.max_new_tokens"),
        ("max_new_tokens=8", "stages.0.sampling.max_new_tokens=8"),
        ("prompts.rows=5", "stages.0.prompts.rows=5"),
    ],
)
def test_a_setting_finds_its_place(name: str, place: str) -> None:
    assert PPO.place(name) == place


def test_a_name_from_elsewhere_finds_the_algorithm() -> None:
    assert OneStage("train", "dpo", "dpo").place("rpo_alpha=1") == "stages.0.algorithm.rpo_alpha=1"
    assert OneStage("train", "simpo", "simpo").place("simpo_gamma=1") == "stages.0.algorithm.simpo_gamma=1"


def test_a_setting_that_is_nowhere_gets_the_nearest() -> None:
    with pytest.raises(PalateError, match=r"there is no setting 'kl_ceof'\. Did you mean 'kl_coef'\?"):
        PPO.place("kl_ceof")


def test_a_name_that_two_groups_have_must_be_written_out() -> None:
    with pytest.raises(PalateError, match="several groups of settings have it") as fault:
        OneStage("train", "sft", "sft").place(_shared_name())
    assert "Write" in str(fault.value)


def _shared_name() -> str:
    """A name that more than one group of the training stage has."""
    from palate.one_stage import _groups
    from palate.settings import find

    stage = find("stages", "train")
    seen: dict[str, int] = {}
    for _, group in _groups(stage):
        for name in group.model_fields:
            seen[name] = seen.get(name, 0) + 1
    shared = [n for n, count in seen.items() if count > 1 and n not in stage.model_fields]
    if not shared:
        pytest.skip("no two groups of the stage share a name")
    return shared[0]


def test_an_experiment_is_built_of_flat_settings() -> None:
    given = PPO.given(
        {"seed": 3, "model": "here", "kl_coef": 0.2, "sampling": {"temperature": 0.7}, "max_new_tokens": 9}
    )
    assert given == {
        "name": "ppo",
        "seed": 3,
        "stages": [
            {
                "kind": "online",
                "name": "ppo",
                "algorithm": {"kind": "ppo", "kl_coef": 0.2},
                "model": "here",
                "sampling": {"temperature": 0.7, "max_new_tokens": 9},
            }
        ],
    }


def test_a_mapping_for_the_algorithm_keeps_its_kind() -> None:
    stage = PPO.given({"algorithm": {"lam": 0.9}})["stages"][0]
    assert stage["algorithm"] == {"kind": "ppo", "lam": 0.9}


def test_words_become_assignments() -> None:
    words = ["a.b=1", "--seed", "2", "--learning-rate=1e-5", "--greedy", "--shift", "-3", "--last"]
    assert words_to_assignments(words) == [
        "a.b=1",
        "seed=2",
        "learning_rate=1e-5",
        "greedy=true",
        "shift=-3",
        "last=true",
    ]
    assert words_to_assignments(["--prompt", "What is 1 + 1 = ?"]) == ["prompt=What is 1 + 1 = ?"]
    with pytest.raises(PalateError, match=r"'seed': write a setting as key=value"):
        words_to_assignments(["seed"])


def test_values_are_yaml() -> None:
    assert value_of("a=[1, 2]") == ("a", [1, 2])
    assert value_of("a=x=y") == ("a", "x=y")
    with pytest.raises(PalateError, match="not valid YAML"):
        value_of("a=[1")
