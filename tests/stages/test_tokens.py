"""tokens.jsonl: every number beside the token it speaks of, against an oracle written out for one row at a time."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer as Inner
from tokenizers import decoders, models
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from palate.algorithms import ppo
from palate.batches import Experience, Scored, without_shown
from palate.cast import Cast, Layout, assemble
from palate.data.encode import PromptRow
from palate.engines.engine import Sampling
from palate.engines.local import LocalEngine
from palate.models.make import Make, make
from palate.models.tokenizer import Tokenizer, train_bpe
from palate.randomness import key
from palate.stages import _tokens
from palate.tracking import JsonLines

TEXTS = ["The soup is warm and the bread is old.", "A sour cake, they said. They said it twice."]
SIZES = Make(architecture="gpt2", hidden_size=32, layers=2, heads=2, vocabulary=300, context=64)
PROMPTS = ("The soup", "A", "They said it")
BETA, GAMMA, LAMBDA, TEMPERATURE = 0.2, 0.97, 0.9, 0.7


def rollout(dense: bool, limit: int | None) -> tuple[Cast, Scored, Tokenizer]:
    """Four roles on weights of their own, the reference moved away, and six answers with scores."""
    start = make(SIZES, TEXTS, 3)
    layout = Layout(kind="separate", value_init="random")
    seats = assemble(layout, start, ("policy", "reference", "value"), 5)
    with torch.no_grad():
        for number, parameter in enumerate(seats.seat("reference").trunk.parameters()):
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)))
    engine = LocalEngine(
        seats.seat("policy").trunk, start.tokenizer, Sampling(temperature=TEMPERATURE, max_new_tokens=9)
    )
    prompts = [start.tokenizer.encode(text) for text in PROMPTS]
    rollouts = replace(engine.generate(prompts, [key("tokens", row) for row in range(6)]), limit=limit)
    given = torch.zeros(rollouts.tokens_BT.shape)
    if dense:
        given = torch.randn(given.shape, generator=torch.Generator().manual_seed(9)) * rollouts.action_BT
    scores = torch.tensor([1.3, -0.7, 0.0, 2.1, 0.4, -1.9])
    return seats, Scored(rollouts, scores, given, {"taste": scores * 2}, {"kl_coef": BETA}), start.tokenizer


@torch.no_grad()
def learnt(position: Any, dense: bool, limit: int | None) -> tuple[Cast, Scored, Experience, list[dict[str, Any]]]:
    seats, scored, tokenizer = rollout(dense, limit)
    algorithm = ppo.Algorithm(score_position=position, whiten_advantages=False, gamma=GAMMA, lam=LAMBDA)
    experience = algorithm.prepare(seats, scored)
    asked = [PromptRow(tokenizer.encode(text), text, text, {}) for text in PROMPTS]
    return seats, scored, experience, _tokens.table(experience, scored, asked, tokenizer, rows=6)


@torch.no_grad()
def logp_of(seats: Cast, role: str, ids: Tensor) -> list[float]:
    """log p of each token of one row given those before it, token by token; nothing for the first."""
    trunk = seats.seat(role).trunk
    found = [0.0]
    for t in range(1, len(ids)):
        before = ids[None, :t]
        logits = trunk.logits(trunk.hidden(before, torch.ones_like(before, dtype=torch.bool)))[0, -1] / TEMPERATURE
        found.append(float(logits.log_softmax(-1)[ids[t]]))
    return found


@torch.no_grad()
def value_before(seats: Cast, ids: Tensor) -> list[float]:
    """The value of the state before each place, the one behind the row included."""
    seat = seats.seat("value")
    assert seat.head is not None
    states = [ids[None, :t] for t in range(1, len(ids) + 1)]
    hidden = [seat.trunk.hidden(s, torch.ones_like(s, dtype=torch.bool))[:, -1] for s in states]
    return [0.0, *(float(seat.head(h)) for h in hidden)]


def oracle(seats: Cast, scored: Scored, row: int, behind: bool) -> dict[int, dict[str, float]]:
    """What each token of one answer must have, by its index."""
    rollouts = scored.rollouts
    ids = rollouts.tokens_BT[row][rollouts.real_BT[row]]
    places = rollouts.action_BT[row].nonzero()[:, 0].tolist()
    policy, reference = logp_of(seats, "policy", ids), logp_of(seats, "reference", ids)
    values = value_before(seats, ids)
    learning = [*places, places[-1] + 1] if behind else places
    found: dict[int, dict[str, float]] = {}
    for t in learning:
        said = t in places
        penalty = -BETA * (policy[t] - reference[t]) if said else 0.0
        score = float(scored.score_B[row]) if t == learning[-1] else 0.0
        given = float(scored.token_reward_BT[row, t]) if said else 0.0
        parts = {"kl_penalty": penalty, "score": score, "token_reward": given, "reward": penalty + score + given}
        found[t] = {**parts, "value": values[t]}
        if said:
            mine = {"old_logp": policy[t], "reference_logp": reference[t], "kl": policy[t] - reference[t]}
            found[t] |= {**mine, "sampled_logp": float(rollouts.logp_BT[row, t])}
    for t in learning:  # the definition: every later surprise, discounted
        surprises = (
            (GAMMA * LAMBDA) ** (s - t)
            * (found[s]["reward"] + GAMMA * found.get(s + 1, {"value": 0.0})["value"] - found[s]["value"])
            for s in learning
            if s >= t
        )
        advantage = sum(surprises)
        found[t]["return"] = advantage + found[t]["value"]
        if t in places:
            found[t]["advantage"] = advantage
    return found


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize(
    ("position", "limit", "behind"), [("last", None, False), ("after", None, True), ("after", 9, False)]
)
def test_each_token_has_its_own_numbers(position: str, limit: int | None, behind: bool, dense: bool) -> None:
    """The score lands on the last token, behind it, or (an answer of full length) on the last token again."""
    seats, scored, experience, table = learnt(position, dense, limit)
    for row, written in enumerate(table):
        expected = oracle(seats, scored, row, behind)
        tokens = {token["t"]: token for token in written["tokens"]}
        numbers = {t: {k: v for k, v in token.items() if k in _NUMBERS} for t, token in tokens.items()}
        assert {t: sorted(found) for t, found in numbers.items() if found} == {
            t: sorted(found) for t, found in expected.items()
        }
        for t, found in expected.items():
            assert numbers[t] == pytest.approx(found, abs=2e-5), (row, t)
        assert [t for t, token in tokens.items() if token.get("scored")] == [max(expected)]
        assert [t for t, token in tokens.items() if token.get("action_mask")] == _places(experience.action_BT[row])
        assert [t for t, token in tokens.items() if token.get("value_mask")] == _places(experience.value_mask_BT[row])
        assert ("id" in tokens[max(expected)]) is not behind
        assert written["score"] == pytest.approx(float(scored.score_B[row]))
        assert written["parts"] == {"taste": pytest.approx(2 * float(scored.score_B[row]))}


_NUMBERS = (
    "sampled_logp", "old_logp", "reference_logp", "kl", "value", "return", "advantage", "kl_penalty", "token_reward",
    "score", "reward",
)  # fmt: skip


def _places(mask_T: Tensor) -> list[int]:
    return mask_T.nonzero()[:, 0].tolist()


def test_the_numbers_on_disk_are_the_tensors_to_the_last_bit(tmp_path: Path) -> None:
    _, _, experience, table = learnt("after", True, None)
    log = JsonLines(tmp_path / "tokens.jsonl")
    log.append(1, table)
    own = {"old_logp": "logp_BT", "value": "value_BT", "advantage": "advantage_BT", "return": "returns_BT"}
    tensors = {name: getattr(experience, field) for name, field in own.items()} | dict(experience.shown_BT)
    seen = 0
    for row, written in enumerate(json.loads(line) for line in log.path.read_text().splitlines()):
        for token in written["tokens"]:
            for name in token.keys() & _NUMBERS:
                assert np.float32(token[name]) == tensors[name][row, token["t"]].numpy(), (row, token["t"], name)
                seen += 1
    assert seen > 500
    assert _tokens._exact(torch.tensor([0.1], dtype=torch.float64)) == [0.1]  # pyright: ignore[reportPrivateUsage]
    assert _tokens._exact(torch.tensor([0.1], dtype=torch.bfloat16)) == [0.100097656]  # pyright: ignore


def test_the_prompt_is_there_without_numbers_and_the_pieces_spell_the_row() -> None:
    _, scored, _, table = learnt("last", False, None)
    for row, written in enumerate(table):
        begin = _places(scored.rollouts.action_BT[row])[0]
        assert [sorted(token) for token in written["tokens"][:begin]] == [["id", "t", "text"]] * begin
        assert "".join(token["text"] for token in written["tokens"][:begin]) == PROMPTS[row // 2] == written["prompt"]
        ids = [token["id"] for token in written["tokens"]]
        assert ids == scored.rollouts.tokens_BT[row][scored.rollouts.real_BT[row]].tolist()


def test_what_an_algorithm_does_not_tell_is_absent() -> None:
    _, scored, experience, _ = learnt("last", False, None)
    silent = replace(without_shown(experience), value_mask_BT=torch.zeros_like(experience.value_mask_BT))
    [written] = _tokens.table(silent, scored, [PromptRow([5], "a", "a", {})] * 3, train_bpe(TEXTS, 300), rows=1)
    answer = [token for token in written["tokens"] if token.get("action_mask")]
    assert {name for token in answer for name in token} == {"t", "id", "text", "action_mask", "old_logp", "advantage"}


def test_shown_numbers_are_cut_and_picked_with_their_rows_and_put_down_before_the_step() -> None:
    _, _, experience, _ = learnt("after", False, None)
    picked = experience.select(torch.tensor([3, 2])).trimmed()
    width = picked.tokens_BT.shape[1]
    assert width < experience.tokens_BT.shape[1]
    assert torch.equal(picked.shown_BT["kl"], experience.shown_BT["kl"][[3, 2], :width])
    assert [part.shown_BT["kl"].shape[0] for part in experience.split(4)] == [4, 2]
    assert not without_shown(experience).shown_BT


def test_pieces_are_honest_about_bytes_specials_and_unknown_ids() -> None:
    bytewise = train_bpe(TEXTS, 300)
    assert [_tokens.piece(bytewise, i) for i in bytewise.encode("é\n")] == ["\\xc3", "\\xa9", "\n"]
    assert _tokens.piece(bytewise, bytewise.end) == "<eos>"
    assert _tokens.piece(bytewise, 4096) == "<4096>"
    assert "".join(_tokens.piece(bytewise, i) for i in bytewise.encode(TEXTS[0])) == TEXTS[0]


def test_a_vocabulary_that_marks_spaces_keeps_them() -> None:
    """A decoder alone would drop the space of a single piece."""
    words = {"<unk>": 0, "▁soup": 1, "é": 2}
    inner = Inner(models.WordLevel(words, unk_token="<unk>"))
    inner.decoder = decoders.Metaspace()
    tokenizer = Tokenizer(PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>"))
    assert tokenizer.decode([1]) == "soup"
    assert [_tokens.piece(tokenizer, i) for i in (1, 2)] == [" soup", "é"]
