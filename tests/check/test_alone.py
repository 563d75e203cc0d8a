"""A data set or a model on its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from palate.check.alone import check_data, check_model
from palate.data.encode import Encoding
from palate.data.source import Data
from palate.models.heads import fresh_head
from palate.models.load import load
from palate.models.save import Card, save
from palate.settings import PalateError
from tests.check.conftest import write_rows


def test_data_alone_is_counted(demonstrations: Path) -> None:
    found = check_data(Data(path=str(demonstrations)), None, Encoding())
    assert found.report.records == 8
    assert found.report.length_unit == "words"
    assert found.examples == ()
    assert found.faults == ()


def test_data_beside_a_model_is_laid_out(demonstrations: Path, pairs: Path, model: Path) -> None:
    found = check_data(Data(path=str(demonstrations)), str(model), Encoding())
    assert found.report.length_unit == "tokens"
    assert [one.counts.eos for one in found.examples] == [1, 1]
    assert "".join(p.text for p in found.examples[0].pieces if p.trained) == " 0.<eos>"
    ranked = check_data(Data(path=str(pairs)), str(model), Encoding())
    assert [one.reads for one in ranked.examples] == [len(one.ids) - 1 for one in ranked.examples]
    assert len(ranked.examples) == 4


def test_prompts_train_nothing(tmp_path: Path, model: Path) -> None:
    path = write_rows(tmp_path / "prompts.jsonl", [{"prompt": "say 1:"}, {"prompt": "say 2:"}])
    found = check_data(Data(path=str(path)), str(model), Encoding())
    assert [one.counts.trained for one in found.examples] == [0, 0]


def test_every_faulty_row_is_told(tmp_path: Path) -> None:
    path = tmp_path / "torn.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": 1\n{"prompt": "c", "completion": 3}\n')
    found = check_data(Data(path=str(path)), None, Encoding())
    assert [fault.partition(" ")[0] for fault in found.faults] == [f"{path}:2:", f"{path}:3:"]


def test_rows_that_cannot_be_laid_out_are_a_fault(demonstrations: Path, model: Path) -> None:
    found = check_data(Data(path=str(demonstrations)), str(model), Encoding(max_length=2))
    assert len(found.faults) == 1
    assert "without a trained token" in found.faults[0]


def test_a_policy_alone(model: Path) -> None:
    found = check_model(str(model))
    loaded = load(model)
    assert found.facts["parameters"] == sum(p.numel() for p in loaded.trunk.parameters())
    assert found.facts["can be"] == "policy, start of a reward model"
    assert found.facts["context"] == 48
    assert found.facts["reward head"] == "none"
    assert found.tokens["end"] == f"<eos> ({loaded.tokenizer.eos})"
    assert found.memory.bytes["Adam moments"] == 8 * found.facts["parameters"]
    assert found.sample is not None
    assert not any(found.sample.trained[: found.sample.trained.index(True)])
    assert found.warnings == ()


@pytest.mark.parametrize("trained", [True, False])
def test_a_reward_model_alone(model: Path, tmp_path: Path, trained: bool) -> None:
    loaded = load(model)
    head = fresh_head(loaded.trunk.width, "reference", 1)
    head.trained = trained
    save(tmp_path / "judge", loaded.trunk, loaded.tokenizer, Card("judge", "tiny"), head)
    found = check_model(str(tmp_path / "judge"))
    assert found.facts["reward head"] == ("trained" if trained else "untrained")
    assert ("reward" in found.facts["can be"].split(", ")) == trained
    assert any("never trained" in warning for warning in found.warnings) != trained
    assert found.sample is None


def test_a_folder_without_weights_is_refused(model: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((model / "config.json").read_bytes())
    with pytest.raises(PalateError, match="no weights"):
        check_model(str(tmp_path))
