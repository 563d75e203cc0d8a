"""What the machine can do: matrix products at the workloads' own shapes, by the fastest library torch has.

    python -m bench.speed.limit small                      prints a line of JSON
    python -m bench.speed.limit llama-1b cuda bfloat16     of a GPU, in that format

Two figures for each model: `read` for the products of reading 2,048 tokens (training, scoring; 16,384 on a GPU),
`write` for those of drawing one token of 64 answers each (256 on a GPU). Each weight matrix of the model counts as
often as it is there; every product on a CPU is given to whichever of MKL and oneDNN is faster at it, so the limit is
what a perfect choice would reach.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from bench.speed.workloads import MODELS, Shape

ROWS = {"cpu": (2048, 64), "cuda": (16384, 256)}
_TURNS, _SPAN, _AT_ONCE = 5, 0.05, 4


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
    if x_NI.is_cuda:
        return {"cublas": lambda: functional.linear(x_NI, w_OI)}
    found: dict[str, Callable[[], Tensor]] = {"mkl": lambda: functional.linear(x_NI, w_OI)}
    try:
        call = torch.ops.mkldnn._linear_pointwise
        right = torch.allclose(call(x_NI, w_OI, None, "none", [], ""), found["mkl"](), atol=1e-2)
    except (RuntimeError, AttributeError):
        return found
    return found | {"onednn": lambda: call(x_NI, w_OI, None, "none", [], "")} if right else found


def seconds(call: Callable[[], Tensor], settle: Callable[[], object] = lambda: None) -> float:
    """The least mean time of one call over some spans; `settle` waits for a device that computes on its own."""
    call()
    settle()
    best = float("inf")
    for _ in range(_TURNS):
        began, calls = time.perf_counter(), 0
        while time.perf_counter() - began < _SPAN:
            for _ in range(_AT_ONCE):
                call()
            settle()
            calls += _AT_ONCE
        best = min(best, (time.perf_counter() - began) / calls)
    return best


@torch.no_grad()
def gflops(shape: Shape, rows: int, device: str = "cpu", precision: str = "float32") -> dict[str, float]:
    """GFLOP/s of all products of the model, by library and by the best choice for each."""
    like: dict[str, Any] = {"device": device, "dtype": getattr(torch, precision)}
    settle = torch.cuda.synchronize if device == "cuda" else lambda: None
    work, spent = 0.0, dict[str, float]()
    for (inputs, outputs), count in products(shape).items():
        x_NI, w_OI = torch.randn(rows, inputs, **like), torch.randn(outputs, inputs, **like)
        times = {name: seconds(call, settle) for name, call in ways(x_NI, w_OI).items()}
        for name, one in (times | {"best": min(times.values())}).items():
            spent[name] = spent.get(name, 0.0) + count * one
        work += count * 2 * rows * inputs * outputs / 1e9
    return {name: work / total for name, total in spent.items()}


def main(name: str, device: str = "cpu", precision: str = "float32") -> None:
    """Measure, print."""
    torch.set_num_threads(2)
    read, write = (gflops(MODELS[name], rows, device, precision) for rows in ROWS[device])
    print(json.dumps({"read": read, "write": write}))


if __name__ == "__main__":
    main(*sys.argv[1:])
