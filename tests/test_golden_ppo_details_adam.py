"""The golden cases of tests/golden/ppo_details.json about Adam and its learning rate.

Tolerances as in test_golden_ppo_details.py, which checks that all 42 cases are claimed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from palate import optim

GOLDEN: dict[str, Any] = json.loads((Path(__file__).parent / "golden" / "ppo_details.json").read_text())
DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])


def claims(*names: str) -> Callable[[Any], Any]:
    """Run a test once per golden case, as its `case`."""
    return pytest.mark.parametrize("case", [pytest.param(GOLDEN[name], id=name) for name in names])


def close(actual: Any, expected: Any) -> bool:
    """Whether a result has the golden values: to the digits printed in float64, to 1e-5 in float32."""
    actual = torch.as_tensor(actual)
    rough = actual.dtype == torch.float32
    expected = torch.as_tensor(expected, dtype=torch.float64)
    assert actual.shape == expected.shape
    return torch.allclose(actual.double(), expected, rtol=1e-5 if rough else 1e-9, atol=1e-5 if rough else 1e-12)


def same(actual: float, expected: float) -> bool:
    """Equal numbers, however small, to the digits printed."""
    return math.isclose(actual, expected, rel_tol=1e-9)


def adam_path(
    case: dict[str, Any], variant: Any, dtype: torch.dtype, gradient: Callable[[int, Tensor], Tensor]
) -> Tensor:
    given = case["inputs"]
    parameter = torch.tensor(given["p0"], dtype=dtype, requires_grad=True)
    adam = optim.Adam([parameter], given["lr"], tuple(given["betas"]), given["eps"], variant=variant)
    path: list[Tensor] = []
    for step in range(5):
        parameter.grad = gradient(step, parameter.detach())
        adam.step()
        path.append(parameter.detach().clone())
    return torch.stack(path)


@DTYPES
@claims("adam_fixed_grads_lr1e-3", "adam_fixed_grads_lr1e-5_ppo")
def test_adam_on_fixed_gradients(case: dict[str, Any], dtype: torch.dtype) -> None:
    start, rows = torch.tensor(case["inputs"]["p0"], dtype=dtype), torch.tensor(case["inputs"]["grads"], dtype=dtype)
    moved: dict[str, Tensor] = {}
    for variant, short in (("tensorflow", "tf"), ("torch", "torch")):
        path = adam_path(case, variant, dtype, lambda step, _: rows[step])
        moved[short] = torch.diff(path, dim=0, prepend=start[None])
        assert close(path, case["outputs"][f"{short}_params"])
        if dtype == torch.float64:
            golden = torch.tensor(case["outputs"][f"{short}_updates"], dtype=dtype)
            torch.testing.assert_close(moved[short], golden, rtol=1e-9, atol=1e-15)
    if dtype == torch.float64:
        assert not close(moved["torch"], case["outputs"]["tf_updates"])
        ratio = torch.tensor(case["outputs"]["ratio_torch_over_tf_updates"], dtype=dtype)
        torch.testing.assert_close(moved["torch"] / moved["tf"], ratio, rtol=1e-6, atol=0)


@DTYPES
@claims("adam_quadratic")
def test_adam_on_a_quadratic(case: dict[str, Any], dtype: torch.dtype) -> None:
    a, b = (torch.tensor(case["inputs"][name], dtype=dtype) for name in "ab")
    for variant, short in (("tensorflow", "tf"), ("torch", "torch")):
        path = adam_path(case, variant, dtype, lambda _, here: a * (here - b))
        assert close(path, case["outputs"][f"{short}_params"])
        assert close(0.5 * (a * (path - b).square()).sum(-1), case["outputs"][f"{short}_loss"])


@claims("adam_effective_eps")
def test_effective_epsilon(case: dict[str, Any]) -> None:
    eps, beta_2 = case["inputs"]["eps"], case["inputs"]["beta2"]
    for gradient, expected in case["outputs"]["first_step_update_over_lr_for_grad_g"].items():
        for variant, short in (("tensorflow", "tf"), ("torch", "torch")):
            parameter = torch.zeros(1, dtype=torch.float64, requires_grad=True)
            parameter.grad = torch.full_like(parameter, float(gradient))
            optim.Adam([parameter], 1.0, (0.9, beta_2), eps, variant=variant).step()
            assert same(-parameter.item(), expected[short])
    for step, expected in zip(case["inputs"]["steps"], case["outputs"]["effective_eps"], strict=True):
        assert same(_size_at(step, "tensorflow", expected), _size_at(step, "torch", eps))
        assert step == 10_000 or not same(_size_at(step, "tensorflow", eps), _size_at(step, "torch", eps))


def _size_at(step: int, variant: Any, eps: float) -> float:
    """How far Adam moves at step `step` with moments 0.9·1e-6 and 0.999·1e-10 behind it and a gradient of 1e-6."""
    parameter = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    adam = optim.Adam([parameter], 1.0, (0.9, 0.999), eps, variant=variant)
    moments = {"exp_avg": torch.full_like(parameter, 1e-6), "exp_avg_sq": torch.full_like(parameter, 1e-10)}
    adam.state[parameter] = {"step": step - 1, **{name: m.detach() for name, m in moments.items()}}
    parameter.grad = torch.full_like(parameter, 1e-6)
    adam.step()
    return -parameter.item()


@claims("lr_schedules")
def test_learning_rate_schedules(case: dict[str, Any]) -> None:
    given, expected = case["inputs"], case["outputs"]
    reward, policy = given["reward"], given["policy"]
    starts = range(0, reward["num_train"], reward["batch"])
    rates = [reward["lr0"] * optim.linear(start, reward["num_train"]) for start in starts]
    assert len(rates) == expected["reward_num_steps"]
    assert all(map(same, [*rates[:3], rates[-1]], [*expected["reward_first3"], expected["reward_last"]]))
    floor, ceiling = (optim.updates(policy["total"], policy["batch"], up) for up in (False, True))
    assert (floor, ceiling) == (expected["policy_N_floor"], expected["policy_N_ceil"])
    for table, peak in (("policy_lr_u", policy["lr0"]), ("nplus_ppo_lr_u", given["rm"]["lr0"])):
        for u, rate in expected[table].items():
            assert same(peak * optim.linear(int(u) - 1, floor), rate)
            assert u == "1" or not same(peak * optim.linear(int(u) - 1, ceiling), rate)
    for stage in ("rm", "sft"):
        n = optim.updates(given[stage]["total"], given[stage]["batch"])
        assert n == expected[f"{stage}_N"]
        for k, rate in expected[f"{stage}_lr_after_k"].items():
            assert same(given[stage]["lr0"] * optim.cosine(int(k), n), rate)
    assert same(3e-6 * optim.cosine(1, 1450), 2.9999964793339335e-06)  # as the logs of real runs have it
    assert same(3e-6 * optim.cosine(1, 911), 2.9999910808426766e-06)
