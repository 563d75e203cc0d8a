"""Answers from rollouts, and rewards named in settings."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from palate.models.tokenizer import Tokenizer
from palate.rewards.function import Reward as FunctionReward
from palate.rewards.mixture import Reward as Mixture
from palate.rewards.model import Reward as ModelReward
from palate.rewards.reward import Answers, AnyReward, a_reward, models_read, resolve, stages_read
from palate.settings import PalateError, Settings, kinds, parse

Answered = Callable[..., Answers]


class Holder(Settings):
    """A stage as far as these tests need one."""

    reward: AnyReward
    watch: AnyReward | None = None


def shortness(prompts: list[str], completions: list[str]) -> list[float]:
    return [-float(len(c)) for c in completions]


def test_every_kind_is_found_and_helpers_are_not() -> None:
    assert kinds("rewards") == ["ensemble", "exact", "function", "gold", "length", "mixture", "model"]


def test_prompts_and_columns_are_dealt_to_their_answers(answered: Answered, tokenizer: Tokenizer) -> None:
    answers = answered([" a", " b", " c", " d"], ["first", "second"], {"truth": ["x", "y"]})
    assert answers.prompts == ["first", "first", "second", "second"]
    assert answers.completions == [" a", " b", " c", " d"]
    assert answers.columns == {"truth": ["x", "x", "y", "y"]}
    assert answers.ids(2) == [*tokenizer.encode(" c"), tokenizer.eos]


def test_a_column_that_some_prompts_lack_is_none_there(answered: Answered, tokenizer: Tokenizer) -> None:
    from palate.rewards.reward import answers_of

    class Asked:
        def __init__(self, text: str, columns: dict[str, Any]) -> None:
            self.text, self.columns = text, columns

    rollouts = answered(["a", "b"]).rollouts
    answers = answers_of(rollouts, [Asked("p", {"k": 1}), Asked("q", {"other": 2})], tokenizer)
    assert answers.columns == {"k": [1, None], "other": [None, 2]}


def test_only_the_last_eos_is_left_out_of_the_text(answered: Answered, tokenizer: Tokenizer) -> None:
    stop = tokenizer.encode(".")[0]
    answers = answered([[*tokenizer.encode("so"), stop], [tokenizer.end]])
    assert answers.completions == ["so.", ""]


@pytest.mark.parametrize(
    ("given", "kind"),
    [
        ({"kind": "length", "at_most": 3}, "length"),
        ("stage:reward", "model"),
        ("some/folder", "model"),
        ("operator:length_hint", "function"),
        (shortness, "function"),
    ],
)
def test_a_reward_has_short_spellings(given: Any, kind: str) -> None:
    assert a_reward(given).kind == kind  # pyright: ignore[reportAttributeAccessIssue]


def test_faults_name_the_place_once() -> None:
    given = {"reward": {"kind": "length", "at_moost": 3}}
    with pytest.raises(PalateError, match=r"^stages.2.reward: there is no setting 'at_moost'. Did you mean 'at_most'"):
        parse(Holder, given, "stages.2")
    with pytest.raises(PalateError, match=r"^stages.2.watch: .*no reward is called 'modle'. Did you mean 'model'"):
        parse(Holder, {"reward": "stage:r", "watch": {"kind": "modle"}}, "stages.2")
    with pytest.raises(PalateError, match="not int"):
        parse(Holder, {"reward": 3})


def test_settings_can_be_written_down_and_read_back() -> None:
    given = {"kind": "mixture", "rewards": [{"kind": "model", "model": "stage:r"}, shortness], "weights": [1, 0.5]}
    held = parse(Holder, {"reward": given})
    dumped = held.model_dump(mode="json")
    assert dumped["reward"]["rewards"][0]["model"] == "stage:r"
    assert dumped["reward"]["rewards"][1]["function"].endswith(":shortness")
    dumped["reward"]["rewards"][1]["function"] = "operator:length_hint"
    assert parse(Holder, dumped).model_dump(mode="json") == dumped


def test_stages_are_listed_and_resolved_inside_mixtures() -> None:
    reward = Mixture(rewards=(ModelReward(model="stage:rm"), FunctionReward(function=shortness)), weights=(1.0, 2.0))
    assert stages_read(reward) == ["rm"]
    assert models_read(reward) == ["stage:rm"]
    found = resolve(reward, lambda name: Path("/runs/demo") / name.removeprefix("stage:"))
    assert models_read(found) == ["/runs/demo/rm"]
    assert stages_read(found) == []
    assert models_read(reward) == ["stage:rm"], "the original stays as it was"
