"""Scalar heads: the references' initial scales, the affine numbers, both shapes."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from palate.models.heads import ScalarHead, fresh_head, head_std

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "ppo_details.json").read_text())["head_init_std"]


@pytest.mark.parametrize("width", GOLDEN["inputs"]["d_model"])
def test_the_reference_scale_is_the_published_one(width):
    expected = GOLDEN["outputs"]["theory_std"][str(width)]
    assert head_std(width, "reference") == pytest.approx(expected, abs=1e-8)
    head = fresh_head(width, "reference", 1)
    assert float(head.last.weight.detach().std()) == pytest.approx(expected, rel=5 / math.sqrt(2 * width))
    assert float(head.last.bias.detach()) == 0
    assert not head.trained


def test_coatis_scale_is_one_over_d_plus_one_and_the_value_head_is_zero():
    assert head_std(767, "coati") == 1 / 768
    assert torch.count_nonzero(fresh_head(64, "zero", 1).last.weight) == 0
    assert torch.count_nonzero(fresh_head(64, "zero", 1)(torch.randn(5, 64))) == 0


def test_a_zero_mlp_head_promises_nothing_but_can_learn():
    head = fresh_head(16, "zero", 1, "mlp")
    hidden = torch.randn(5, 16)
    assert torch.count_nonzero(head(hidden)) == 0
    (head(hidden) - 1).square().sum().backward()
    assert torch.count_nonzero(head.last.weight.grad) > 0


def test_gain_and_bias_act_on_the_output_and_do_not_train_unasked():
    head, hidden = fresh_head(16, "reference", 3), torch.randn(4, 3, 16)
    plain = head(hidden)
    head.gain.data.fill_(2.5)
    head.bias.data.fill_(-1.0)
    torch.testing.assert_close(head(hidden), 2.5 * plain - 1)
    assert plain.shape == (4, 3)
    assert not head.gain.requires_grad
    assert not head.bias.requires_grad


def test_the_key_decides_and_half_precision_is_lifted():
    assert torch.equal(fresh_head(16, "reference", 3).last.weight, fresh_head(16, "reference", 3).last.weight)
    assert not torch.equal(fresh_head(16, "reference", 3).last.weight, fresh_head(16, "reference", 4).last.weight)
    assert ScalarHead(8)(torch.zeros(2, 8, dtype=torch.bfloat16)).dtype == torch.float32
