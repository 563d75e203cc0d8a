"""Calling a reward function: find it, pass it what it asks for, and name the answer it stumbles over."""

from __future__ import annotations

import asyncio
import copy
import functools
import importlib
import importlib.util
import inspect
import math
import sys
import traceback
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import torch

from palate.rewards.reward import Answers, Verdict
from palate.settings import PalateError, nearest

Function = Callable[..., Any]


def load_function(spelled: str) -> Function:
    """The function behind `module:name` or `folder/file.py:name`; modules may lie in the working directory.

    Raises ValueError (the fault of a setting) when there is none.
    """
    module_name, colon, name = spelled.rpartition(":")
    if not colon or not module_name or not name:
        raise ValueError(f"{spelled!r}: write module:function or path/file.py:function.")
    try:
        module = _import(module_name)
    except (Exception, SystemExit) as fault:  # the user's module is imported here and may raise anything, or exit
        raise ValueError(f"{spelled!r}: cannot import {module_name}: {type(fault).__name__}: {fault}.") from None
    try:
        found = attrgetter(name)(module)
    except AttributeError:
        hint = nearest(name, [n for n in vars(module) if not n.startswith("_")])
        raise ValueError(f"{spelled!r}: {module_name} has no {name!r}.{hint} Name one of its functions.") from None
    if not callable(found):
        raise ValueError(f"{spelled!r}: {name} is {type(found).__name__}, not a function.")
    return found


def _import(name: str) -> ModuleType:
    if not name.endswith(".py"):
        here = str(Path.cwd())
        if here not in sys.path:
            sys.path.append(here)  # last, so that nothing installed is shadowed
        return importlib.import_module(name)
    specification = importlib.util.spec_from_file_location(Path(name).stem, name)
    if specification is None or specification.loader is None or not Path(name).is_file():
        raise ImportError("no such file")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def ask(function: Function, label: str, answers: Answers) -> Verdict:
    """One call of a reward function on all the answers, checked and turned into a verdict.

    Raises PalateError naming the answer when the function raises, returns the wrong number of results, or a
    result that is not a finite number, None, or a list with one finite number per token.
    """
    function = _with_tokenizer(function, answers)
    arguments = _arguments(function, label, answers)
    return _verdict(label, answers.world.first(lambda: _said(function, label, arguments, answers)), answers)


def _said(function: Function, label: str, arguments: _Arguments, answers: Answers) -> list[Any]:
    """What the function says, one entry per answer. Of several ranks the first alone calls it: it may cost money."""
    try:
        said = _run(function, arguments)
    except (Exception, SystemExit) as fault:  # the function is the user's and may raise anything, or call exit
        raise _blame(function, label, arguments, answers, fault) from fault
    return _listed(said, label, answers)


@dataclass(frozen=True)
class _Arguments:
    """What a function is called with: columns of equal length, by place and by name."""

    placed: Sequence[Sequence[Any]]
    named: Mapping[str, Sequence[Any]]

    def row(self, row: int) -> _Arguments:
        """The arguments for one answer alone."""
        return _Arguments([[c[row]] for c in self.placed], {n: [c[row]] for n, c in self.named.items()})


def _arguments(function: Function, label: str, answers: Answers) -> _Arguments:
    """Prompts, completions and the columns the function accepts.

    A function that names `completions` (as TRL's do), or `samples` or `outputs` (as trlX's do: a sample is the prompt
    with its answer), gets everything by name; any other gets prompts and completions in the first two places.
    `prompt_ids`, `completion_ids` and `finished` are there for those who name them.
    """
    try:
        accepted = inspect.signature(function).parameters
    except (TypeError, ValueError):  # some functions written in C do not say what they take
        return _Arguments([answers.prompts, answers.completions], {})
    offered: dict[str, Sequence[Any]] = {**answers.columns}
    offered |= {n: make(answers) for n, make in _BY_NAME.items() if n in accepted}
    placed = not {"completions", "samples", "outputs"} & set(accepted)
    if not placed:
        offered |= {"prompts": answers.prompts, "completions": answers.completions}
        offered |= {} if "completions" in accepted else {"outputs": answers.completions, "samples": _samples(answers)}
    by_name = [n for n, p in accepted.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    own = by_name[2:] if placed else by_name
    missing = [n for n in own if accepted[n].default is inspect.Parameter.empty and n not in offered]
    if missing:
        known = ", ".join(sorted(answers.columns)) or "none"
        raise PalateError(
            f"reward {label}: the function asks for {missing[0]!r}, which is no column of the data."
            f"{nearest(missing[0], answers.columns)} Columns: {known}."
        )
    everything = any(p.kind is p.VAR_KEYWORD for p in accepted.values())
    taken = by_name[:2] if placed else []
    named = {n: c for n, c in offered.items() if n in own or (everything and n not in taken)}
    return _Arguments([answers.prompts, answers.completions] if placed else [], named)


def _with_tokenizer(function: Function, answers: Answers) -> Function:
    """The function with the policy's tokenizer in its `tokenizer`, where it names one (as trlX's do)."""
    try:
        asks = "tokenizer" in inspect.signature(function).parameters and "tokenizer" not in answers.columns
    except (TypeError, ValueError):
        return function
    return functools.partial(function, tokenizer=answers.tokenizer.inner) if asks else function


def _samples(answers: Answers) -> list[str]:
    return [prompt + said for prompt, said in zip(answers.prompts, answers.completions, strict=True)]


def _prompt_ids(answers: Answers) -> list[list[int]]:
    rows = answers.rollouts
    prompt_BT = rows.real_BT & (rows.action_BT.cumsum(-1) == 0)
    return [tokens[mask].tolist() for tokens, mask in zip(rows.tokens_BT, prompt_BT, strict=True)]


def _completion_ids(answers: Answers) -> list[list[int]]:
    return [answers.ids(row) for row in range(answers.size)]


def _finished(answers: Answers) -> list[bool]:
    return cast(list[bool], answers.rollouts.finished_B.tolist())


_BY_NAME: Mapping[str, Callable[[Answers], Sequence[Any]]] = {
    "prompt_ids": _prompt_ids,
    "completion_ids": _completion_ids,
    "finished": _finished,
}


def _run(function: Function, arguments: _Arguments) -> Any:
    """Call with copies, so that the function cannot change the data; wait for an async function's answer."""
    placed, named = copy.deepcopy((list(arguments.placed), dict(arguments.named)))
    result = function(*(list(c) for c in placed), **{n: list(c) for n, c in named.items()})
    return _wait(result) if inspect.isawaitable(result) else result


def _wait(result: Awaitable[Any]) -> Any:
    async def finish() -> Any:
        return await result

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(finish())
    with ThreadPoolExecutor(1) as pool:  # a notebook already runs a loop in this thread
        return pool.submit(asyncio.run, finish()).result()


def _blame(
    function: Function, label: str, arguments: _Arguments, answers: Answers, fault: BaseException
) -> PalateError:
    """The error with the first answer that alone makes the function raise; failing that, all of them."""
    guilty = f"{answers.size} answers together, the first being {answers.name(0)}"
    for row in range(answers.size):
        try:
            _run(function, arguments.row(row))
        except (Exception, SystemExit) as own:  # as in `ask`: anything the user's code may raise
            fault, guilty = own, answers.name(row)
            break
    last = traceback.extract_tb(fault.__traceback__)[-1]
    return PalateError(
        f"reward {label}: the function raised {type(fault).__name__}: {fault} (at {Path(last.filename).name}:"
        f"{last.lineno}) for {guilty}. Mend it, or return None for answers it cannot judge."
    )


def _listed(said: Any, label: str, answers: Answers) -> list[Any]:
    if hasattr(said, "tolist"):  # arrays and tensors
        said = said.tolist()
    if not isinstance(said, list | tuple):
        raise PalateError(
            f"reward {label}: the function returned {type(said).__name__}, not a list. Return one entry per "
            f"answer: a number, a list of numbers (one per token), or None."
        )
    listed = list(cast(Sequence[Any], said))
    if len(listed) != answers.size:
        raise PalateError(
            f"reward {label}: the function returned {len(listed)} results for {answers.size} answers, the "
            f"first being {answers.name(0)}. Return one entry per answer, None where it cannot judge."
        )
    return listed


def _verdict(label: str, listed: Sequence[Any], answers: Answers) -> Verdict:
    rows = answers.rollouts
    score_B = torch.zeros(answers.size)
    token_BT = torch.zeros(rows.tokens_BT.shape)
    part_B = torch.zeros(answers.size)
    action_BT = rows.action_BT.cpu()
    dense = False
    for row, entry in enumerate(listed):
        value = entry.tolist() if hasattr(entry, "tolist") else entry
        if isinstance(value, list | tuple):
            dense = True
            tokens = _tokens(label, list(cast(Sequence[Any], value)), row, answers, int(action_BT[row].sum()))
            token_BT[row, action_BT[row]] = torch.tensor(tokens, dtype=torch.float32)
            part_B[row] = math.fsum(tokens)
        else:
            score_B[row] = part_B[row] = float("nan") if value is None else _number(label, value, row, answers)
    device = rows.tokens_BT.device
    return Verdict(score_B, token_BT if dense else None, {label: part_B}).to(device)


def _tokens(label: str, values: list[Any], row: int, answers: Answers, count: int) -> list[float]:
    if len(values) != count:
        raise PalateError(
            f"reward {label}: {len(values)} numbers for the {count} tokens of {answers.name(row)}. A per-token "
            f"reward has one number per sampled token, the end token included (a parameter named completion_ids "
            f"receives them)."
        )
    return [_number(label, v, row, answers) for v in values]


_LARGEST = torch.finfo(torch.float32).max
"""What is larger becomes infinite when scores are stored."""


def _number(label: str, value: Any, row: int, answers: Answers) -> float:
    number = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(number, int | float) and abs(number) <= _LARGEST:
        return float(number)
    spelled = "a huge number" if isinstance(number, int) else repr(number)[:60]
    raise PalateError(
        f"reward {label}: {spelled} for {answers.name(row)} is not a finite number. Return a number, a list "
        f"of numbers (one per token), or None to abstain."
    )
