"""What the machine can do: float32 matrix products at the workloads' own shapes, by the fastest library torch has.

    python -m bench.speed.limit small mid      prints a line of JSON

Two figures for each model: `read` for the products of reading 2,048 tokens (training, scoring), `write` for those of
drawing one token of 64 answers each. Each weight matrix of the model counts as often as it is there; every product is
given to whichever of MKL and oneDNN is faster at it, so the limit is what a perfect choice would reach.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from bench.speed.workloads import MODELS, Shape

READ, WRITE = 2048, 64
_TURNS, _SPAN = 5, 0.05


def products(shape: Shape) -> dict[tuple[int, int], int]:
    """(inputs, outputs) of the model's weight matrices, and how many of each there are."""
    width, layers = shape.width, shape.layers
    if shape.family == "gpt2":
        found = {(width, 3 * width): layers, (width, width): layers}
        found |= {(width, 4 * width): layers, (4 * width, width): layers}
    else:
        found = {(width, width): 4 * layers, (width, shape.inside): 2 * layers, (shape.inside, width): layers}
    return found | {(width, shape.vocabulary): 1}


def ways(x_NI: Tensor, w_OI: Tensor) -> dict[str, Callable[[], Tensor]]:
    """The libraries' products of these, those that work here."""
    found: dict[str, Callable[[], Tensor]] = {"mkl": lambda: functional.linear(x_NI, w_OI)}
    try:
        call = torch.ops.mkldnn._linear_pointwise
        right = torch.allclose(call(x_NI, w_OI, None, "none", [], ""), found["mkl"](), atol=1e-2)
    except (RuntimeError, AttributeError):
        return found
    return found | {"onednn": lambda: call(x_NI, w_OI, None, "none", [], "")} if right else found


def seconds(call: Callable[[], Tensor]) -> float:
    """The least mean time of one call over some spans."""
    call()
    best = float("inf")
    for _ in range(_TURNS):
        began, calls = time.perf_counter(), 0
        while time.perf_counter() - began < _SPAN:
            call()
            calls += 1
        best = min(best, (time.perf_counter() - began) / calls)
    return best


@torch.no_grad()
def gflops(shape: Shape, rows: int) -> dict[str, float]:
    """GFLOP/s of all products of the model, by library and by the best choice for each."""
    work, spent = 0.0, dict[str, float]()
    for (inputs, outputs), count in products(shape).items():
        x_NI, w_OI = torch.randn(rows, inputs), torch.randn(outputs, inputs)
        times = {name: seconds(call) for name, call in ways(x_NI, w_OI).items()}
        for name, one in (times | {"best": min(times.values())}).items():
            spent[name] = spent.get(name, 0.0) + count * one
        work += count * 2 * rows * inputs * outputs / 1e9
    return {name: work / total for name, total in spent.items()}


def main(names: list[str]) -> None:
    """Measure, print."""
    torch.set_num_threads(2)
    print(json.dumps({n: {"read": gflops(MODELS[n], READ), "write": gflops(MODELS[n], WRITE)} for n in names}))


if __name__ == "__main__":
    main(sys.argv[1:])
