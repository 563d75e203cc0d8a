"""The scripted engine: the given answers as rollouts."""

from __future__ import annotations

import pytest

from palate.engines.engine import stop_reasons
from palate.engines.scripted import ScriptedEngine
from palate.models.tokenizer import train_bpe
from palate.settings import PalateError

TOKENIZER = train_bpe(["yes no maybe"], 270)


def test_texts_become_finished_answers_in_order() -> None:
    asked = [TOKENIZER.encode("Is it?"), TOKENIZER.encode("Why")]
    rows = ScriptedEngine(TOKENIZER, [" yes", " no"]).generate(asked, [1, 2], version=2)
    for row, text in enumerate((" yes", " no")):
        ids = rows.tokens_BT[row][rows.action_BT[row]].tolist()
        assert ids == [*TOKENIZER.encode(text), TOKENIZER.eos]
    assert rows.finished_B.tolist() == [True, True]
    assert float(rows.logp_BT.abs().sum()) == 0.0
    assert stop_reasons(rows, TOKENIZER.eos) == ["eos", "eos"]


def test_ids_are_taken_as_they_are_and_texts_may_stay_open() -> None:
    rows = ScriptedEngine(TOKENIZER, [[9, 10], "maybe"], end=False).generate([[5]], [1, 2])
    assert rows.tokens_BT[0][rows.action_BT[0]].tolist() == [9, 10]
    assert rows.finished_B.tolist() == [False, False]


def test_a_wrong_number_of_answers_is_named() -> None:
    with pytest.raises(PalateError, match="holds 1 answers but 2 were asked for"):
        ScriptedEngine(TOKENIZER, ["yes"]).generate([[5], [6]], [1, 2])
