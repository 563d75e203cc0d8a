"""Linear layers by the fastest matrix product of this machine, and activations in one pass over memory.

On CPUs torch multiplies float32 matrices by MKL, which keeps off the widest instructions of some makers. torch brings
a second library along, oneDNN, for other formats; one private operator reaches it with float32. Which of the two is
faster is measured once in a process, by the three products of a training step and by those of a token that is written,
and can be given: `use("plain")`. A run settles it for all of its sessions (`palate.products`).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from types import MethodType
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.activations import NewGELUActivation
from transformers.pytorch_utils import Conv1D

Backend = Literal["plain", "writing", "onednn"]
"""torch's own products; oneDNN's while answers are written, where weights stay as they are; oneDNN's everywhere."""

_ROWS, _IN, _OUT = 512, 256, 1024
"""The product that is measured: a small model's, with a micro-batch of tokens."""
_VOCABULARY = 8192
"""The outputs of the head that is measured where answers are written."""
_GAIN = 1.03
"""How much faster oneDNN has to be: below it the plain path keeps, which is torch's own."""

_FINE = 6
"""Products are filled up to one of 32 sizes between a power of two and the next: 1.2 % of their rows on average."""
_FEW, _GRAIN = 256, 16
"""Below so many rows, without gradient, to a multiple of so many."""

_HINT = 64
"""For so many rows weights are laid out (that layout does for any other number as well), and writing is measured."""

_ACTIVATED = "palate_activated"
"""Marks an output that GELU was already applied to, and a layer whose output goes to GELU and nowhere else."""
_INTO_GELU = ("c_fc", "fc_in")
"""The layers that feed `act`, where a family's feed-forward part has GELU's tanh form."""

_chosen: Backend | None = None


@dataclass(frozen=True)
class Gains:
    """How many times as fast oneDNN's products are as torch's own; 0 where they are missing."""

    learning: float
    """For one layer's forward pass and both of its gradients."""
    writing: float
    """For a feed-forward part and a head over few rows, with weights laid out before."""

    @property
    def best(self) -> Backend:
        """The back end that the measurement speaks for."""
        if self.learning > _GAIN:
            return "onednn"
        return "writing" if self.writing > _GAIN else "plain"


def backend() -> Backend:
    """The back end of this process, measured when first asked for."""
    global _chosen
    if _chosen is None:
        _chosen = gains().best
    return _chosen


def use(chosen: Backend | None) -> Backend | None:
    """Choose the back end; None measures when it is next asked for. oneDNN's hold only where it is there.

    Gives back what holds.
    """
    global _chosen
    _chosen = "plain" if chosen in ("writing", "onednn") and not _agrees() else chosen
    return _chosen


@cache
@torch.no_grad()
def gains() -> Gains:
    """Measured once in a process, in a fifth of a second, by the processor time of one thread.

    What else this machine does then hardly counts, and the next process finds nearly the same.
    """
    if not _agrees():
        return Gains(0.0, 0.0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return Gains(_learning(), _writing())
    finally:
        torch.set_num_threads(threads)


def _learning() -> float:
    x_NI, y_NO, w_OI = torch.ones(_ROWS, _IN), torch.ones(_ROWS, _OUT), torch.ones(_OUT, _IN)

    def plain() -> None:
        _ = functional.linear(x_NI, w_OI), y_NO @ w_OI, y_NO.t() @ x_NI

    def onednn() -> None:
        _ = _product(x_NI, w_OI), _product(y_NO, w_OI.t()), _product(x_NI.t(), y_NO.t())

    return _ratio(plain, onednn)


def _writing() -> float:
    x_NI, y_NO = torch.ones(_HINT, _IN), torch.ones(_HINT, _OUT)
    pairs = [(x_NI, torch.ones(_OUT, _IN)), (y_NO, torch.ones(_IN, _OUT)), (x_NI, torch.ones(_VOCABULARY, _IN))]
    ready = [(x, laid(w)) for x, w in pairs]
    return _ratio(lambda: [functional.linear(*pair) for pair in pairs], lambda: [_product(*pair) for pair in ready])


def _ratio(plain: Callable[[], object], onednn: Callable[[], object]) -> float:
    """How many times as long the first takes, each at its best."""
    for way in (plain, onednn):  # the first calls set things up
        way()
    seconds: dict[Callable[[], object], list[float]] = {plain: [], onednn: []}
    for _ in range(5):
        for way, found in seconds.items():
            start = time.thread_time()
            way()
            found.append(time.thread_time() - start)
    return min(seconds[plain]) / min(seconds[onednn])


@torch.no_grad()
def _agrees() -> bool:
    """Whether the private operator is there and multiplies as torch does, whole matrices and transposed views."""
    if not torch.backends.mkldnn.is_available():
        return False
    x_NI = torch.arange(24.0).view(4, 6) % 7 - 3
    w_OI = torch.arange(30.0).view(5, 6) % 5 - 2
    try:
        ways = [_product(x_NI, w) for w in (w_OI, w_OI.t().contiguous().t(), laid(w_OI))]
        ways += [_product(w_OI, x_NI).t()]
        gelu = functional.gelu(x_NI @ w_OI.t(), approximate="tanh")
        activated = torch.allclose(_product(x_NI, w_OI, None, True), gelu, atol=1e-5)
        return activated and all(torch.allclose(found, x_NI @ w_OI.t(), atol=1e-5) for found in ways)
    except (RuntimeError, AttributeError):
        return False


def _product(x_NI: Tensor, w_OI: Tensor, bias_O: Tensor | None = None, gelu: bool = False) -> Tensor:
    """x wᵀ + b by oneDNN, and GELU of it in the same pass; `w_OI` may be a transposed view or what `laid` gives.

    Private in torch, so nothing else calls it.
    """
    after = ("gelu", [], "tanh") if gelu else ("none", [], "")
    return torch.ops.mkldnn._linear_pointwise(x_NI, w_OI, bias_O, *after)


def laid(w_OI: Tensor) -> Tensor:
    """A copy of a weight as oneDNN would lay it out to multiply few rows; for products without gradient alone.

    Whatever back end is chosen, only oneDNN can multiply by it.
    """
    return torch.ops.mkldnn._reorder_linear_weight(w_OI.detach(), _HINT)


def turned(x_NI: Tensor) -> Tensor:
    """A contiguous copy I×N. As the shuffling of channels in groups it takes half the time of torch's own, or less."""
    rows, columns = x_NI.shape
    one = (1, rows * columns, 1, 1)
    channels = x_NI.contiguous().as_strided(one, (one[1], 1, one[1], one[1]))
    return functional.channel_shuffle(channels, rows).view(columns, rows)


class _Linear(torch.autograd.Function):
    """x wᵀ + b with its two gradients by oneDNN. The matrix that has to be turned over is always the smaller one."""

    @staticmethod
    def forward(ctx: Any, x_NI: Tensor, w_OI: Tensor, bias_O: Tensor | None) -> Tensor:
        ctx.save_for_backward(x_NI, w_OI)
        return _product(x_NI, w_OI, bias_O)

    @staticmethod
    def backward(ctx: Any, grad_NO: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x_NI, w_OI = ctx.saved_tensors
        needs_x, needs_w, needs_b = ctx.needs_input_grad
        return (
            input_gradient(grad_NO, w_OI) if needs_x else None,
            weight_gradient(grad_NO, x_NI) if needs_w else None,
            grad_NO.sum(0) if needs_b else None,
        )


def input_gradient(grad_NO: Tensor, w_OI: Tensor) -> Tensor:
    """grad · w, what a linear layer passes down."""
    return _product(grad_NO, w_OI.t()) if fast(grad_NO, w_OI) else grad_NO @ w_OI


def weight_gradient(grad_NO: Tensor, x_NI: Tensor) -> Tensor:
    """gradᵀ · x, O×I."""
    if not fast(grad_NO, x_NI):
        return grad_NO.t() @ x_NI
    if x_NI.shape[1] <= grad_NO.shape[1]:
        return _product(turned(x_NI), grad_NO.t()).t()
    return _product(turned(grad_NO), x_NI.t())


def rounded(rows: int, like: Tensor, writing: bool = False) -> int:
    """The rows that a product of `rows` rows is filled up to, so that few sizes ever come about.

    oneDNN prepares a kernel for each size it meets: a tenth of a product's time, and some memory. torch's own product
    needs nothing of the kind, and then `rows` is returned as it is. `like` has the format and the device; `writing`
    says that answers are written.
    """
    if not rows or not (lays(like) if writing else fast(like, like)):
        return rows
    step = max(_GRAIN, 1 << max(0, rows.bit_length() - _FINE))
    return -(-rows // step) * step


def linear(x_NI: Tensor, w_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """x wᵀ + b by the chosen back end, for any leading shape; differentiable."""
    if not fast(x_NI, w_OI) or not x_NI.numel():
        return functional.linear(x_NI, w_OI, bias_O)
    flat_NI = x_NI.reshape(-1, x_NI.shape[-1])
    found = (
        cast(Tensor, _Linear.apply(flat_NI, w_OI, bias_O))
        if _learns(x_NI, w_OI, bias_O)
        else _read(flat_NI, w_OI, bias_O)
    )
    return found.view(*x_NI.shape[:-1], w_OI.shape[0])


def through(layer: nn.Module, x_NI: Tensor, w_OI: Tensor, bias_O: Tensor | None) -> Tensor:
    """What a linear layer says, by its weight or a copy of it: GELU with it where that follows and nothing learns.

    A layer that somebody listens to (an adapter) keeps to itself: what is added to it comes before GELU.
    """
    ahead = getattr(layer, _ACTIVATED, False) and not vars(layer)["_forward_hooks"]
    ahead = ahead and not _learns(x_NI, w_OI, bias_O)
    if not ahead or not fast(x_NI, w_OI) or not x_NI.numel():
        return linear(x_NI, w_OI, bias_O)
    found = _read(x_NI.reshape(-1, x_NI.shape[-1]), w_OI, bias_O, gelu=True).view(*x_NI.shape[:-1], w_OI.shape[0])
    setattr(found, _ACTIVATED, True)
    return found


def _learns(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _read(x_NI: Tensor, w_OI: Tensor, bias_O: Tensor | None, gelu: bool = False) -> Tensor:
    """The product without a gradient; few rows are filled up."""
    rows = x_NI.shape[0]
    more = -rows % _GRAIN if rows < _FEW else 0
    return _product(functional.pad(x_NI, (0, 0, 0, more)) if more else x_NI, w_OI, bias_O, gelu)[:rows]


def fast(x: Tensor, w: Tensor) -> bool:
    """Whether oneDNN multiplies the two: where it is chosen or `w` is laid out for it, in float32 on a CPU."""
    return (backend() == "onednn" or w.is_mkldnn) and _ours(x, w)


def lays(w: Tensor) -> bool:
    """Whether oneDNN multiplies by copies of this weight while answers are written."""
    return backend() != "plain" and _ours(w, w)


def _ours(x: Tensor, w: Tensor) -> bool:
    """Whether oneDNN can multiply the two: float32 on a CPU, outside of autocast."""
    same = x.dtype == w.dtype == torch.float32 and x.device.type == w.device.type == "cpu"
    return same and not torch.is_autocast_enabled("cpu")


def speed_up(model: nn.Module) -> None:
    """Let every linear layer of a model multiply by the chosen back end, and GELU's tanh form run as one kernel.

    Modules stay transformers' own and give the same numbers up to rounding; only how they compute changes.
    """
    for module in model.modules():
        if type(module) is nn.Linear:
            module.forward = MethodType(_of_linear, module)
        elif type(module) is Conv1D:
            module.forward = MethodType(_of_conv1d, module)
        elif type(module) is NewGELUActivation:
            module.forward = MethodType(_gelu, module)
        if type(getattr(module, "act", None)) is NewGELUActivation:
            for before in (getattr(module, name) for name in _INTO_GELU if hasattr(module, name)):
                setattr(before, _ACTIVATED, True)


def _of_linear(layer: nn.Linear, input: Tensor) -> Tensor:
    return through(layer, input, layer.weight, layer.bias)


def _of_conv1d(layer: Conv1D, x: Tensor) -> Tensor:
    return through(layer, x, cast(Tensor, layer.weight).t(), cast(Tensor, layer.bias))


def _gelu(layer: nn.Module, input: Tensor) -> Tensor:
    return input if getattr(input, _ACTIVATED, False) else functional.gelu(input, approximate="tanh")
