"""Encoding: records to token rows, with the mask of what is trained."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Generic, TypeVar

from palate.data.encoding import Encoding as Encoding
from palate.data.queries import cut_sentence, query_fields, tldr_query
from palate.data.segments import Chat, PlainTurns, Segment, Speaker, rewrites_history
from palate.records import Demonstration, Message, Prompt, Ranking, Record, Text, fingerprint, text_of
from palate.settings import PalateError


@dataclass(frozen=True)
class TokenRow:
    """One row; `trained[t]` tells whether token t is an answer's (or else learnt from). Token 0 never is."""

    tokens: list[int]
    trained: list[bool]


@dataclass(frozen=True)
class PromptRow:
    """A prompt to sample answers for. `key` names its random numbers; `text` is what rewards and people read.

    `said` is the prompt in record form, where turns of a conversation stay turns.
    """

    tokens: list[int]
    key: str
    text: str
    columns: Mapping[str, Any]
    said: Text = ""


@dataclass(frozen=True)
class RankedRow:
    """K answers to one prompt as whole rows, trained on their answer tokens; smaller ranks are better.

    `probability` is how likely the better one of two answers is the better one, where a judge said so.
    """

    prompt_key: str
    rows: list[TokenRow]
    ranks: list[int]
    margin: float | None
    probability: float | None = None


R = TypeVar("R")


@dataclass(frozen=True)
class Encoded(Generic[R]):
    """Rows, and how many records were left out for which reason."""

    rows: list[R]
    left_out: Mapping[str, int]

    @property
    def summary(self) -> str:
        """One line about what was left out; empty when nothing was."""
        reasons = ", ".join(f"{count} {reason}" for reason, count in self.left_out.items())
        total = len(self.rows) + sum(self.left_out.values())
        return f"left out {sum(self.left_out.values())} of {total} records: {reasons}" if reasons else ""


class LeftOut(Exception):
    """A record that the settings say to drop; the message is the reason."""


def encode_demonstrations(
    records: Iterable[Record], speaker: Speaker, encoding: Encoding, context: int | None = None
) -> Encoded[TokenRow]:
    """Rows for supervised fine-tuning. `context` is the model's longest sequence."""
    return each(records, Encoder(speaker, encoding, context).demonstration)


def encode_rankings(
    records: Iterable[Record], speaker: Speaker, encoding: Encoding, context: int | None = None
) -> Encoded[RankedRow]:
    """Ranked rows for reward models and preference methods; only the answers' tokens are marked."""
    encoder = Encoder(speaker, encoding, context)
    return each(records, encoder.ranking)


def encode_prompts(
    records: Iterable[Record], speaker: Speaker, encoding: Encoding, context: int | None = None
) -> Encoded[PromptRow]:
    """Prompts of any records. `context` is what the model can hold less the longest answer.

    A prompt that comes again gets another key, so its answers are drawn anew.
    """
    encoder = Encoder(speaker, encoding, context)
    encoder.longest_prompt = _least(encoding.max_prompt_length, encoder.longest)
    seen: Counter[str] = Counter()

    def one(record: Record) -> PromptRow:
        tokens, text = encoder.prompt(record)
        name = fingerprint(tokens)
        seen[name] += 1
        key = name if seen[name] == 1 else f"{name}#{seen[name]}"
        return PromptRow(tokens, key, text, record.columns, record.prompt or text)

    return each(records, one)


def trained_counts(
    records: Iterable[Record], speaker: Speaker, encoding: Encoding, context: int | None = None
) -> list[int]:
    """Trained tokens of each demonstration or ranking (of its poorest answer); 0 where it would be left out."""
    encoder = Encoder(speaker, encoding, context)
    counts: list[int] = []
    for record in records:
        try:
            rows = encoder.ranking(record).rows if isinstance(record, Ranking) else [encoder.demonstration(record)]
            counts.append(min(sum(row.trained) for row in rows))
        except (LeftOut, PalateError):
            counts.append(0)
    return counts


def each(records: Iterable[Record], encode: Callable[[Record], R]) -> Encoded[R]:
    """What `encode` makes of every record; those left out are counted. PalateError names the record at fault."""
    rows: list[R] = []
    left_out: Counter[str] = Counter()
    for number, record in enumerate(records):
        try:
            rows.append(encode(record))
        except LeftOut as reason:
            left_out[str(reason)] += 1
        except PalateError as fault:
            excerpt = text_of(record.prompt)[:40] or text_of(getattr(record, "completion", ""))[:40]
            raise PalateError(f"record {number} ({excerpt!r}): {fault}") from None
    if not rows:
        reasons = ", ".join(f"{count} {reason}" for reason, count in left_out.items()) or "there were none"
        raise PalateError(f"no record is left to train on: {reasons}. Look with `palate data check`.")
    return Encoded(rows, dict(left_out))


class Encoder:
    """One tokenizer and one way of encoding."""

    def __init__(self, speaker: Speaker, encoding: Encoding, context: int | None) -> None:
        self.speaker = speaker
        self.encode = lru_cache(maxsize=256)(self._whole)  # the K answers of a ranking share their prompt
        self.encoding = encoding
        self.longest = _least(encoding.max_length, context)
        self.longest_prompt = encoding.max_prompt_length
        self.begins = encoding.bos if encoding.bos is not None else begins_by_itself(speaker)
        self._chat: Chat | PlainTurns | None = PlainTurns() if encoding.turns == "plain" else None
        if encoding.bos and speaker.bos is None:
            raise PalateError("encoding.bos: this tokenizer has no begin token. Leave the setting out.")
        if encoding.eos and speaker.eos is None:
            raise PalateError(
                "tokenizer: it has no end token, so no model could learn to stop. Give it one, or set eos: false."
            )

    def _whole(self, text: str) -> list[int]:
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            raise PalateError("a text holds half of a character (a lone surrogate). Write it as UTF-8 again.") from None
        return self.speaker.encode(text)

    @property
    def chat(self) -> Chat | PlainTurns:
        if self._chat is None:
            self._chat = Chat.of(self.speaker)
        return self._chat

    def demonstration(self, record: Record) -> TokenRow:
        """A demonstration as a row, trained as `loss_on` says."""
        if not isinstance(record, Demonstration):
            raise PalateError(f"expected a demonstration, got {called(record)}. Name data of another format.")
        before, after = self._segments(record.prompt, record.completion)
        if self.encoding.loss_on == "assistant" and not isinstance(record.prompt, str):
            self._check_history(before, record.prompt)
        tokens, spoken = self._prompt_ids(before, record.prompt)
        count, final = len(tokens), after[-1]
        if self.encoding.loss_on == "assistant":
            return self._row(tokens, spoken, after, lambda segment: segment.answer)
        if self.encoding.loss_on == "last":
            return self._row(tokens, [False] * count, after, lambda segment: segment is final)
        return self._row(tokens, [True] * count, after, lambda segment: True)

    def ranking(self, record: Record) -> RankedRow:
        """A ranking as rows that share the prompt's ids."""
        if not isinstance(record, Ranking):
            raise PalateError(f"expected ranked answers, got {called(record)}. Name data of another format.")
        if "completion_tokens" in record.columns:
            stored = self._framed(record.columns["prompt_tokens"])
            answers = [self._stored(stored, ids) for ids in record.columns["completion_tokens"]]
        else:
            answers = [self.answer(record.prompt, c) for c in record.completions]
        return RankedRow(record.key, answers, list(record.ranks), record.margin, record.probability)

    def answer(self, prompt: Text, completion: Text) -> TokenRow:
        """One answer behind its prompt, only its own tokens marked."""
        before, after = self._segments(prompt, completion)
        tokens, _ = self._prompt_ids(before, prompt)
        return self._row(tokens, [False] * len(tokens), after, lambda segment: segment.answer)

    def prompt(self, record: Prompt) -> tuple[list[int], str]:
        """(ids, readable text) of a record's prompt, the same ids its training row begins with."""
        if "prompt_tokens" in record.columns:
            tokens = self._framed(self._known(record.columns["prompt_tokens"]))
            return self._fit_prompt(tokens, "")[0], self.speaker.decode(tokens)
        if record.prompt:
            segments = [Segment(record.prompt)] if isinstance(record.prompt, str) else self.chat.prompt(record.prompt)
            tokens, _ = self._prompt_ids(segments, record.prompt)
            cut = self.encoding.long_prompts == "cut_post" and isinstance(record.prompt, str)
            return tokens, self.speaker.decode(tokens) if cut else text_of(record.prompt)
        if self.encoding.query_length is None or not isinstance(record, Demonstration):
            raise PalateError("there is no prompt. Set query_length to make prompts of the beginnings of plain texts.")
        tokens = self._query(text_of(record.completion), self.encoding.query_length)
        return tokens, self.speaker.decode(tokens)

    def _query(self, text: str, length: int) -> list[int]:
        start, end = (self._mark(spelled) for spelled in (self.encoding.query_start, self.encoding.query_end))
        kept = cut_sentence(self.encode(text), length, start, end)
        if not kept:
            raise LeftOut("texts without a place to begin or end a prompt")
        return self._fit_prompt(self._begun(self._framed(kept)), "")[0]

    def _framed(self, query: list[int]) -> list[int]:
        """A query's tokens between those of the two sides of `query_format`."""
        before, _, after = self.encoding.query_format.partition("{query}")
        return [*self.encode(before), *query, *self.encode(after)]

    def _mark(self, spelled: str | None) -> int | None:
        if spelled is None:
            return None
        ids = self.encode(spelled)
        if len(ids) != 1:
            raise PalateError(f"query_start/query_end: {spelled!r} is {len(ids)} tokens. Name a text of one token.")
        return ids[0]

    def _segments(self, prompt: Text, completion: Text) -> tuple[list[Segment], list[Segment]]:
        if not isinstance(prompt, str) and not isinstance(completion, str):
            return self.chat.whole(prompt, completion)
        said = text_of(completion)
        if self.encoding.leading_space and not said[:1].isspace():
            said = f" {said}"
        return ([Segment(text_of(prompt))] if prompt else []), [Segment(said, answer=True)]

    def _check_history(self, segments: list[Segment], turns: Sequence[Message]) -> None:
        if rewrites_history(segments, turns):
            raise PalateError(
                "the chat template rewrites earlier turns, so they cannot be told apart. Set loss_on: last."
            )

    def _prompt_ids(self, segments: Sequence[Segment], prompt: Text) -> tuple[list[int], list[bool]]:
        """The ids of a prompt with the marks of earlier answers, begun as the tokenizer does, cut to length."""
        tokens: list[int] = []
        trained: list[bool] = []
        for segment in segments:
            ids = self._ids(segment, first=not tokens)
            tokens += ids
            trained += [segment.answer] * len(ids)
        begun = self._begun(tokens)
        trained = [False] * (len(begun) - len(tokens)) + trained[max(0, len(tokens) - len(begun)) :]
        kept, dropped = self._fit_prompt(begun, prompt if isinstance(prompt, str) else "")
        if dropped is None:
            return kept, [False] * len(kept)
        return kept, [trained[i] for i in dropped]

    def _ids(self, segment: Segment, first: bool) -> list[int]:
        ids = self.encode(segment.text)
        if not first and ids[:1] == [self.speaker.bos] and self.speaker.bos != self.speaker.eos:
            ids = ids[1:]
        closes = segment.answer and not segment.ended and self.encoding.eos
        if closes and self.speaker.eos is not None and ids[-1:] != [self.speaker.eos]:
            ids = [*ids, self.speaker.eos]
        return ids

    def _begun(self, tokens: list[int]) -> list[int]:
        """Tokens with the begin token once where it belongs; a row never begins with nothing."""
        bos = self.speaker.bos
        while bos is not None and tokens[:2] == [bos, bos]:
            tokens = tokens[1:]
        if not tokens:
            start = bos if bos is not None else self.speaker.eos
            if start is None:
                raise PalateError("the prompt is empty and the tokenizer has neither begin nor end token.")
            return [start]
        return [bos, *tokens] if self.begins and bos is not None and tokens[0] != bos else tokens

    def _fit_prompt(self, tokens: list[int], text: str) -> tuple[list[int], list[int] | None]:
        """(tokens cut to length, the places they had; None where the text was cut and tokenised again)."""
        limit = self.longest_prompt
        if limit is None or len(tokens) <= limit:
            return tokens, list(range(len(tokens)))
        how = self.encoding.long_prompts
        if how == "drop":
            raise LeftOut(f"prompts longer than {limit} tokens")
        if how == "cut_post" and (parts := query_fields(text)):
            fields, fmt, field = parts
            return tldr_query(fields, lambda t: self._begun(self.encode(t)), limit, fmt, field)[1], None
        if how in ("refuse", "cut_post"):
            raise PalateError(
                f"the prompt has {len(tokens)} tokens, {limit} fit. "
                "Set long_prompts to keep_end, keep_start or drop, or allow more."
            )
        bos = int(how == "keep_end" and tokens[0] == self.speaker.bos and limit > 1)
        end = range(len(tokens) - limit + bos, len(tokens))
        places = list(range(limit)) if how == "keep_start" else [*range(bos), *end]
        return [tokens[i] for i in places], places

    def _row(
        self, tokens: list[int], trained: list[bool], after: Sequence[Segment], marked: Callable[[Segment], bool]
    ) -> TokenRow:
        for segment in after:
            ids = self._ids(segment, first=False)
            tokens = tokens + ids
            trained = trained + [marked(segment)] * len(ids)
        return self._fit_row(tokens, [False, *trained[1:]])

    def _stored(self, prompt: list[int], answer: list[int]) -> TokenRow:
        tokens = self._known([*prompt, *answer])
        return self._fit_row(tokens, [False] * len(prompt) + [True] * len(answer))

    def _known(self, tokens: list[int]) -> list[int]:
        if max(tokens, default=0) >= self.speaker.size:
            raise PalateError(
                f"stored token {max(tokens)} is beyond this tokenizer's {self.speaker.size}. Use GPT-2's tokenizer."
            )
        return list(tokens)

    def _fit_row(self, tokens: list[int], trained: list[bool]) -> TokenRow:
        limit = self.longest
        if limit is not None and len(tokens) > limit:
            if self.encoding.long_rows == "refuse":
                raise PalateError(f"the row has {len(tokens)} tokens, {limit} fit. Set long_rows: cut or drop.")
            if self.encoding.long_rows == "drop":
                raise LeftOut(f"rows longer than {limit} tokens")
            tokens, trained = tokens[:limit], trained[:limit]
        if not any(trained):
            if self.encoding.untrained == "refuse":
                raise PalateError("no token of this row would be trained. Shorten the prompt or allow more tokens.")
            raise LeftOut("rows without a trained token")
        return TokenRow(tokens, trained)


def begins_by_itself(speaker: Speaker) -> bool:
    """Whether the tokenizer puts its begin token first when asked for special tokens: what it was pretrained with."""
    own = speaker.inner("", add_special_tokens=True)["input_ids"]
    return speaker.bos is not None and list(own[:1]) == [speaker.bos]


def _least(*limits: int | None) -> int | None:
    return min((limit for limit in limits if limit is not None), default=None)


def called(record: Record) -> str:
    """A record's kind in words, for an error."""
    name = type(record).__name__.lower()
    return "a prompt without an answer" if name == "prompt" else f"{'an' if name[0] in 'aeiou' else 'a'} {name} record"
