"""Tokens in the report: coloured by advantage, else by KL; whatever a model said is text."""

import json

import pytest

from palate.diagnosis import report, token_page
from palate.diagnosis.run_folder import read


@pytest.fixture
def folder(write_run):
    return write_run(stages=("sft", "reward", "rlhf"))


def changed(folder, change):
    file = folder / "3-rlhf" / "tokens.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    for row in rows:
        for token in row["tokens"]:
            change(token)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def styles(told):
    return [piece.style for piece in told.pieces]


def test_the_first_and_the_last_step_are_shown(folder):
    [page] = token_page.of(read(folder))
    assert [(step, len(answers)) for step, answers in page.steps] == [(1, 2), (120, 2)]


def test_the_background_is_the_advantage_by_sign_and_strength(folder):
    [page] = token_page.of(read(folder))
    first, second = page.steps[1][1]
    assert styles(first) == ["down2", "up4", "behind"]
    assert styles(second) == ["up2", "down4", "behind"]
    assert first.pieces[2].landed == "1.5"


def test_without_advantages_it_is_the_kl_and_without_both_there_is_none(folder):
    changed(folder, lambda token: token.pop("advantage", None))
    [page] = token_page.of(read(folder))
    assert "reference" in page.reading
    assert styles(page.steps[0][1][0]) == ["up1", "down4", "behind"]
    changed(folder, lambda token: token.pop("kl", None))
    [page] = token_page.of(read(folder))
    assert styles(page.steps[0][1][0]) == ["", "", "behind"]


def test_hostile_tokens_are_text_in_page_hint_and_markdown(folder):
    changed(folder, lambda token: token.update(text='"><script>x</script>\n\n# h\n') if token.get("id") == 7 else None)
    changed(folder, lambda token: token.update(text="<img src=x>") if token.get("id") == 5 else None)
    page, text = (path.read_text() for path in report.write(folder))
    assert "&lt;script&gt;x" in page
    assert "<script" not in page
    assert "<img" not in page
    lines = [line for line in text.splitlines() if "<script>" in line or "# h" in line]
    assert lines
    assert all(line.startswith("    ") for line in lines)


def test_the_markdown_names_the_tokens_that_stand_out(folder):
    text = report.write(folder)[1].read_text().partition("## Tokens")[2]
    assert "rlhf, step 120, row 0: 2 tokens, ended by itself; sums: " in text
    assert "greatest adv: 3 “<eos>” 2" in text
    assert "least KL: 3 “<eos>” −0.75" in text


def test_an_online_stage_without_tokens_is_named(folder):
    (folder / "3-rlhf" / "tokens.jsonl").unlink()
    page, text = (path.read_text() for path in report.write(folder))
    assert 'id="tokens"' not in page
    assert "rlhf: answers token by token" in text
