"""What turns columns into records have in common: one form for all texts of a record, prompts found in answers."""

from __future__ import annotations

import re
from collections.abc import Sequence

from palate.data.formats.row import Row
from palate.records import Message, Text

_IN_WORD = re.compile(r"[^\W⺀-鿿가-힯豈-﫿]")
"""A letter or digit, scripts without spaces (Chinese, Japanese, Korean) aside."""


def user(text: str) -> tuple[Message, ...]:
    """Plain text as what the user says; nothing for an empty text."""
    return (Message("user", text),) if text else ()


def assistant(text: str) -> tuple[Message, ...]:
    """Plain text as what the assistant says."""
    return (Message("assistant", text),)


def alike(row: Row, prompt: Text, answers: Sequence[Text]) -> tuple[Text, list[Text]]:
    """Prompt and answers in one form: all text, or all conversations.

    Answers that repeat the prompt's turns at their start (a common habit of published sets) lose them.
    """
    if isinstance(prompt, str) and all(isinstance(a, str) for a in answers):
        return prompt, list(answers)
    turns = user(prompt) if isinstance(prompt, str) else prompt
    spoken = [assistant(a) if isinstance(a, str) else a for a in answers]
    begins = [bool(turns) and a[: len(turns)] == turns and len(a) > len(turns) for a in spoken]
    if any(begins):
        if not all(begins):
            told = (
                f"answer {begins.index(True)} begins with the prompt's turns and answer {begins.index(False)} does not"
            )
            raise row.fault("prompt", told, "Give the turns after the prompt alone, or the prompt in every answer")
        spoken = [a[len(turns) :] for a in spoken]
    for answer in spoken:
        ends_with_assistant(row, answer)
    return turns, list(spoken)


def ends_with_assistant(row: Row, turns: Sequence[Message]) -> None:
    """Refuse an answer that is not the assistant's."""
    if not turns or turns[-1].role != "assistant":
        last = turns[-1].role if turns else "nobody"
        raise row.fault("answer", f"the last turn is said by {last}, expected the assistant", "Mend or drop the row")


def last_answer(row: Row, turns: tuple[Message, ...]) -> tuple[tuple[Message, ...], tuple[Message, ...]]:
    """(everything before, the last assistant turn). Turns after it teach nothing and are left out."""
    spoken = [i for i, turn in enumerate(turns) if turn.role == "assistant"]
    if not spoken:
        move = "Name the column `prompt` to read conversations to be answered"
        raise row.fault("messages", "no turn is the assistant's, so there is nothing to learn", move)
    return turns[: spoken[-1]], turns[spoken[-1] : spoken[-1] + 1]


def implicit_prompt(row: Row, chosen: Text, rejected: Text) -> tuple[Text, Text, Text]:
    """(prompt, chosen, rejected) from two whole texts or conversations: the prompt is their longest common prefix.

    In text the prefix ends where a word ends, so no word is cut in two, and each answer keeps at least a word.
    """
    if isinstance(chosen, str) and isinstance(rejected, str):
        cut = _common_words(chosen, rejected)
        return chosen[:cut], chosen[cut:], rejected[cut:]
    left = assistant(chosen) if isinstance(chosen, str) else chosen
    right = assistant(rejected) if isinstance(rejected, str) else rejected
    ends_with_assistant(row, left)
    ends_with_assistant(row, right)
    prompt, *rest = shared_turns(left, right)
    if not prompt and max(len(left), len(right)) > 1:
        told = "the two conversations share no turn, so there is no prompt that both answer"
        raise row.fault("chosen/rejected", told, "Both must begin alike; mend or remove the row")
    return prompt, rest[0], rest[1]


Turns = tuple[Message, ...]


def shared_turns(left: Turns, right: Turns) -> tuple[Turns, Turns, Turns]:
    """(the turns both conversations begin with, the rest of each): at least one turn is left of both."""
    most = min(len(left), len(right)) - 1
    cut = next((i for i in range(most) if left[i] != right[i]), most)
    return left[:cut], left[cut:], right[cut:]


def _common_words(one: str, other: str) -> int:
    """Length of the longest common prefix that ends between words and leaves something of both texts."""
    if one == other:
        return 0
    shorter = min(len(one), len(other))
    cut = next((i for i in range(shorter) if one[i] != other[i]), shorter)
    if cut == shorter or _inside_a_word(one, cut) or _inside_a_word(other, cut):
        while cut and _IN_WORD.match(one, cut - 1):
            cut -= 1
    return len(one[:cut].rstrip(" "))


def _inside_a_word(text: str, cut: int) -> bool:
    return 0 < cut < len(text) and all(_IN_WORD.match(text, place) for place in (cut - 1, cut))


def distinct(row: Row, field: str, answers: Sequence[Text]) -> None:
    """Refuse a ranking of fewer than two answers."""
    if len(answers) < 2:
        raise row.fault(field, f"a ranking needs at least two answers, got {len(answers)}", "Add one or drop the row")
