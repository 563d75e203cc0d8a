"""Adam in both forms against the paper written out and against torch's own; schedules by their shape."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from palate import optim
from palate.settings import PalateError
from palate.step import Optimiser

LAW = settings(deadline=None, derandomize=True, database=None, max_examples=40)
VARIANTS = pytest.mark.parametrize("variant", ["torch", "tensorflow"])
BETAS = (0.9, 0.999)


def gradients(steps: int, size: int = 6, seed: int = 0) -> Tensor:
    """Gradients over nine orders of magnitude, so that ε matters for some and not for others."""
    drawn = torch.randn(steps, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return drawn * 10.0 ** torch.linspace(-8, 1, size, dtype=torch.float64)


def path(adam: Any, parameter: Tensor, rows: Tensor) -> Tensor:
    found: list[Tensor] = []
    for row in rows:
        parameter.grad = row.to(parameter.dtype).clone()
        adam.step()
        found.append(parameter.detach().clone())
    return torch.stack(found)


def written_out(variant: str, rows: Tensor, lr: float, eps: float, decay: float) -> list[list[float]]:
    """Kingma & Ba in plain floats: algorithm 1 for `torch`, the efficient form of section 2 for `tensorflow`."""
    size = rows.shape[1]
    p, m, v = [1.0] * size, [0.0] * size, [0.0] * size
    found: list[list[float]] = []
    for t, row in enumerate(rows.tolist(), 1):
        for i, g in enumerate(row):
            m[i], v[i] = BETAS[0] * m[i] + (1 - BETAS[0]) * g, BETAS[1] * v[i] + (1 - BETAS[1]) * g * g
            first, second = 1 - BETAS[0] ** t, 1 - BETAS[1] ** t
            p[i] *= 1 - lr * decay
            if variant == "torch":
                p[i] -= lr * (m[i] / first) / (math.sqrt(v[i] / second) + eps)
            else:
                p[i] -= lr * math.sqrt(second) / first * m[i] / (math.sqrt(v[i]) + eps)
        found.append(list(p))
    return found


@VARIANTS
@LAW
@given(lr=st.floats(1e-5, 0.1), eps=st.sampled_from([1e-8, 1e-5, 1e-2]), decay=st.sampled_from([0.0, 0.1]))
def test_adam_is_the_paper(variant: Any, lr: float, eps: float, decay: float) -> None:
    parameter = torch.ones(6, dtype=torch.float64, requires_grad=True)
    rows = gradients(7)
    found = path(optim.Adam([parameter], lr, BETAS, eps, variant=variant, weight_decay=decay), parameter, rows)
    expected = torch.tensor(written_out(variant, rows, lr, eps, decay), dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(("dtype", "room"), [(torch.float64, 1e-14), (torch.float32, 1e-7)])
@pytest.mark.parametrize("decay", [0.0, 0.05])
def test_the_torch_form_is_torch_adamw(dtype: torch.dtype, room: float, decay: float) -> None:
    ours, theirs = (torch.ones(6, dtype=dtype, requires_grad=True) for _ in range(2))
    oracle = torch.optim.AdamW([theirs], lr=0.01, betas=BETAS, eps=1e-5, weight_decay=decay, fused=False, foreach=False)
    found = path(optim.Adam([ours], 0.01, BETAS, 1e-5, weight_decay=decay), ours, gradients(9))
    torch.testing.assert_close(found, path(oracle, theirs, gradients(9)), rtol=room, atol=room)


@LAW
@given(step=st.integers(1, 5000), eps=st.floats(1e-9, 1e-3), gradient=st.floats(1e-8, 1.0))
def test_the_forms_agree_when_epsilon_is_corrected(step: int, eps: float, gradient: float) -> None:
    """TF(ε̂) = torch(ε) exactly if ε̂ = ε·√(1−β₂ᵗ), for any moments."""
    moved: dict[str, float] = {}
    for variant, here in (("torch", eps), ("tensorflow", eps * math.sqrt(1 - BETAS[1] ** step))):
        parameter = torch.zeros(1, dtype=torch.float64, requires_grad=True)
        adam = optim.Adam([parameter], 1.0, BETAS, here, variant=variant)  # type: ignore[arg-type]
        start = torch.full((1,), gradient, dtype=torch.float64)
        adam.state[parameter] = {"step": step - 1, "exp_avg": start / 2, "exp_avg_sq": start.square() / 3}
        parameter.grad = start.clone()
        adam.step()
        moved[variant] = parameter.item()
    assert moved["tensorflow"] == pytest.approx(moved["torch"], rel=1e-12)


def test_early_small_gradients_move_less_under_tensorflow() -> None:
    found: dict[str, float] = {}
    for variant in ("torch", "tensorflow"):
        parameter = torch.zeros(1, dtype=torch.float64, requires_grad=True)
        adam = optim.Adam([parameter], 1.0, BETAS, 1e-5, variant=variant)  # type: ignore[arg-type]
        found[variant] = -path(adam, parameter, torch.full((1, 1), 1e-5, dtype=torch.float64)).item()
    assert found == pytest.approx({"torch": 0.5, "tensorflow": 0.0307}, rel=2e-3)


@VARIANTS
def test_parameters_of_different_ages(variant: Any) -> None:
    """A parameter without a gradient rests and does not age: its first step is its own."""
    late, always = (torch.ones(6, dtype=torch.float64, requires_grad=True) for _ in range(2))
    adam, rows = optim.Adam([late, always], 0.01, BETAS, 1e-5, variant=variant), gradients(4)
    for t, row in enumerate(rows):
        late.grad, always.grad = (row.clone() if t >= 2 else None), row.clone()
        adam.step()
        assert t >= 2 or (late == 1).all()
    alone = torch.ones(6, dtype=torch.float64, requires_grad=True)
    expected = path(optim.Adam([alone], 0.01, BETAS, 1e-5, variant=variant), alone, rows[2:])[-1]
    assert torch.equal(late.detach(), expected)


@VARIANTS
def test_a_resumed_run_is_the_same_run(variant: Any) -> None:
    rows = gradients(8).float()
    whole = torch.ones(6, requires_grad=True)
    expected = path(optim.Adam([whole], 0.01, BETAS, 1e-5, variant=variant), whole, rows)[-1]
    first = torch.ones(6, requires_grad=True)
    before = optim.Adam([first], 0.01, BETAS, 1e-5, variant=variant)
    path(before, first, rows[:5])
    second = first.detach().clone().requires_grad_()
    after = optim.Adam([second], 0.5, BETAS, 1.0)
    after.load_state_dict(before.state_dict())
    assert torch.equal(path(after, second, rows[5:])[-1], expected)


def test_groups_keep_their_own_rate() -> None:
    slow, fast = (torch.zeros(1, dtype=torch.float64, requires_grad=True) for _ in range(2))
    adam = optim.Adam([{"params": [slow], "lr": 0.1}, {"params": [fast]}], 0.2, BETAS, 1e-8)
    slow.grad, fast.grad = torch.ones_like(slow), torch.ones_like(fast)
    assert adam.step(lambda: 7.0) == 7.0
    assert (slow.item(), fast.item()) == pytest.approx((-0.1, -0.2))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_are_refused(dtype: torch.dtype) -> None:
    with pytest.raises(PalateError, match="float32 or float64"):
        optim.Adam([torch.zeros(2, dtype=dtype, requires_grad=True)], 1e-3, BETAS, 1e-8)


@pytest.mark.parametrize(
    "wrong",
    [{"lr": -1.0}, {"betas": (1.0, 0.9)}, {"eps": math.nan}, {"weight_decay": -0.1}, {"variant": "adamw"}],
    ids=lambda w: next(iter(w)),
)
def test_numbers_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    asked: dict[str, Any] = {"lr": 1e-3, "betas": BETAS, "eps": 1e-8, **wrong}
    with pytest.raises(PalateError):
        optim.Adam([torch.zeros(2, requires_grad=True)], **asked)


@pytest.mark.parametrize("schedule", [optim.linear, optim.cosine])
@LAW
@given(total=st.integers(1, 5000))
def test_schedules_fall_from_one_to_zero(schedule: Any, total: int) -> None:
    rates = [schedule(done, total) for done in range(0, total + 1, max(1, total // 50))]
    assert rates[0] == 1.0
    assert all(before > after for before, after in pairwise(rates))
    assert schedule(total, total) == schedule(total + 3, total) == pytest.approx(0.0, abs=1e-15)
    assert schedule(total / 2, total) == pytest.approx(0.5)


@LAW
@given(total=st.integers(2, 500), warmup=st.integers(0, 50))
def test_warm_up(total: int, warmup: int) -> None:
    rates = [optim.warmed_up(done, total, warmup, optim.constant) for done in range(total)]
    assert rates == [min(1.0, (done + 1) / (warmup + 1)) for done in range(total)]
    later = [optim.warmed_up(done, total, warmup, optim.linear) for done in range(warmup, total)]
    assert later == [optim.linear(k, total - warmup) for k in range(total - warmup)]


def test_counting_updates() -> None:
    assert (optim.updates(1_000_000, 512), optim.updates(1_000_000, 512, round_up=True)) == (1953, 1954)
    assert optim.updates(1024, 512) == optim.updates(1024, 512, round_up=True) == 2


def test_a_schedule_may_end_above_zero() -> None:
    """InstructGPT: half a cosine from the peak to a tenth of it; the warm-up is not squeezed."""
    rates = [optim.warmed_up(done, 12, 2, optim.cosine, 0.1) for done in range(13)]
    assert rates[:2] == [1 / 3, 2 / 3]
    assert rates[2] == 1.0
    assert rates[12] == pytest.approx(0.1)
    assert rates[7] == pytest.approx(0.55)  # half of the way between 1 and 0.1
    assert all(optim.warmed_up(done, 9, 0, optim.constant, 0.1) == 1.0 for done in range(9))
    assert Optimiser(learning_rate=2.0, schedule="linear", final_rate=0.5).rate(5, 10) == pytest.approx(1.5)
