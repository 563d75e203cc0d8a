"""What a reward sees and what it says: answers in, a verdict out; and how a reward is named in settings."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Protocol, cast, runtime_checkable

import torch
from pydantic import BaseModel, PlainSerializer, PlainValidator
from torch import Tensor

from palate.batches import Rollouts, Rows
from palate.models.tokenizer import Tokenizer
from palate.parallel import World
from palate.records import Text, before_stop
from palate.settings import Choice, PalateError, build


@dataclass(frozen=True)
class Answers:
    """B answers as a reward may look at them: texts, the data's own columns, the sampled ids behind the texts.

    `prompts` are readable strings; `said` holds the same prompts in record form (turns of a conversation stay
    turns), for reward models that have a chat template of their own. Every column has B entries. `tokenizer`
    is the policy's.
    """

    prompts: Sequence[str]
    completions: Sequence[str]
    columns: Mapping[str, Sequence[Any]]
    rollouts: Rollouts
    tokenizer: Tokenizer
    said: Sequence[Text]
    world: World = field(default_factory=World)
    """The ranks that ask: a model's passes are divided among them, a function is called by the first alone."""

    @property
    def size(self) -> int:
        """How many answers."""
        return len(self.completions)

    def ids(self, row: int) -> list[int]:
        """The sampled ids of one answer, its end token included."""
        return self.rollouts.tokens_BT[row][self.rollouts.action_BT[row]].tolist()

    def name(self, row: int) -> str:
        """A row for an error message: its index and how its prompt starts."""
        text = self.prompts[row]
        return f"answer {row} (prompt {text[:60]!r}{'…' if len(text) > 60 else ''})"


@dataclass(frozen=True)
class Verdict(Rows):
    """What a reward says about B answers.

    `score_B` is per answer, nan where the reward abstained. `token_reward_BT` is given per token (indexed
    like the rollouts, 0 off the answer) beside the score, not summed into it; None when nothing was given per
    token. `parts` holds what each source said before weighting (the sum of its tokens, where per token), nan
    where it abstained.
    """

    score_B: Tensor
    token_reward_BT: Tensor | None
    parts: Mapping[str, Tensor]


@runtime_checkable
class Scorer(Protocol):
    """What every reward is to the loop; `label` names it in tables and metrics (`rewards/<label>/mean`)."""

    @property
    def label(self) -> str: ...

    def score(self, answers: Answers) -> Verdict: ...


class Asked(Protocol):
    """A prompt as the data hand it out: readable, with its columns. `palate.data.encode.PromptRow` is one."""

    @property
    def text(self) -> str: ...

    @property
    def columns(self) -> Mapping[str, Any]: ...


def answers_of(
    rollouts: Rollouts,
    prompts: Sequence[Asked],
    tokenizer: Tokenizer,
    said: Sequence[Text] | None = None,
    world: World | None = None,
    stop: Sequence[str] = (),
) -> Answers:
    """Texts of rollouts. `prompts` (and `said`) are per prompt and are dealt out by `rollouts.prompt_B`.

    A column that only some prompts have holds None for the others. The texts are a view: special tokens, a
    final EOS and what begins with a `stop` text are left out, and nothing trained on is ever encoded from them again.
    """
    owner = cast(list[int], rollouts.prompt_B.tolist())
    names = dict.fromkeys(name for prompt in prompts for name in prompt.columns)
    near = rollouts.to(torch.device("cpu"))  # one copy instead of one per row
    return Answers(
        prompts=[prompts[p].text for p in owner],
        completions=[before_stop(_text(near, row, tokenizer), stop) for row in range(near.size)],
        columns={name: [prompts[p].columns.get(name) for p in owner] for name in names},
        rollouts=rollouts,
        tokenizer=tokenizer,
        said=[said[p] if said else prompts[p].text for p in owner],
        world=world or World(),
    )


def _text(rollouts: Rollouts, row: int, tokenizer: Tokenizer) -> str:
    ids = cast(list[int], rollouts.tokens_BT[row][rollouts.action_BT[row]].tolist())
    return tokenizer.decode(ids[:-1] if ids and ids[-1] == tokenizer.eos else ids)


def verdict(label: str, scores: Sequence[float | None], answers: Answers) -> Verdict:
    """A verdict per answer; None abstains."""
    plain = [float("nan") if s is None else float(s) for s in scores]
    score_B = torch.tensor(plain, dtype=torch.float32, device=answers.rollouts.tokens_BT.device)
    return Verdict(score_B, None, {label: score_B})


def a_reward(given: Any) -> Scorer:
    """A reward from a mapping with `kind`, settings already built, a Python function, or a short spelling.

    `stage:NAME`, a folder or a hub id is a reward model; `module:function` and `file.py:function` are functions.
    """
    if isinstance(given, str):
        function = ":" in given and not given.startswith("stage:") and not Path(given).exists()
        given = {"kind": "function", "function": given} if function else {"kind": "model", "model": given}
    if isinstance(given, Mapping):
        given = build("rewards", cast(Mapping[str, Any], given))
    elif callable(given) and not isinstance(given, Scorer):
        given = build("rewards", {"kind": "function", "function": given})
    if not isinstance(given, Scorer):
        raise PalateError(f"a reward is a mapping with 'kind' or a Python function, not {type(given).__name__}.")
    return given


def _checked(given: Any) -> Scorer:
    try:
        return a_reward(given)
    except PalateError as fault:  # pydantic puts the place of the setting before the message of a ValueError
        raise ValueError(str(fault).lstrip(": .")) from None


def _dumped(reward: Any) -> Any:
    return reward.model_dump() if isinstance(reward, BaseModel) else repr(reward)


AnyReward = Annotated[Scorer, PlainValidator(_checked), PlainSerializer(_dumped)]
"""The type of a setting that holds a reward of any kind."""


def resolve(reward: Scorer, folder_of: Callable[[str], Path]) -> Scorer:
    """The same reward with every `stage:NAME` replaced by the folder that stage left its model in."""
    if not isinstance(reward, Choice):
        return reward
    changed = {
        name: _resolved(getattr(reward, name), folder_of) for name in type(reward).model_fields if name != "kind"
    }
    return cast(Scorer, reward.model_copy(update=changed))


def _resolved(value: Any, folder_of: Callable[[str], Path]) -> Any:
    if isinstance(value, str) and value.startswith("stage:"):
        return str(folder_of(value))
    if isinstance(value, Scorer):
        return resolve(value, folder_of)
    if isinstance(value, tuple):
        return tuple(_resolved(v, folder_of) for v in cast(tuple[Any, ...], value))
    return value


def stages_read(reward: Scorer) -> list[str]:
    """Names of the earlier stages a reward reads a model from, for the stage's `references`."""
    names: list[str] = []

    def remember(reference: str) -> Path:
        names.append(reference.removeprefix("stage:"))
        return Path(reference)

    resolve(reward, remember)
    return names


def models_read(reward: Scorer) -> list[str]:
    """Every model a reward reads (folders, hub ids, stage:NAME): the values of its fields called `model`."""
    if not isinstance(reward, Choice):
        return []
    found: list[str] = []
    for name in type(reward).model_fields:
        value = getattr(reward, name)
        if name == "model":
            found.append(str(value))
        inside = cast(tuple[Any, ...], value) if isinstance(value, tuple) else (value,)
        found += [model for one in inside if isinstance(one, Scorer) for model in models_read(one)]
    return found
