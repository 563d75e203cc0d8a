"""Adam in both of its published forms, and learning-rate schedules as plain functions of progress."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from palate.settings import PalateError

Parameters = Iterable[Tensor] | Iterable[dict[str, Any]]


class Adam(torch.optim.Optimizer):
    """Adam (Kingma & Ba 2015) with decoupled weight decay (Loshchilov & Hutter 2019), in two forms.

    They differ in where ε stands. Both step by lr·√(1−β₂ᵗ)/(1−β₁ᵗ) · m / (√v + ε̂). `"tensorflow"` takes ε̂ = ε, the
    form before the paper's algorithm 1, which the 2019 work was trained with; `"torch"` takes ε̂ = ε·√(1−β₂ᵗ), which is
    algorithm 1 and what `torch.optim.AdamW` does. At t = 1 that is 1/31 of ε, so small gradients move far more under
    `"torch"` early on. Weights shrink by lr·weight_decay before the step. State per parameter: `step`, `exp_avg`,
    `exp_avg_sq`.

    PalateError when a number is out of range or a parameter is neither float32 nor float64: half precision drops
    updates below 0.4 % of a weight and stalls the second moment at β₂ = 0.999.
    """

    def __init__(
        self,
        params: Parameters,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        variant: Literal["torch", "tensorflow"] = "torch",
        weight_decay: float = 0.0,
        local: Callable[[Tensor], Tensor] = lambda tensor: tensor,
    ) -> None:
        """`local` gives the part of a parameter (or gradient) that lies here; Adam moves each number by itself."""
        if variant not in ("torch", "tensorflow"):
            raise PalateError(f"variant: there is no Adam called {variant!r}. Known: tensorflow, torch.")
        if not (lr >= 0 and eps >= 0 and weight_decay >= 0 and all(0 <= beta < 1 for beta in betas)):
            raise PalateError(
                f"Adam needs lr, eps and weight_decay of at least 0 and betas in [0, 1), not lr={lr}, "
                f"eps={eps}, weight_decay={weight_decay}, betas={betas}."
            )
        chosen = {"lr": lr, "betas": betas, "eps": eps, "variant": variant, "weight_decay": weight_decay}
        self.local = local
        super().__init__(params, chosen)
        for group in self.param_groups:
            _refuse_half_precision(group["params"])

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient; what `closure`, when given, returned."""
        with torch.enable_grad():
            loss = None if closure is None else closure()
        for group in self.param_groups:
            alike: dict[tuple[int, torch.device], list[Tensor]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    alike.setdefault((self._count(parameter), parameter.device), []).append(parameter)
            for (step, device), parameters in alike.items():
                self._move(parameters, step, device, group)
        return loss

    def _count(self, parameter: Tensor) -> int:
        """The number of this step for `parameter`, from 1; its state is made at the first."""
        state = self.state[parameter]
        if not state:
            here = self.local(parameter)
            state["exp_avg"] = torch.zeros_like(here, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(here, memory_format=torch.preserve_format)
        state["step"] = int(state.get("step", 0)) + 1
        return state["step"]

    def _move(self, parameters: list[Tensor], step: int, device: torch.device, group: dict[str, Any]) -> None:
        """Update parameters of one device that have seen equally many steps, in one fused pass over memory.

        torch's kernel adds ε after it has corrected √v; ε before the correction is ε/√(1−β₂ᵗ) after it.
        """
        beta_1, beta_2 = group["betas"]
        corrected = math.sqrt(1 - beta_2**step) if group["variant"] == "tensorflow" else 1.0
        adamw(
            [self.local(p) for p in parameters],
            [self.local(p.grad) for p in parameters if p.grad is not None],
            [self.state[p]["exp_avg"] for p in parameters],
            [self.state[p]["exp_avg_sq"] for p in parameters],
            [],
            list(torch.full((len(parameters),), step - 1.0, device=device).unbind()),
            fused=True,
            amsgrad=False,
            beta1=beta_1,
            beta2=beta_2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"] / corrected,
            maximize=False,
        )


def _refuse_half_precision(parameters: Iterable[Tensor]) -> None:
    for parameter in parameters:
        if parameter.dtype not in (torch.float32, torch.float64):
            raise PalateError(
                f"Adam trains float32 or float64 parameters, not {parameter.dtype}: updates below 0.4 % of a "
                "weight would be lost. Leave dtype out of the stage's loading, and set its compute: bfloat16."
            )


def updates(total: int, batch: int, round_up: bool = False) -> int:
    """How many batches `total` episodes make: rounded down as the reproductions do, or up as OpenAI 2019 does."""
    return -(-total // batch) if round_up else total // batch


def constant(done: float, total: float) -> float:
    """1 throughout: the share of the peak learning rate when `done` of `total` is behind us."""
    return 1.0


def linear(done: float, total: float) -> float:
    """1 − done/total, at least 0. `done` and `total` count whatever is convenient: updates, or examples seen.

    lm-human-preferences anneals its reward model by examples seen (0, B, 2B … of num_train) and its policy by updates
    (u − 1 of N, the same for all epochs over one rollout); detail 12.
    """
    return max(0.0, 1.0 - done / total)


def cosine(done: float, total: float) -> float:
    """½(1 + cos(π·done/total)): half a cosine from 1 to 0 (Loshchilov & Hutter 2017, eq. 5, one cycle), then 0."""
    return 0.5 * (1.0 + math.cos(math.pi * min(done / total, 1.0)))


def warmed_up(
    done: int, total: int, warmup: int, schedule: Callable[[float, float], float], final: float = 0.0
) -> float:
    """A linear rise over the first `warmup` updates, then `schedule` over the rest, squeezed between 1 and `final`.

    The rise goes through 1/(warmup + 1), 2/(warmup + 1) …, so that no update is spent at rate 0 and the peak comes
    right after it. InstructGPT's cosine ends at a tenth (Ouyang et al. 2022, app. C).
    """
    if done < warmup:
        return (done + 1) / (warmup + 1)
    return final + (1 - final) * schedule(done - warmup, max(1, total - warmup))
