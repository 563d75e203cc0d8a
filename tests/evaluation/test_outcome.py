"""evaluation.json: plain JSON, numbers that are not finite become null, nothing lost on the way."""

import json
import math

from palate.evaluation.kl import SequenceKL
from palate.evaluation.outcome import ModelOutcome, Outcome, Score, to_json, write
from palate.evaluation.statistics import Interval
from palate.evaluation.text import summarise
from palate.evaluation.win_rate import gain, win_rate


def an_outcome():
    model = ModelOutcome(
        scores={"gold": Score(Interval(1.0, 0.5, 1.5), 0.25, 0)},
        win_rate={"gold": win_rate([1.0, 2.0], [0.0, 3.0])},
        gain={"gold": gain([1.0, 2.0], [0.0, 3.0])},
        kl=SequenceKL(2.0, math.nan, 1),
        text=summarise(["a b"], [3], [True]),
        rouge=None,
        world={"coverage": 0.5},
    )
    return Outcome("sft", "gold", "gold", 2, 1, {"ppo": model}, {}, ("a note",))


def test_every_part_is_under_its_documented_path():
    found = to_json(an_outcome())
    assert found["schema"] == 1
    assert found["models"]["ppo"]["scores"]["gold"]["mean"] == {"estimate": 1.0, "low": 0.5, "high": 1.5}
    assert found["models"]["ppo"]["win_rate"]["gold"]["rate"]["estimate"] == 0.5
    assert found["models"]["ppo"]["gain"]["gold"]["mean"]["estimate"] == 0.0
    assert found["models"]["ppo"]["text"]["length_mean"] == 3
    assert found["models"]["ppo"]["kl"] == {"mean": 2.0, "standard_error": None, "answers": 1}
    assert found["models"]["ppo"]["rouge"] is None
    assert found["notes"] == ["a note"]


def test_the_file_is_strict_json(tmp_path):
    path = write(an_outcome(), tmp_path)
    assert path == tmp_path / "evaluation.json"
    assert json.loads(path.read_text(), parse_constant=lambda word: 1 / 0) == to_json(an_outcome())
