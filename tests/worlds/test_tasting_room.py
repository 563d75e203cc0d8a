"""The tasting room: its data are what they claim, its taste cannot be gamed, its raters choose as stated."""

from __future__ import annotations

import math
from collections import Counter
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from palate.records import Correction, Demonstration, Prompt, Ranking, Unpaired
from palate.settings import PalateError
from palate.worlds import tasting_room as room
from palate.worlds.tasting.words import DISHES, FACTS, FACTS_OF, FAMILY_OF, POLITE_WORDS, RUDE_WORDS

PROMPT = "Dish: lentil stew. Facts: tastes smoky, feels tender, comes warm.\nNote:"
PERFECT = " The lentil stew tastes smoky, feels tender and comes warm."
GOOD = PERFECT + " Enjoy your meal."
FAULTLESS = {"forget": 0, "invent": 0, "polite": 1, "rude": 0, "ramble": 0, "repeat": 0, "slip": 0, "cut": 0}


def total(completion: str, prompt: str = PROMPT) -> float:
    return room.utility(prompt, completion).total


# the taste -------------------------------------------------------------------------------------------


def test_a_good_note_is_worth_what_the_formula_says():
    assert room.utility(PROMPT, GOOD) == room.Utility(1.0, 0, 1, 0, 0, 0, 0, 13, 1)
    assert total(GOOD) == 3.5


@pytest.mark.parametrize(
    ("note", "part", "value", "expected"),
    [
        (" The lentil stew tastes smoky. Enjoy your meal.", "coverage", 1 / 3, 1.5),
        (PERFECT + " Every bite looks dark.", "invented", 1, 1.0),
        (" The leek soup tastes smoky, feels tender and comes warm.", "invented", 1, 1.0),
        (PERFECT + " Take it or leave it.", "rude", 1, 2.0),
        (PERFECT + " It also comes warm.", "repeats", 1, 2.5),
        (PERFECT + PERFECT, "repeats", 1, 2.5),
        (PERFECT + " It rained for most of last week.", "rambles", 1, 2.6),
        (" The lentil stew tastes smoky, feels tender and and comes warm.", "broken", 1, 2.7),
        (PERFECT.rstrip("."), "ended", 0, 2.0),
        (" It" + " tastes smoky and" * 20 + " comes warm.", "words", 63, 2 - 0.05 * 31 - 0.5 * 5),
    ],
)
def test_each_part_is_seen_and_weighed(note: str, part: str, value: float, expected: float):
    judged = room.utility(PROMPT, note)
    assert getattr(judged, part) == pytest.approx(value)
    assert judged.total == pytest.approx(expected)


def test_no_shortcut_is_worth_a_poor_honest_note():
    honest = total(" The lentil stew tastes smoky.")
    everything = " The lentil stew " + " and ".join(sorted(FACTS)) + "."
    fragments = ["", " ", ".", " tastes smoky, feels tender, comes warm.", "Enjoy your meal."]
    for shortcut in [*fragments, PROMPT, PROMPT * 3, everything, GOOD * 4]:
        assert total(shortcut) < honest - 0.4, shortcut
    assert total(GOOD * 2) < total(GOOD)


@given(st.text(max_size=400), st.text(max_size=400))
@settings(max_examples=200, deadline=None)
def test_any_text_has_a_bounded_utility(prompt: str, completion: str):
    assert -34 <= total(completion, prompt) <= 3.5
    assert -34 <= total(completion) <= 3.5


@given(st.lists(st.sampled_from([*sorted(FACTS), *FAMILY_OF, "is", "and", "The", ".", ",", "it", "fool", "enjoy"])))
@settings(max_examples=200, deadline=None)
def test_word_salad_never_beats_the_best_note(words: list[str]):
    judged = room.utility(PROMPT, " ".join(words))
    assert judged.total <= 3.5
    assert judged.coverage * 3 <= len({"tastes smoky", "feels tender", "comes warm"} & set(words))


def test_every_sentence_of_the_grammar_is_sound_and_of_one_manner():
    notes = [d for d in room.records("demonstrations", 1500, 3, **FAULTLESS) if isinstance(d, Demonstration)]
    for note in notes:
        judged = room.utility(str(note.prompt), str(note.completion))
        assert judged.total == 3.5, (note, judged)
    assert not POLITE_WORDS & RUDE_WORDS


def test_facts_and_dishes_share_no_word():
    of_dishes, of_facts = ({word for name in names for word in name.split()} for names in (FAMILY_OF, FACTS))
    assert not of_dishes & of_facts
    assert all(len(dish.split()) == 2 for dish in FAMILY_OF)
    assert set(DISHES) == set(FACTS_OF)
    assert all(len(fact.split()) == 2 for fact in FACTS)
    assert not any(dish[0] in "aeiou" for dish in FAMILY_OF), "notes say `a` before a dish"


def test_score_is_the_utility_of_each_row_and_refuses_unequal_lists():
    assert room.score([PROMPT, PROMPT], [GOOD, ""], dish=["lentil stew"] * 2) == [3.5, -1.0]
    with pytest.raises(ValueError, match="longer"):
        room.score([PROMPT], [GOOD, ""])


def test_describe_averages_the_parts():
    summary = room.describe([(PROMPT, GOOD), (PROMPT, GOOD), (PROMPT, ""), (PROMPT, " The lentil stew tastes mild.")])
    assert summary["coverage"] == pytest.approx(0.5)
    assert summary["invented"] == pytest.approx(0.25)
    assert summary["ended"] == pytest.approx(0.75)
    assert summary["distinct"] == pytest.approx(0.75)
    assert room.describe([]) == {}


# the data --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", list(room.SHAPES))
def test_records_are_a_pure_function_and_a_prefix(shape: str):
    assert room.records(shape, 20, 5) == room.records(shape, 30, 5)[:20]
    assert room.records(shape, 20, 5) != room.records(shape, 20, 6)
    assert room.records(shape, 0, 5) == []


def test_train_and_test_share_no_prompt_whatever_the_seed_and_shape():
    def asked(shape: str, seed: int, split: str) -> set[tuple[str, frozenset[str]]]:
        found = (room.asked(str(r.prompt)) for r in room.records(shape, 1500, seed, split=split))
        return {(dish, frozenset(facts)) for dish, facts in found}

    train = asked("prompts", 1, "train") | asked("pairs", 2, "train") | asked("demonstrations", 3, "train")
    test = asked("prompts", 1, "test") | asked("pairs", 4, "test")
    assert train
    assert test
    assert not train & test


def test_no_record_occurs_twice():
    for shape in ("prompts", "demonstrations", "pairs"):
        rows = room.records(shape, 3000, 7)
        texts = [tuple(v for k, v in vars(r).items() if k != "columns") for r in rows]
        assert len(set(texts)) == len(texts)


def test_a_prompt_says_what_its_columns_say():
    for record in room.records("prompts", 300, 1):
        assert isinstance(record, Prompt)
        assert room.asked(str(record.prompt)) == (record.columns["dish"], record.columns["facts"])
        assert 1 <= len(record.columns["facts"]) <= 3
        known = FACTS_OF[FAMILY_OF[record.columns["dish"]]]
        assert all(fact in known[fact.split()[0]] for fact in record.columns["facts"])
        assert len({fact.split()[0] for fact in record.columns["facts"]}) == len(record.columns["facts"])


def test_flaws_come_at_their_stated_rates():
    rows = [r for r in room.records("demonstrations", 6000, 11) if isinstance(r, Demonstration)]
    summary = room.describe([(str(r.prompt), str(r.completion)) for r in rows])
    stated = room.Room()
    assert summary["ended"] == pytest.approx(1 - stated.cut, abs=0.02)
    assert summary["invented"] == pytest.approx(stated.invent, abs=0.03)
    assert summary["rude"] == pytest.approx(stated.rude * (1 - stated.cut), abs=0.02)
    unspoilt = 1 - stated.slip / 2 - stated.cut / 2
    assert summary["coverage"] == pytest.approx((1 - stated.forget) * unspoilt, abs=0.03)
    assert summary["rambles"] == pytest.approx(stated.ramble, abs=0.04)
    assert summary["repeats"] == pytest.approx(stated.repeat, abs=0.04)
    assert summary["distinct"] > 0.97


def test_notes_are_short_and_varied():
    rows = [str(r.completion) for r in room.records("demonstrations", 4000, 2) if isinstance(r, Demonstration)]
    lengths = sorted(len(note.split()) for note in rows)
    assert lengths[int(0.99 * len(lengths))] <= 40
    adjectives = {fact.split()[1] for fact in FACTS}
    shapes = Counter(" ".join("_" if w.strip(".,") in adjectives else w for w in n.split()) for n in rows)
    assert len(shapes) > 2000
    assert 200 <= len({w.strip(".,") for note in rows for w in note.split()}) <= 800


# the raters ------------------------------------------------------------------------------------------


def test_preferences_follow_bradley_terry_at_the_stated_temperature():
    """Among pairs the true probability p of the first is known: choices must match it in every band of p."""
    rows = [r for r in room.records("pairs", 6000, 1, temperature=2.0) if isinstance(r, Ranking)]
    truth, chosen = [], []
    for row in rows:
        first, second = (total(str(c), str(row.prompt)) for c in row.completions)
        truth.append(1 / (1 + math.exp(-(first - second) / 2.0)))
        chosen.append(row.ranks == (0, 1))
    truth_N, chosen_N = np.array(truth), np.array(chosen, dtype=float)
    for low in np.arange(0, 1, 0.2):
        band = (truth_N >= low) & (truth_N < low + 0.2)
        slack = 4 * math.sqrt(0.25 / band.sum())
        assert abs(chosen_N[band].mean() - truth_N[band].mean()) < slack


def test_rankings_are_plackett_luce():
    """The best of K wins with probability softmax(u / T): its mean surprise equals the mean entropy."""
    rows = [r for r in room.records("rankings", 2500, 1, answers=5, temperature=1.0) if isinstance(r, Ranking)]
    surprise, entropy = [], []
    for row in rows:
        assert sorted(row.ranks) == list(range(5))
        value_K = np.array([total(str(c), str(row.prompt)) for c in row.completions])
        logp_K = value_K - np.log(np.exp(value_K).sum())
        surprise.append(-logp_K[row.ranks.index(0)])
        entropy.append(-(np.exp(logp_K) * logp_K).sum())
    slack = 4 * float(np.std(surprise)) / math.sqrt(len(rows))
    assert abs(np.mean(surprise) - np.mean(entropy)) < slack


def test_position_bias_favours_the_first_answer():
    def share_first(bias: float) -> float:
        rows = [r for r in room.records("pairs", 1500, 1, position_bias=bias) if isinstance(r, Ranking)]
        return sum(r.ranks == (0, 1) for r in rows) / len(rows)

    assert abs(share_first(0.0) - 0.5) < 0.06
    assert share_first(2.0) > 0.65


def test_thumbs_go_up_more_often_for_better_notes():
    rows = [r for r in room.records("thumbs", 3000, 1) if isinstance(r, Unpaired)]
    up = [total(str(r.completion), str(r.prompt)) for r in rows if r.label]
    down = [total(str(r.completion), str(r.prompt)) for r in rows if not r.label]
    assert np.mean(up) > np.mean(down) + 1.5


def test_the_ceiling_is_the_mean_of_the_larger_probability():
    rows = room.records("rankings", 200, 4, temperature=0.5)
    larger, right = [], []
    for row in rows:
        assert isinstance(row, Ranking)
        value_K = [total(str(c), str(row.prompt)) for c in row.completions]
        for i, j in combinations(range(4), 2):
            p = 1 / (1 + math.exp(-(value_K[i] - value_K[j]) / 0.5))
            larger.append(max(p, 1 - p))
            agreed = (value_K[i] - value_K[j]) * (row.ranks[j] - row.ranks[i])
            right.append(0.5 if agreed == 0 else float(agreed > 0))
    found = room.ceiling(rows, temperature=0.5)
    assert found.bayes == pytest.approx(np.mean(larger))
    assert found.gold == pytest.approx(np.mean(right))
    assert found.pairs == 200 * 6


def test_less_noise_raises_the_ceiling_and_labels_reach_it():
    calm, loud = (room.ceiling(room.records("pairs", 2500, 1, temperature=t), t) for t in (0.2, 1.0))
    assert calm.bayes > loud.bayes + 0.1
    assert calm.gold == pytest.approx(calm.bayes, abs=0.03)
    assert loud.gold == pytest.approx(loud.bayes, abs=0.03)


# corrections and faults ------------------------------------------------------------------------------


def test_a_correction_is_perfect_and_its_spans_hold_every_new_word():
    for row in room.records("corrections", 400, 1):
        assert isinstance(row, Correction)
        corrected, original = str(row.corrected), str(row.original)
        assert total(corrected, str(row.prompt)) == 3.5
        assert row.spans
        kept, end_before = [], 0
        for start, end in row.spans:
            assert end_before <= start < end <= len(corrected)
            kept.append(corrected[end_before:start])
            end_before = end
        kept.append(corrected[end_before:])
        words = iter(original.split())
        assert all(word in words for piece in kept for word in piece.split()), "what is kept comes from the original"


def test_corrections_of_faultless_writers_end_instead_of_searching_for_ever():
    rows = room.records("corrections", 3, 1, **FAULTLESS)
    assert all(isinstance(r, Correction) and not r.spans for r in rows)


@pytest.mark.parametrize(
    ("shape", "rows", "options", "message"),
    [
        ("pears", 1, {}, "there is no shape 'pears'. Did you mean 'pairs'?"),
        ("pairs", 1, {"forgt": 0.1}, "there is no setting 'forgt'. Did you mean 'forget'?"),
        ("pairs", 1, {"temperature": 0}, "temperature"),
        (
            "rankings",
            1,
            dict.fromkeys(FAULTLESS, 0) | {"forget": 1, "answers": 16},
            "fewer than 16 different notes",
        ),
    ],
)
def test_bad_requests_name_the_fault(shape: str, rows: int, options: dict[str, float], message: str):
    with pytest.raises(PalateError, match=message.replace("?", r"\?")):
        room.records(shape, rows, 1, **options)


def test_a_ceiling_without_comparisons_is_refused():
    with pytest.raises(PalateError, match="needs pairs or rankings"):
        room.ceiling(room.records("prompts", 3, 1))


def test_readable_shows_answers_best_first():
    (row,) = room.records("rankings", 1, 1)
    assert isinstance(row, Ranking)
    lines = room.readable(row).splitlines()
    assert lines[2].endswith(str(row.completions[row.ranks.index(0)]))
    assert len(lines) == 6
