"""What users get wrong with the methods, through the command line: one line of place, fault and next move, exit 2."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

import palate
from palate.cli import main
from palate.models.make import Make, make
from palate.models.save import Card, save
from palate.settings import PalateError

PROMPTS = [f"Number {n}:" for n in range(8)]
ODD = 2
"""The row at fault: the third."""


def rows(usual: dict[str, Any], **odd: Any) -> list[dict[str, Any]]:
    """A row per prompt, the third with other values (none: without); {} in a text stands for the prompt."""

    def filled(value: Any, prompt: str) -> Any:
        if isinstance(value, str):
            return value.replace("{}", prompt)
        return [filled(v, prompt) for v in value] if isinstance(value, list) and value else value

    each = [{**usual, **(odd if i == ODD else {})} for i in range(len(PROMPTS))]
    each = [{k: v for k, v in row.items() if v is not None} for row in each]
    return [{k: filled(v, p) for k, v in row.items()} for row, p in zip(each, PROMPTS, strict=True)]


PAIR = {"prompt": "{}", "chosen": " yes", "rejected": " no"}
IMPLICIT = {"chosen": "{} yes", "rejected": "{} no"}
TRANSCRIPT = {"chosen": "\n\nHuman: {}\n\nAssistant: yes", "rejected": "\n\nHuman: {}\n\nAssistant: no"}
THUMB = {"prompt": "{}", "completion": " yes", "label": True}
RATED = {"prompt": "{}", "completion": " yes", "rating": 1.0}
CORRECTION = {"prompt": "{}", "original": " a red dog", "corrected": " a blue dog", "spans": [[3, 7]]}
RANKING = {"prompt": "{}", "completions": [" a", " b", " c"], "ranks": [0, 1, 2]}


def talk(asked: str, said: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]


FILES: dict[str, list[dict[str, Any]]] = {
    "demos": rows({"prompt": "{}", "completion": " yes"}),
    "pairs": rows(PAIR),
    "same": rows(PAIR, rejected=" yes"),
    "same_implicit": rows(IMPLICIT, rejected="{} yes"),
    "silent": rows(PAIR, rejected=""),
    "silent_chosen": rows(PAIR, chosen=" \n"),
    "silent_ranking": rows(RANKING, completions=[" a", " b", ""]),
    "silent_thumb": [{**row, "label": i % 2 == 0} for i, row in enumerate(rows(THUMB, completion=""))],
    "silent_rated": [{**row, "rating": i} for i, row in enumerate(rows(RATED, completion=""))],
    "silent_correction": rows(CORRECTION, corrected="", spans=None),
    "apart": rows(TRANSCRIPT, rejected="\n\nHuman: Another?\n\nAssistant: no"),
    "apart_talk": [
        {"chosen": talk(p, "yes"), "rejected": talk("Another?" if i == ODD else p, "no")} for i, p in enumerate(PROMPTS)
    ],
    "apart_text": rows(IMPLICIT, rejected="Another? no"),
    "half_repeated": [
        {
            "prompt": talk(p, "")[:1],
            "chosen": talk(p, "yes"),
            "rejected": talk("Another?" if i == ODD else p, "no"),
        }
        for i, p in enumerate(PROMPTS)
    ],
    "thumbs_up": rows(THUMB),
    "thumbs_down": [{**row, "label": False} for row in rows(THUMB)],
    "thumbs": [{**row, "label": i % 2 == 0} for i, row in enumerate(rows(THUMB))],
    "all_alike": rows(RATED),
    "rated": [{**row, "rating": i} for i, row in enumerate(rows(RATED))],
    "beyond": rows(CORRECTION, spans=[[3, 400]]),
    "backwards": rows(CORRECTION, spans=[[7, 3]]),
    "unchanged": rows(CORRECTION, corrected=" a red dog", spans=None),
    "corrections": rows(CORRECTION),
    "votes": rows({"a": "ana", "b": "bob", "winner": "ana"}, winner="bot"),
    "stranger": rows({"a": "ana", "b": "bob", "winner": "ana"}, b="eve"),
    "ranked": rows({"players": ["ana", "bob"], "ranking": ["ana", "bob"]}, ranking=["ana", "bot"]),
    "short_ranks": rows(RANKING, ranks=[0, 1]),
}

TRAIN = "model=model batch_size=4 name=bad"
ASK = (
    "model=model prompts=demos.jsonl rollout_batch_size=4 total_episodes=4 max_new_tokens=4 name=bad "
    "reward.kind=length reward.at_most=3"
)
LOSSES = "Known: sigmoid, sigmoid_norm, robust, hinge, ipo,"
EMPTY = "is empty, so it teaches nothing. Remove the row; `palate data check` counts them."
RECORD = "record 2 ('Number 2:'): "
NO_REFERENCE = "precompute_reference: this algorithm has no fixed reference. Leave the setting out."

COMMANDS: dict[str, tuple[str, str]] = {
    "chosen is rejected": (
        f"dpo {TRAIN} data=same.jsonl",
        "data: chosen and rejected are the same in 1 of 8 pairs, first in pair ",
    ),
    "chosen is rejected, implicit prompts": (
        f"simpo {TRAIN} data=same_implicit.jsonl",
        "data: chosen and rejected are the same in 1 of 8 pairs, first in pair ",
    ),
    "empty rejected answer": (f"dpo {TRAIN} data=silent.jsonl shuffle=false", f"{RECORD}the rejected answer {EMPTY}"),
    "empty chosen answer": (
        f"orpo {TRAIN} data=silent_chosen.jsonl shuffle=false",
        f"{RECORD}the chosen answer {EMPTY}",
    ),
    "empty answer in a ranking": (
        f"cpo {TRAIN} data=silent_ranking.jsonl shuffle=false",
        f"{RECORD}answer 2 {EMPTY}",
    ),
    "empty answer with a thumb": (
        f"kto {TRAIN} data=silent_thumb.jsonl shuffle=false",
        f"{RECORD}the answer {EMPTY}",
    ),
    "empty rated answer": (f"ilql {TRAIN} data=silent_rated.jsonl shuffle=false", f"{RECORD}the answer {EMPTY}"),
    "empty correction": (
        f"ddpo {TRAIN} data=silent_correction.jsonl shuffle=false",
        f"{RECORD}the corrected answer {EMPTY}",
    ),
    "transcripts of two prompts": (
        f"dpo {TRAIN} data=apart.jsonl",
        "apart.jsonl:3: chosen/rejected: the dialogues part before their last turn (at turn 1). Both must share",
    ),
    "conversations of two prompts": (
        f"dpo {TRAIN} data=apart_talk.jsonl",
        "apart_talk.jsonl:3: chosen/rejected: the two conversations share no turn, so there is no prompt that both "
        "answer. Both must begin alike; mend or remove the row.",
    ),
    "texts of two prompts": (
        f"dpo {TRAIN} data=apart_text.jsonl shuffle=false",
        "record 2 ('Number 2: yes'): its answers share no prompt, as in 1 of 8 records.",
    ),
    "a prompt that one answer repeats": (
        f"dpo {TRAIN} data=half_repeated.jsonl",
        "half_repeated.jsonl:3: prompt: answer 0 begins with the prompt's turns and answer 1 does not. Give the turns",
    ),
    "thumbs up alone": (
        f"kto {TRAIN} data=thumbs_up.jsonl",
        "data: all 8 answers have a thumb up; without any thumb down there is nothing to tell apart. Bring both kinds",
    ),
    "thumbs down alone": (f"kto {TRAIN} data=thumbs_down.jsonl", "data: all 8 answers have a thumb down; without any"),
    "thumbs one at a time": (
        f"kto {TRAIN} data=thumbs.jsonl batch_size=1",
        "a batch of one row has no other row to compare with. Take a batch_size of 2 or more",
    ),
    "a group of one": (
        f"grpo {ASK} num_generations=1",
        "num_generations: 1 answer a prompt has no siblings to be compared with, so nothing is learnt. Take 2 or more",
    ),
    "one answer without siblings": (f"rloo {ASK} num_generations=1", "num_generations: 1 answer a prompt has no sib"),
    "a group baseline of one": (f"reinforce {ASK} baseline=group", "1 answer a prompt has no siblings"),
    "a rollout that groups do not divide": (
        f"grpo {ASK} num_generations=3",
        "rollout_batch_size 4 is not divisible by 3 answers a prompt.",
    ),
    "returns all alike": (
        f"ilql {TRAIN} data=all_alike.jsonl",
        "returns: all 8 are 1, so no action is better than another. Bring answers with different ratings.",
    ),
    "no returns": (f"ilql {TRAIN} data=demos.jsonl", "expected answers with ratings, got a demonstration record."),
    "no pairs": (f"dpo {TRAIN} data=demos.jsonl", "expected ranked answers, got a demonstration record. Name data of"),
    "thumbs where pairs belong": (f"dpo {TRAIN} data=thumbs.jsonl", "expected ranked answers, got an unpaired record."),
    "no thumbs": (f"kto {TRAIN} data=demos.jsonl", "expected answers with labels, got a demonstration record."),
    "a span outside the text": (
        f"ddpo {TRAIN} data=beyond.jsonl",
        "spans[0]: it runs from 3 to 400, outside the corrected answer of 11 characters. Count characters of",
    ),
    "a span that ends before it starts": (
        f"ddpo {TRAIN} data=backwards.jsonl",
        "backwards.jsonl:3: spans[0]: runs from 7 to 3. Give character positions, start before end.",
    ),
    "a correction of nothing": (
        f"ddpo {TRAIN} data=unchanged.jsonl",
        "data: chosen and rejected are the same in 1 of 8 pairs",
    ),
    "ranks for other answers": (f"reward {TRAIN} data=short_ranks.jsonl", "short_ranks.jsonl:3: ranks: "),
    "a winner nobody knows": (
        "rank votes.jsonl",
        "votes.jsonl:3: winner: 'bot' is neither 'ana' nor 'bob' nor a tie. Did you mean 'bob'?",
    ),
    "a player nobody knows": (
        "rank stranger.jsonl --players ana,bob",
        "stranger.jsonl:3: 'eve' is not among the players.",
    ),
    "a ranked name nobody knows": (
        "rank ranked.jsonl",
        "ranked.jsonl:3: ranking: 'bot' is not among the row's players. Did you mean 'bob'?",
    ),
    "a misspelt loss": (
        f"dpo {TRAIN} data=pairs.jsonl loss_type=sigmiod",
        f"algorithm: loss_type: no loss is called 'sigmiod'. Did you mean 'sigmoid'? {LOSSES}",
    ),
    "a loss that is a method": (
        f"dpo {TRAIN} data=pairs.jsonl loss_type=simpo",
        "algorithm: loss_type: 'simpo' is a method of its own. Write kind: simpo.",
    ),
    "one unknown loss of several": (
        f"dpo {TRAIN} data=pairs.jsonl loss_type=[sigmoid,nosuch]",
        f"algorithm: loss_type: no loss is called 'nosuch'. {LOSSES}",
    ),
    "a misspelt loss of thumbs": (f"kto {TRAIN} data=thumbs.jsonl loss_type=kot", "loss_type: Input should be 'kto', "),
    "a misspelt loss without a reference": (f"cpo {TRAIN} data=pairs.jsonl loss_type=hing", "not 'hing'"),
    "a misspelt average": (f"grpo {ASK} loss_type=dpo", "loss_type: Input should be 'grpo', 'bnpo', 'dapo' or"),
    "no reference to precompute": (f"simpo {TRAIN} data=pairs.jsonl precompute_reference=true", NO_REFERENCE),
    "a uniform reference to precompute": (
        f"dpo {TRAIN} data=pairs.jsonl reference_free=true precompute_reference=true",
        NO_REFERENCE,
    ),
    "a moving reference to precompute": (
        f"dpo {TRAIN} data=pairs.jsonl sync_ref=true precompute_reference=true",
        NO_REFERENCE,
    ),
    "imitation with a reference": (f"sft {TRAIN} data=demos.jsonl precompute_reference=true", NO_REFERENCE),
    "ratings with a reference": (f"ilql {TRAIN} data=rated.jsonl precompute_reference=true", NO_REFERENCE),
    "a reference that mixed rows need": (
        f"kto {TRAIN} data=thumbs.jsonl precompute_reference=true",
        "precompute_reference: the KL term reads prompts with other rows' answers",
    ),
    "the same setting by two names": (
        f"dpo {TRAIN} data=pairs.jsonl sft_weight=1 rpo_alpha=1",
        "'rpo_alpha' and 'sft_weight' are the same setting. Give one of them.",
    ),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = make(Make(hidden_size=32, layers=1, heads=2, vocabulary=280, context=48), PROMPTS, 1)
    folder = tmp_path_factory.mktemp("models") / "tiny"
    save(folder, made.trunk, made.tokenizer, Card("tiny", "nothing"))
    return folder


@pytest.fixture
def here(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the model and every file."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").symlink_to(model)
    for name, data in FILES.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in data))
    return tmp_path


def said(done: Result) -> str:
    """The one line of fault of a command that ended with 2."""
    lines = [line for line in done.stderr.splitlines() if line.startswith("palate: ")]
    assert done.exit_code == 2, done.output
    assert isinstance(done.exception, SystemExit), done.exception
    assert len(lines) == 1, done.stderr
    assert "Traceback" not in done.output
    return lines[0]


def nothing_half_written(here: Path) -> bool:
    """Neither a checkpoint nor a model nor a metric that could be taken for work."""
    made = {path.name for path in here.glob("runs/bad/*-*/**/*") if path.is_file()}
    return made <= {".started", "stage.yaml", "warnings.jsonl"}


@pytest.mark.parametrize("name", COMMANDS)
def test_the_command_says_it_in_one_line(name: str, here: Path) -> None:
    words, expected = COMMANDS[name]
    done = CliRunner().invoke(main, words.split())
    assert expected in said(done)
    assert nothing_half_written(here)


def test_the_good_rows_are_accepted(here: Path) -> None:
    """The files without a fault train, so that it is the fault that the commands above stumble over."""
    for method, data in (("dpo", "pairs"), ("kto", "thumbs"), ("ilql", "rated"), ("ddpo", "corrections")):
        words = f"{method} model=model batch_size=4 max_steps=1 name={method} data={data}.jsonl".split()
        assert CliRunner().invoke(main, words).exit_code == 0, method


@pytest.mark.parametrize(
    ("rewards", "message"),
    [
        ([1.0], r"rewards: 1 for 2 samples\. Give one number per sample\."),
        ([1.0, "good"], r"rewards\[1\]: 'good' is not a number\. Give one number per sample\."),
        ([1.0, 1.0], r"returns: all 2 are 1, so no action is better than another"),
    ],
)
def test_samples_and_rewards_of_the_door(rewards: Sequence[Any], message: str, here: Path) -> None:
    with pytest.raises(PalateError, match=message):
        palate.train("model", samples=["one", "two"], rewards=rewards, batch_size=2, name="bad")  # type: ignore[arg-type]
    assert nothing_half_written(here)
