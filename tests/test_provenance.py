"""Where values came from, written so that it can be run again."""

from __future__ import annotations

from typing import Any

import yaml
from hypothesis import given
from hypothesis import strategies as st

from palate.provenance import Origins, annotated, provenance, read_json, write_json

_LEAF = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=12)
_VALUE = st.recursive(
    _LEAF, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
)


@given(st.dictionaries(st.text(max_size=5), _VALUE, max_size=4))
def test_any_resolved_settings_read_back_as_they_were(resolved: dict[str, Any]) -> None:
    assert yaml.safe_load(annotated(resolved, Origins({}, []))) == (resolved or None)


def test_each_value_names_who_gave_it() -> None:
    asked = {"seed": 2, "stages": [{"name": "sft", "data": "rows.jsonl", "optimiser": {"rate": 0.1}}]}
    origins = Origins(asked, ["stages.sft.optimiser.rate=0.1"])
    resolved = {
        "seed": 2,
        "stages": [{"name": "sft", "data": {"path": "rows.jsonl", "rows": None}, "optimiser": {"rate": 0.1, "eps": 1}}],
    }
    said = [
        text.strip(" -").replace("  # ", " # ") for text in annotated(resolved, origins).splitlines() if "#" in text
    ]
    assert said == [
        "seed: 2 # file",
        "name: sft # file",
        "path: rows.jsonl # file",
        "rows: null # default",
        "rate: 0.1 # command line",
        "eps: 1 # default",
    ]


def test_a_run_remembers_each_of_its_sessions() -> None:
    first = provenance(3, ["palate", "run", "x.yaml"], {})
    second = provenance(3, ["palate", "run", "x.yaml", "seed=3"], first)
    assert [s["command"][-1] for s in second["sessions"]] == ["x.yaml", "seed=3"]
    assert second["versions"].keys() >= {"python", "torch", "transformers"}
    assert second["hardware"]["memory_bytes"] > 0


def test_json_files_are_whole_or_not_there(tmp_path: Any) -> None:
    path = tmp_path / "DONE"
    assert read_json(path) == {}
    write_json(path, {"hash": "día"})
    assert read_json(path) == {"hash": "día"}
    path.write_text('{"hash": ')
    assert read_json(path) == {}
    assert [p.name for p in tmp_path.iterdir()] == ["DONE"]
