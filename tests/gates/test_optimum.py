"""Trained gates: a real stage, from model folder to model folder, comes near the optimum that is known exactly.

A third of the budget of bench/optimum.md. The thresholds stand between what right code reaches and what the nearest
fault could reach at best: half of β ends at .844 however long it trains.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import optimum
from bench.optimum_rows import ROWS, Row

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def reached(row: Row, folder: Path, part: float) -> float:
    return optimum.judge(optimum.train(row, 1, 0.5, 1, folder, part), 1, 0.5).share


def with_settings(row: Row, changes: Mapping[str, Any]) -> Row:
    return replace(row, algorithm=lambda beta: {**row.algorithm(beta), **changes})


def test_rloo_comes_near_the_optimum(tmp_path: Path):
    assert reached(ROWS["rloo"], tmp_path, 0.3) > 0.97


def test_rloo_with_half_of_its_kl_does_not(tmp_path: Path):
    assert reached(with_settings(ROWS["rloo"], {"kl_coef": 0.25}), tmp_path, 0.3) < 0.87


def test_dpo_with_exact_labels_comes_near_the_optimum(tmp_path: Path):
    assert reached(replace(ROWS["dpo, soft labels"], rows=6000), tmp_path, 0.19) > 0.94
