"""What a person sees: one live line in a terminal, plain lines elsewhere, nothing a model can misuse."""

from __future__ import annotations

import io

from rich.console import Console

from palate.live import Display, duration, line, plain

METRICS = {
    "objective/scores": 1.234,
    "objective/kl": 3.21,
    "response/length_mean": 24.4,
    "response/eos_rate": 0.96,
    "policy/clipfrac_avg": 0.12,
    "tokens_per_second": 1234.0,
    "val/ratio": 1.0,
}


def _display(terminal: bool, width: int = 100, every: float = 0.0) -> tuple[Display, io.StringIO]:
    written = io.StringIO()
    console = Console(file=written, force_terminal=terminal, width=width, color_system=None)
    return Display(console, every=every), written


def test_the_line_holds_what_is_worth_a_glance_in_a_fixed_order() -> None:
    assert line(METRICS) == "reward 1.23  KL 3.21  length 24  EOS 96%  clip 12%  1,234 tok/s"
    assert line({"val/ratio": 1.0}) == ""


def test_plain_lines_where_there_is_no_terminal() -> None:
    display, written = _display(terminal=False)
    with display.bar(3, "rlhf", done=1) as bar:
        bar.advance({"loss": 0.5})
        bar.advance({"loss": 0.25})
    lines = written.getvalue().splitlines()
    assert lines[0].startswith("rlhf 2/3  loss 0.500")
    assert lines[0].endswith("left")
    assert lines[1] == "rlhf 3/3  loss 0.250"


def test_few_plain_lines_the_first_and_the_last_always() -> None:
    display, written = _display(terminal=False, every=1e9)
    with display.bar(50, "sft") as bar:
        for _ in range(50):
            bar.advance({})
    assert [text.split()[1] for text in written.getvalue().splitlines()] == ["1/50", "50/50"]


def test_one_line_in_a_terminal_even_in_a_narrow_one() -> None:
    for width in (50, 100):
        display, written = _display(terminal=True, width=width)
        with display.bar(3, "rlhf") as bar:
            bar.advance(METRICS)
        assert "1/3" in written.getvalue()
        assert "reward" in written.getvalue()
        assert all(len(text.rstrip()) <= width + 10 for text in written.getvalue().splitlines())


def test_samples_are_shown_now_and_then() -> None:
    display, written = _display(terminal=False, every=1e9)
    display.samples(1, [{"prompt": "soup?", "completion": "Warm.", "score": 0.51234}])
    display.samples(2, [{"prompt": "bread?", "completion": "Cold.", "score": 0.1}])
    assert "Warm." in written.getvalue()
    assert "0.512" in written.getvalue()
    assert "Cold." not in written.getvalue()


def test_a_models_text_cannot_command_the_terminal() -> None:
    assert plain("a\x1b[2Jb\x07\nc") == "a·[2Jb·⏎c"
    assert plain("x" * 500, width=10) == "x" * 9 + "…"
    display, written = _display(terminal=True, every=0.0)
    display.samples(1, [{"completion": "[bold red]not markup[/] \x1b]0;title\x07"}])
    assert "[bold red]not markup[/]" in written.getvalue()
    assert "\x1b]0;title" not in written.getvalue()


def test_durations_are_for_people() -> None:
    assert [duration(s) for s in (0.4, 59.6, 185, 7800)] == ["0 s", "1 min 00 s", "3 min 05 s", "2 h 10 min"]


def test_answers_of_several_models_stand_side_by_side() -> None:
    display, written = _display(terminal=False, width=160)
    row = {
        "prompt": "soup?",
        "completions": {"sft": "Warm.", "ppo": "Hot, please."},
        "scores": {"sft": {"gold": -1.0, "proxy": 9.0}, "ppo": {"gold": 2.5, "proxy": 9.0}},
        "parts": {"sft": {"rude": 0.0}},
    }
    display.samples(0, [row])
    said = written.getvalue()
    assert "sft" in said
    assert "Hot, please. [gold 2.5" in said
    assert "parts" not in said
    assert "{" not in said
