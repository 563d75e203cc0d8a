"""Settings by origin, in the dotted form that an override on the command line has."""

from palate.diagnosis import settings_view
from palate.provenance import Origins, annotated

RESOLVED = """\
seed: 1  # command line
stages:
  - kind: train  # file
    betas: [0.9, 0.95]  # default
    model:
      width: 128  # file
    mixture:
      - path: a.jsonl  # file
      - path: b.jsonl  # file
  - kind: online  # file
    text: "a  # b c d e"  # file
"""


def test_what_was_chosen_is_named_as_an_override_would_name_it():
    assert settings_view.chosen(RESOLVED) == [
        ("seed: 1", "command line"),
        ("stages.0.kind: train", "file"),
        ("stages.0.model.width: 128", "file"),
        ("stages.0.mixture.0.path: a.jsonl", "file"),
        ("stages.0.mixture.1.path: b.jsonl", "file"),
        ("stages.1.kind: online", "file"),
        ('stages.1.text: "a  # b c d e"', "file"),
    ]


def test_it_reads_what_a_run_writes():
    given = {"seed": 2, "stages": [{"kind": "a", "deep": {"x": 1}}, {"kind": "b"}]}
    resolved = {"seed": 2, "out": "runs", "stages": [{"kind": "a", "deep": {"x": 1, "y": 2}}, {"kind": "b", "z": None}]}
    text = annotated(resolved, Origins(given, ["seed=2"]))
    assert settings_view.chosen(text) == [
        ("seed: 2", "command line"),
        ("stages.0.kind: a", "file"),
        ("stages.0.deep.x: 1", "file"),
        ("stages.1.kind: b", "file"),
    ]
    assert ("out: runs", "default") in settings_view.lines(text)


def test_facts_leave_out_what_is_not_known():
    assert settings_view.facts({}) == []
    facts = dict(settings_view.facts({"seed": 0, "git": {"commit": "a" * 40, "changed": True}, "sessions": [1, 2]}))
    assert facts == {
        "Sessions": "2: the run was stopped and resumed",
        "Seed": "0",
        "Commit": "aaaaaaaaaaaa, with changes not committed",
    }
