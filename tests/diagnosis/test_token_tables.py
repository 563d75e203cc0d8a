"""Tables of tokens in a terminal: never wider than it, two steps abreast where they fit, plain without colour."""

import io

import pytest
from rich.console import Console

from palate.diagnosis import token_tables, tokens
from palate.diagnosis.run_folder import read


@pytest.fixture
def steps(write_run):
    stage = read(write_run(stages=("rlhf",))).stages[0]
    found = tokens.steps(stage)
    return [token_tables.Step(f"rlhf, step {s}", found[s], tokens.logged(stage, s)) for s in (1, 120)]


def printed(steps, width, colour=False, prompt=False):
    console = Console(file=io.StringIO(), width=width, force_terminal=colour, no_color=not colour, legacy_windows=False)
    for part in token_tables.render(steps, width, prompt):
        console.print(part)
    return console.file.getvalue()


@pytest.mark.parametrize("width", [60, 80, 100, 130, 160, 220])
def test_no_line_is_wider_than_the_terminal(steps, width):
    lines = printed(steps, width).splitlines()
    assert max(len(line) for line in lines) <= width
    together = any("step 1 " in line and "step 120" in line for line in lines)
    assert together == (width >= 2 * 62)


@pytest.mark.parametrize("width", [60, 80, 100, 160])
def test_what_matters_most_is_there_at_every_width(steps, width):
    text = printed(steps, width)
    for title in ("token", "KL", "adv", "reward", "mask"):
        assert title in text
    missing = {"sampled", "logp", "ref", "value", "return", "penalty", "score"} - set(text.split())
    assert all(title in text.partition("no room for: ")[2] for title in missing - {"score"})


def test_the_table_says_in_letters_what_colour_would(steps):
    text = printed(steps[:1], 120)
    assert "\x1b" not in text
    row = next(line for line in text.splitlines() if "(state after)" in line)
    assert row.split()[-1] == "vS"
    assert "1.500" in row
    assert next(line for line in text.splitlines() if "<eos>" in line).split()[-1] == "av"


def test_colour_goes_by_sign(steps):
    line = next(line for line in printed(steps[:1], 120, colour=True).splitlines() if "<eos>" in line)
    assert "\x1b[1;36m -0.750" in line or "\x1b[1;36m-0.750" in line  # KL below 0: cyan, bold since it is the largest


def test_sums_and_the_rollout_stand_beside_each_other(steps):
    text = printed(steps[:1], 120)
    assert "2 answers here  KL -0.500  score 1.500  length 2.000" in text
    assert f"KL {token_tables.figure(steps[0].logged['KL'])}" in text.partition("whole rollout")[2]
    assert next(line for line in text.splitlines() if line.split()[:1] == ["sum"]).split()[1:5] == [
        "-3.000", "-3.000", "-2.500", "-0.500",
    ]  # fmt: skip


def test_the_prompt_is_listed_on_request(steps):
    assert "␣dish" not in printed(steps, 120)
    assert "␣dish" in printed(steps, 120, prompt=True)


def test_a_number_that_was_none_reads_nan_and_one_the_algorithm_has_not_is_blank(steps):
    steps[0].answers[0].tokens[2]["kl"] = None
    assert "nan" in printed(steps[:1], 120)


@pytest.mark.parametrize(
    ("x", "shown"),
    [(0.0, "0"), (1e-5, "1e-05"), (-2e-4, "-2e-04"), (0.0005, "0.001"), (-5.6106, "-5.611"), (12.345, "12.35"),
     (-123.45, "-123.5"), (-123456.0, "-123456"), (-12345678.0, "-1e+07"), (None, "nan")],
)  # fmt: skip
def test_a_figure_is_short_and_never_hides_that_it_is_not_zero(x, shown):
    assert token_tables.figure(x) == shown
