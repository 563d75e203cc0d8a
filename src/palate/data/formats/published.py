"""Formats of published feedback sets: hh-rlhf, summarize-from-feedback, lm-human-preferences, Arena, RLHF-V."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from palate.data.formats.row import Row, shown
from palate.data.formats.shape import alike, ends_with_assistant, implicit_prompt, shared_turns
from palate.data.formats.trl import pair
from palate.data.queries import NEWS_FORMAT, STORED_PAD, TLDR_FORMAT, fill
from palate.records import Demonstration, Message, Prompt, Ranking, Record, Text, preference

_SPEAKER = re.compile(r"(?:\A|\n\n)(Human|Assistant):")
_SAMPLE = re.compile(r"sample(\d+)\Z")
_WINNERS = {"model_a": (0, 1), "a": (0, 1), "model_b": (1, 0), "b": (1, 0)}
_TIES = {"tie", "tie (bothbad)", "both_bad", "bothbad"}


def is_transcript(value: Any) -> bool:
    """Whether a text is a dialogue as hh-rlhf writes it."""
    return isinstance(value, str) and re.match(r"\s*Human:", value) is not None and "\n\nAssistant:" in value


def transcripts(row: Row) -> Iterator[Record]:
    """{chosen, rejected} as "\\n\\nHuman: … \\n\\nAssistant: …"; both must share all but the last turn."""
    chosen, rejected = (_dialogue(row, field) for field in ("chosen", "rejected"))
    for turns in (chosen, rejected):
        ends_with_assistant(row, turns)
    prompt, left, right = shared_turns(chosen, rejected)
    if len(left) != 1 or len(right) != 1:
        at = len(prompt) + 1
        move = "Both must share all but the last turn; remove the row or read it as chosen/rejected conversations"
        raise row.fault("chosen/rejected", f"the dialogues part before their last turn (at turn {at})", move)
    yield pair(row, prompt, left, right, "chosen", "rejected")


def _dialogue(row: Row, field: str) -> tuple[Message, ...]:
    """The turns of a transcript; the same speaker twice in a row is one turn."""
    pieces = _SPEAKER.split(row.text(field).strip("\n"))
    turns: list[Message] = []
    for speaker, said in zip(pieces[1::2], pieces[2::2], strict=True):
        role = "user" if speaker == "Human" else "assistant"
        if turns and turns[-1].role == role:
            said = f"{turns.pop().content}\n\n{said.strip()}"
        turns.append(Message(role, said.strip()))
    if pieces[0].strip() or not turns:
        start = shown(row.text(field)[:40])
        move = 'Write turns as "\\n\\nHuman: …" and "\\n\\nAssistant: …"'
        raise row.fault(field, f"a transcript begins with Human:, this one with {start}", move)
    return tuple(turns)


def summary_comparison(row: Row) -> Iterator[Record]:
    """{info, summaries: [two], choice}: a labeller's choice between two summaries of a post or an article."""
    info = row.mapping("info")
    summaries = [Row({"summary": s}, row.place).mapping("summary") for s in row.items("summaries")]
    if len(summaries) != 2:
        raise row.fault("summaries", f"expected two, got {len(summaries)}", "Remove the row")
    texts = [row.string(s.get("text"), f"summaries[{i}].text") for i, s in enumerate(summaries)]
    best = row.index("choice", 2)
    policies = {"policies": [s.get("policy") for s in (summaries[best], summaries[1 - best])]}
    more = {**row.rest("summaries", "choice"), **policies}
    yield preference(_query(row, info), texts[best], texts[1 - best], columns=more)


def tldr_post(row: Row) -> Iterator[Record]:
    """{subreddit, title, post[, summary]}: a post with its human summary, or a post to summarise."""
    query = _query(row, row.columns)
    more = row.rest("summary")
    if row.has("summary"):
        yield Demonstration(query, more, completion=row.text("summary"))
    else:
        yield Prompt(query, more)


def tldr_label(row: Row) -> Iterator[Record]:
    """{prompt, label: text}: a finished query and the human reference, as the filtered TL;DR set has them."""
    yield Demonstration(row.text("prompt"), row.rest("prompt"), completion=row.text("label"))


def _query(row: Row, info: Mapping[str, Any]) -> str:
    template = NEWS_FORMAT if info.get("article") and not info.get("post") else TLDR_FORMAT
    return fill(template, {f: row.string(info.get(f), f) for f in re.findall(r"\{(\w+)\}", template)})


def human_preferences(row: Row) -> Iterator[Record]:
    """{query, sample0 … sampleK, best}: the 2019 labels; the texts may be stored as GPT-2 token ids.

    Stored ids keep their places in `columns` (`prompt_tokens`, `completion_tokens`) and are trained on as they are.
    """
    samples = sorted((f for f in row.columns if _SAMPLE.match(str(f))), key=lambda f: int(f[6:]))
    best = row.index("best", len(samples))
    ranks = tuple(int(i != best) for i in range(len(samples)))
    more = row.rest("query", "best", *samples)
    if isinstance(row.get("query"), str):
        texts = tuple(row.text(s) for s in samples)
        yield Ranking(row.text("query"), more, completions=texts, ranks=ranks)
        return
    query, *answers = (_stored(row, field) for field in ("query", *samples))
    more |= {"prompt_tokens": query, "completion_tokens": answers}
    spelled = tuple(_spelled(a) for a in answers)
    yield Ranking(_spelled(query), more, completions=spelled, ranks=ranks)


def _stored(row: Row, field: str) -> list[int]:
    """Stored token ids without the pads: masks are carried, so padding is ours to choose."""
    ids = [Row({field: t}, row.place).index(field, 2**31) for t in row.items(field)]
    return [t for t in ids if t != STORED_PAD]


def _spelled(tokens: list[int]) -> str:
    return " ".join(f"#{t}" for t in tokens)


def arena(row: Row) -> Iterator[Record]:
    """{model_a, model_b, winner} with conversation_a/b, or with prompt and response_a/b: a vote between two models."""
    winner = row.text("winner").strip().lower()
    if winner not in _WINNERS and winner not in _TIES:
        known = ", ".join([*_WINNERS, *sorted(_TIES)])
        raise row.fault("winner", f"expected a side or a tie, got {winner[:60]!r}", f"Known: {known}")
    prompt, answers, used = _arena_texts(row)
    more = row.rest("winner", *used)
    yield Ranking(prompt, more, completions=answers, ranks=_WINNERS.get(winner, (0, 0)))


def _arena_texts(row: Row) -> tuple[Text, tuple[Text, ...], tuple[str, ...]]:
    if row.has("conversation_a", "conversation_b"):
        used = ("conversation_a", "conversation_b")
        prompt, *answers = implicit_prompt(row, *(row.turns(f) for f in used))
        return prompt, tuple(answers), used
    field = row.first("prompt", "question", "instruction")
    used = (field, "response_a", "response_b")
    if not row.has(*used):
        move = "Join it with the answers: conversation_a, conversation_b, or prompt, response_a, response_b"
        raise row.fault("winner", "this file holds votes without the answers", move)
    prompt, answers = alike(row, row.said(field), [row.said("response_a"), row.said("response_b")])
    return prompt, tuple(answers), used


def picture_preference(row: Row) -> Iterator[Record]:
    """{image, question, chosen, rejected} or {image, text: the same as JSON}: RLHF-V; only the text is read."""
    fields = row.columns if row.has("question") else row.mapping("text")
    inner = Row(fields, row.place)
    more = row.rest("text", "question", "chosen", "rejected", "image", "images", "image_path")
    yield preference(inner.text("question"), inner.text("chosen"), inner.text("rejected"), columns=more)
