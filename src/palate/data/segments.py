"""Segments: a prompt and its answer as consecutive texts, each tokenised by itself.

Because segments are tokenised separately and then joined, the prompt's ids in a training row are the ids the policy
is given at rollout, and what is trained begins and ends exactly where the answer does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from palate.records import Message
from palate.settings import PalateError


class Speaker(Protocol):
    """What is needed of a tokenizer (`palate.models.tokenizer.Tokenizer` is one)."""

    inner: Any
    size: int
    bos: int | None
    eos: int | None
    pad: int

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str: ...

    def render(self, messages: Sequence[Message], add_generation_prompt: bool) -> str: ...


@dataclass(frozen=True)
class Segment:
    """A stretch of text. `answer` is True on what the assistant says; `ended` where its end is spelled in the text."""

    text: str
    answer: bool = False
    ended: bool = False


_PROBE = "palateprobe"


def turn_ending(speaker: Speaker) -> tuple[str, str]:
    """(mark, blank) that the chat template writes after an assistant turn: `<|im_end|>` and a line break, say."""
    text = speaker.render([Message("user", _PROBE), Message("assistant", _PROBE)], False)
    _, found, tail = text.rpartition(_PROBE)
    if not found:
        raise PalateError("chat template: it leaves out what the assistant says. Give the tokenizer another one.")
    mark = tail.rstrip()
    return mark, tail[len(mark) :]


def stop_tokens(speaker: Speaker) -> tuple[int, ...]:
    """The ids an answer may end with: the end of sequence, and the chat template's end of turn where it is one id."""
    mark = speaker.encode(turn_ending(speaker)[0])
    known = [*([speaker.eos] if speaker.eos is not None else []), *(mark if len(mark) == 1 else [])]
    return tuple(dict.fromkeys(known))


@dataclass(frozen=True)
class Chat:
    """A tokenizer's chat template seen as segments."""

    speaker: Speaker
    mark: str
    blank: str

    @classmethod
    def of(cls, speaker: Speaker) -> Chat:
        """The template of `speaker`, with the way it ends a turn found out."""
        return cls(speaker, *turn_ending(speaker))

    def prompt(self, turns: Sequence[Message]) -> list[Segment]:
        """The conversation so far with the invitation to answer; earlier answers are segments of their own.

        A template that writes earlier turns differently once more turns follow gives one segment.
        """
        whole = self.speaker.render(turns, True)
        found: list[Segment] = []
        at = 0
        for i, turn in enumerate(turns):
            if turn.role != "assistant" or i == 0:
                continue
            before = self.speaker.render(turns[:i], True)
            answer = self.answer(before, turns[: i + 1])
            if not whole.startswith(before + answer.text) or len(before) < at:
                return [Segment(whole)]
            found += [Segment(whole[at : len(before)]), answer]
            at = len(before) + len(answer.text)
        return [*found, Segment(whole[at:])]

    def answer(self, before: str, turns: Sequence[Message]) -> Segment:
        """The last of `turns` as it follows `before`, with its end mark and without the blank after it."""
        text = self.speaker.render(turns, False)
        if text.startswith(before):
            said = text[len(before) :]
        else:
            content = turns[-1].content.strip()
            said = content + text.rpartition(content)[2] if content in text else content
        kept = said.removesuffix(self.blank)
        ended = bool(self.mark) and kept.endswith(self.mark)
        return Segment(kept if ended or not self.mark else said, answer=True, ended=ended)

    def whole(self, prompt: Sequence[Message], completion: Sequence[Message]) -> tuple[list[Segment], list[Segment]]:
        """(segments of the prompt, segments of the completion). A completion may hold several turns.

        Turns after the last assistant turn are left out. PalateError when a completion of several turns meets a
        template that rewrites earlier turns.
        """
        turns = [*prompt, *completion]
        spoken = [i for i in range(len(prompt), len(turns)) if turns[i].role == "assistant"]
        if not spoken:
            raise PalateError("the answer holds no assistant turn. Mend or drop the row.")
        first, last = spoken[0], spoken[-1]
        history = self.prompt(turns[:last])
        before = "".join(segment.text for segment in history)
        if first == last:
            return history, [self.answer(before, turns[: last + 1])]
        start = self.prompt(turns[:first])
        if history[: len(start) - 1] != start[:-1] or len(history) <= len(start):
            raise PalateError(
                "the chat template rewrites earlier turns, so an answer of several turns cannot be laid out. "
                "Keep only its last turn."
            )
        return start, [*history[len(start) :], self.answer(before, turns[: last + 1])]


class PlainTurns:
    """Conversations without a template: the turns' texts, one behind the other. The same calls as `Chat`."""

    def prompt(self, turns: Sequence[Message]) -> list[Segment]:
        """The turns; what the assistant said before is a segment of its own and ends without a mark."""
        return [Segment(t.content, answer=i > 0 and t.role == "assistant", ended=True) for i, t in enumerate(turns)]

    def whole(self, prompt: Sequence[Message], completion: Sequence[Message]) -> tuple[list[Segment], list[Segment]]:
        """(segments of the prompt, segments of the completion); turns after the last answer are left out."""
        spoken = [i for i, turn in enumerate(completion) if turn.role == "assistant"]
        if not spoken:
            raise PalateError("the answer holds no assistant turn. Mend or drop the row.")
        *earlier, last = completion[: spoken[-1] + 1]
        more = [Segment(t.content, answer=t.role == "assistant", ended=True) for t in earlier]
        first = next((i for i, segment in enumerate(more) if segment.answer), len(more))
        return [*self.prompt(prompt), *more[:first]], [*more[first:], Segment(last.content, answer=True)]


def rewrites_history(segments: Sequence[Segment], turns: Sequence[Message]) -> bool:
    """Whether earlier answers could not be told apart in a prompt that has some."""
    spoken = any(t.role == "assistant" for t in turns[1:])
    return spoken and not any(s.answer for s in segments)
