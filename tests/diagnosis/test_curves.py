"""What a series of numbers amounts to, and which charts a stage gets."""

import json

import pytest

from palate.diagnosis.curves import end_of, figures, frontier, noise_of, smooth, start_of, together
from palate.diagnosis.run_folder import read


def test_smoothing_leaves_short_series_alone_and_keeps_lines_straight():
    short = [(i, float(i % 3)) for i in range(10)]
    assert smooth(short) == short
    line = [(i, 2.0 * i) for i in range(200)]
    assert smooth(line)[100] == pytest.approx((100, 200.0))
    assert [step for step, _ in smooth(line)] == [step for step, _ in line]


def test_smoothing_takes_noise_away():
    wavering = [(i, float(i % 2)) for i in range(200)]
    inner = [v for _, v in smooth(wavering)[20:-20]]
    assert max(inner) - min(inner) < 0.2


def test_ends_are_tenths():
    points = [(i, float(i)) for i in range(100)]
    assert start_of(points) == 4.5
    assert end_of(points) == 94.5
    assert start_of([(0, 3.0), (1, 9.0)]) == 3.0


def test_noise_is_that_of_a_point_about_its_trend():
    assert noise_of([(i, 1.0) for i in range(9)]) == 0
    assert noise_of([(i, float(i % 2)) for i in range(9)]) == pytest.approx(0.5**0.5)
    assert noise_of([(i, float(i % 2)) for i in range(100)]) == pytest.approx(0.5**0.5 / 5**0.5)
    assert noise_of([(0, 5.0)]) == 0


def test_series_of_unequal_size_do_not_share_an_axis():
    small, large = [(0, 0.0), (1, 1.0)], [(0, 0.0), (1, 50.0)]
    assert together([small, small])
    assert not together([small, large])
    assert not together([small, [(0, 100.0), (1, 101.0)]])


def test_a_stage_gets_the_charts_of_what_it_logged(write_run):
    run = read(write_run())
    drawn = {stage.name: [figure.title for figure in figures(stage)] for stage in run.stages}
    assert "Loss" in drawn["sft"]
    assert "Accuracy on comparisons" in drawn["reward"]
    assert {"KL to the reference", "Entropy", "Value: explained variance", "Clipped share"} <= set(drawn["rlhf"])
    assert drawn["evaluate"] == []
    assert [figure.title for figure in frontier(run.stages[2])] == ["Score and truth", "Proxy and gold against KL"]
    assert frontier(run.stages[0]) == []


def test_a_stage_of_pairs_shows_accuracy_beside_what_became_of_the_chosen_answers(write_run):
    folder = write_run()
    names = ("rewards/accuracies", "logps/chosen_change", "logps/chosen", "logps/rejected")
    rows = [{"step": step, **dict.fromkeys(names, -step / 10)} for step in range(1, 9)]
    (folder / "2-reward" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    drawn = [figure.title for figure in figures(read(folder).stages[1])]
    assert drawn == ["Accuracy on pairs", "Change of log π(chosen)", "log π of pairs"]
