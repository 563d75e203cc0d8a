"""DDPO: marks of corrections from a difference and from annotation, golden numbers, real runs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from palate import losses
from palate.algorithms import ddpo
from palate.batches import Pairs, Tokens
from palate.cast import Cast
from palate.data.encode import Encoding, TokenRow
from palate.data.encode_pairs import changed, encode_corrections, encode_replacements
from palate.metrics import lookup
from palate.models.tokenizer import train_bpe
from palate.records import Correction, Message, Unpaired, preference
from palate.settings import PalateError
from tests.algorithms.resuming import goes_on
from tests.laws import test_microbatch_law as law
from tests.losses.golden import part_of
from tests.stages import tiny_runs as tiny

TOKENIZER = train_bpe(["a red bowl on the table, two cats beside it"] * 4, 300)
PROMPT = "What is there?"
BEFORE, AFTER = "a red bowl on the table, two cats beside it", "a red cup on the table, two cats beside it"


def answer(ids: list[int]) -> TokenRow:
    """A row of a prompt of two tokens and this answer."""
    return TokenRow([1, 2, *ids], [False, False, *[True] * len(ids)])


def marked(marks: list[bool]) -> list[int]:
    return [t - 2 for t, mark in enumerate(marks) if mark]


# --- marks -----------------------------------------------------------------------------------------------------------


def test_golden_marks_of_a_difference() -> None:
    case = part_of("ddpo_rlhfv")
    rows, expected = (answer(case["chosen_ids"]), answer(case["rejected_ids"])), case["expected"]
    good, bad = changed(*rows)
    assert (marked(good), marked(bad)) == (expected["changed_chosen"], expected["changed_rejected"])
    good, bad = changed(*rows, insertions=False)
    assert marked(good) == expected["released_rule_changed_chosen"]
    assert marked(bad) == expected["released_rule_changed_rejected"]


@pytest.mark.parametrize(
    ("good", "bad", "marks"),
    [
        ([1, 2, 3, 9, 4, 5, 6], [1, 2, 3, 4, 5, 6], ([3], [])),
        ([1, 2, 3, 7, 8, 9, 4, 5, 6], [1, 2, 3, 0, 8, 0, 4, 5, 6], ([3, 4, 5], [3, 4, 5])),  # one token alone is chance
        (
            [1, 2, 3, 7, 8, 9, 7, 4, 5, 6],
            [1, 2, 3, 0, 8, 9, 0, 4, 5, 6],
            ([3, 4, 5, 6], [3, 4, 5, 6]),
        ),  # and so are two
        ([7, 1, 2, 3], [8, 9, 1, 2, 3], ([0], [0, 1])),
        ([1, 2], [1, 3], ([0, 1], [0, 1])),
        ([1, 2, 3, 4], [1, 2, 3, 4], ([], [])),
    ],
)
def test_three_tokens_in_a_row_are_unchanged_and_fewer_are_not(good, bad, marks) -> None:
    found = changed(answer(good), answer(bad))
    assert tuple(marked(one) for one in found) == marks


def said(row: TokenRow, marks: list[bool]) -> str:
    return TOKENIZER.decode([t for t, mark in zip(row.tokens, marks, strict=True) if mark], skip_special=False)


@pytest.mark.parametrize("talk", [False, True])
@pytest.mark.parametrize(("bits", "leading"), [("cup", False), ("two cats", False), ("cup", True), ("é☕", False)])
def test_annotated_characters_become_tokens(talk: bool, bits: str, leading: bool) -> None:
    text = AFTER.replace("beside", "é☕")
    start = text.index(bits)
    prompt, original, corrected = PROMPT, BEFORE, text
    if talk:
        prompt, original, corrected = (
            (Message(role, x),) for role, x in (("user", PROMPT), ("assistant", BEFORE), ("assistant", text))
        )
    record = Correction(prompt, original=original, corrected=corrected, spans=((start, start + len(bits)),))
    (row,) = encode_corrections([record], TOKENIZER, Encoding(leading_space=leading)).rows
    assert row.corrected is not None
    found = said(row.chosen, row.corrected[0])
    assert bits in found
    assert len(found) <= len(bits) + 6  # no more than the tokens that the span touches
    (plain,) = encode_corrections([replace(record, spans=())], TOKENIZER, Encoding(leading_space=leading)).rows
    assert plain.corrected is not None
    assert row.corrected[1] == plain.corrected[1]


def test_a_cut_row_keeps_the_marks_of_what_is_left_of_it() -> None:
    record = Correction(PROMPT, original=BEFORE, corrected=AFTER, spans=((2, 5), (30, 34)))
    (whole,) = encode_corrections([record], TOKENIZER, Encoding()).rows
    length = len(whole.chosen.tokens) - 6
    (cut,) = encode_corrections([record], TOKENIZER, Encoding(max_length=length)).rows
    assert whole.corrected is not None
    assert cut.corrected is not None
    assert cut.corrected[0] == whole.corrected[0][:length]


def test_spans_outside_the_text_and_other_records_are_named() -> None:
    bad = Correction(PROMPT, original=BEFORE, corrected="short", spans=((0, 2), (3, 9)))
    with pytest.raises(PalateError, match=r"record 1 \('What is there\?'\): spans\[1\]: it runs from 3 to 9, outside"):
        encode_corrections([replace(bad, spans=()), bad], TOKENIZER, Encoding())
    with pytest.raises(PalateError, match="expected corrected answers, got an unpaired record"):
        encode_corrections([Unpaired("p", completion="a")], TOKENIZER, Encoding())


def test_a_pair_is_a_correction_of_its_rejected_answer() -> None:
    (pair,) = encode_replacements([preference(PROMPT, AFTER, BEFORE)], TOKENIZER, Encoding()).rows
    (told,) = encode_replacements([Correction(PROMPT, original=BEFORE, corrected=AFTER)], TOKENIZER, Encoding()).rows
    assert pair == told
    assert pair.corrected is not None
    assert "bowl" in said(pair.rejected, pair.corrected[1])


# --- the loss --------------------------------------------------------------------------------------------------------


class _Told(Cast):
    """A cast whose policy says what the test says it says."""

    def __init__(self, logp_RT: Tensor) -> None:
        super().__init__({})
        self.said_RT = logp_RT

    def logp(self, role: str, batch: Tokens, *_: object, **__: object) -> Tensor:  # type: ignore[override]
        return self.said_RT


def golden_pair(insertions: bool = True) -> tuple[_Told, Pairs]:
    """The golden case as one pair behind a prompt of two tokens, garbage in masked cells."""
    case = part_of("ddpo_rlhfv")
    rows = answer(case["chosen_ids"]), answer(case["rejected_ids"])
    action, corrected = torch.zeros(1, 2, 16).bool(), torch.zeros(1, 2, 16).bool()
    numbers = {"policy": torch.full((1, 2, 16), -77.0), "ref": torch.full((1, 2, 16), 55.0)}
    for k, (row, marks) in enumerate(zip(rows, changed(*rows, insertions=insertions), strict=True)):
        action[0, k, : len(row.trained)] = torch.tensor(row.trained)
        corrected[0, k, : len(marks)] = torch.tensor(marks)
        for who, values in numbers.items():
            values[0, k, 2 : len(marks)] = torch.tensor(case[f"{who}_{('chosen', 'rejected')[k]}_tok"])
    nothing = torch.zeros(1, 2, 16)
    batch = Pairs(nothing.long(), nothing.bool(), action, torch.ones(1), torch.zeros(1), corrected, numbers["ref"])
    return _Told(numbers["policy"].flatten(0, 1)), batch


def value(cast: Cast, batch: Pairs, **settings: Any) -> float:
    return float(ddpo.Algorithm(**settings).loss(cast, batch).terms["loss"].total)


def test_golden_numbers_come_out_of_the_algorithm() -> None:
    expected = part_of("ddpo_rlhfv")["expected"]
    cast, batch = golden_pair()
    assert value(cast, batch) == pytest.approx(expected["paper_gamma5_beta0p5"]["loss"], abs=1e-6)
    plain = expected["gamma1_equals_length_normalised_dpo"]["loss"]
    assert value(cast, batch, gamma=1.0) == pytest.approx(plain, abs=1e-6)
    released = {"gamma": 1.1, "beta": 0.1, "normalise": False, "insertions": False}
    found = value(*golden_pair(insertions=False), **released)
    assert found == pytest.approx(expected["released_gamma1p1_beta0p1_sum"]["loss"], abs=1e-6)
    assert abs(value(cast, batch, **released) - found) > 1e-4  # so the rule of insertions is what makes the difference
    same = replace(batch, ref_logp_BKT=cast.said_RT.unflatten(0, (1, 2)))
    assert value(cast, same) == pytest.approx(expected["identical_pair_must_give"], abs=1e-6)


def pairs_case(layout: str = "separate") -> tuple[Cast, Pairs]:
    """Three pairs with marks, and a policy that has left its reference."""
    cast = law.cast_for(("policy", "reference"), layout)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in cast.parameters(("policy",)).values():
            parameter.add_(0.02 * torch.randn(parameter.shape))
    tokens, real, action = (x.unflatten(0, (3, 2)) for x in law.rows(5, 14, 9, 4, 11, 7))
    marks = action & (torch.arange(14) % 3 == 1)
    return cast, Pairs(tokens, real, action, torch.ones(3), torch.zeros(3), marks)


@torch.no_grad()
def ready(cast: Cast, batch: Pairs) -> Pairs:
    return ddpo.Algorithm().prepare(cast, batch)


def test_gamma_1_is_dpo_on_log_probabilities_per_token() -> None:
    cast, batch = pairs_case()
    known = ready(cast, batch)
    assert known.ref_logp_BKT is not None
    with torch.no_grad():
        logp = cast.logp("policy", batch.answers()).unflatten(0, (3, 2))
        both = [losses.answer_logp(x, batch.action_BKT, average=True) for x in (logp, known.ref_logp_BKT)]
        oracle = losses.dpo(both[0][:, 0], both[0][:, 1], both[1][:, 0], both[1][:, 1], 0.3)
        assert value(cast, known, gamma=1.0, beta=0.3) == pytest.approx(float(oracle.sum()), abs=1e-6)
        assert abs(value(cast, known, gamma=3.0, beta=0.3) - float(oracle.sum())) > 1e-5


@pytest.mark.parametrize("layout", ["separate", "adapters"])
def test_laws_of_micro_batches_and_padding(layout: str) -> None:
    cast, batch = pairs_case(layout)
    algorithm, known = ddpo.Algorithm(), ready(cast, batch)
    whole = law.gradients(cast, known, algorithm, 3)
    assert any(g.abs().max() > 0 for g in whole.values())
    for most in (1, 2, *law.BY_TOKENS):
        assert law.distance(whole, law.gradients(cast, known, algorithm, most)) < 1e-6
    other = law.widened(replace(batch, tokens_BKT=torch.where(batch.real_BKT, batch.tokens_BKT, 17)))
    spoiled = ready(cast, other)
    assert spoiled.ref_logp_BKT is not None
    garbage = spoiled.ref_logp_BKT.masked_fill(~spoiled.action_BKT, float("nan"))
    found = law.gradients(cast, replace(spoiled, ref_logp_BKT=garbage), algorithm, 3)
    assert law.distance(whole, found) < 2e-6


# --- real runs --------------------------------------------------------------------------------------------------------


def write_corrections(path: Path, **more: Any) -> Path:
    rows = [
        {"prompt": p, "original": " odd or so it is", "corrected": " even or so it is", **more} for p in tiny.PROMPTS
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def stage(model: Path, data: Any, **changes: Any) -> dict[str, Any]:
    return {**tiny.sft(model, data), "name": "ddpo", "algorithm": {"kind": "ddpo"}, **changes}


def test_a_run_learns_and_goes_on_after_a_stop_bit_for_bit(tmp_path: Path) -> None:
    model, data = tiny.save_model(tmp_path / "start"), write_corrections(tmp_path / "rows.jsonl")
    rows = goes_on(tmp_path, ddpo.Algorithm, stage(model, str(data)), 3)
    assert rows[0]["loss"] == pytest.approx(0.6931472, abs=1e-5)
    assert rows[-1]["loss"] < 0.69
    assert rows[-1]["rewards/accuracies"] == 1.0
    assert all(lookup(name) for row in rows for name in row if name != "step")
    known = tiny.run(tmp_path / "known", stage(model, str(data), precompute_reference=True)) / "1-ddpo"
    again = tiny.lines(known / "metrics.jsonl")
    assert [row["loss"] for row in again] == pytest.approx([row["loss"] for row in rows], abs=1e-5)


def test_a_run_names_a_span_outside_the_text(tmp_path: Path) -> None:
    model = tiny.save_model(tmp_path / "start")
    data = write_corrections(tmp_path / "rows.jsonl", spans=[[1, 5], [8, 90]])
    with pytest.raises(PalateError, match=r"record 0 .*spans\[1\]: it runs from 8 to 90, outside"):
        tiny.run(tmp_path, stage(model, str(data)))
