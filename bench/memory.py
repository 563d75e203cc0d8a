"""State memory of the four layouts, counted and measured: one real PPO step of GPT-2 124M each, beside the arithmetic.

    python -m bench.memory                        four processes, one after the other; writes bench/memory.md
    python -m bench.memory --layout hydra         one layout, as a line of JSON

State is weights, gradients and Adam's two moments, at the moment right after Adam has moved the weights, when all of
them exist. It is counted tensor by tensor (each storage once) and, in the same process, seen from outside: how far the
resident memory grew. PPO has four roles: policy and value train, reference and reward do not.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench import memory_page, rig, sizes
from palate.cast import Cast, Layout, Seat
from palate.engines.engine import Sampling
from palate.models.heads import fresh_head

LAYOUTS: Mapping[str, Layout] = {
    "separate": Layout(kind="separate"),
    "shared": Layout(kind="shared"),
    "adapters": Layout(kind="adapters"),
    "hydra": Layout(kind="hydra", unfrozen_blocks=2),
}
TINY = rig.Shape(2, 32, 2, 300, 64)
PAGE = Path(__file__).with_suffix(".md")
HEAD = "# Memory of the four layouts\n\n"


def resident() -> int:
    """Bytes of this process that are in memory now."""
    pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
    return pages * 4096


def _bytes(tensors: Iterable[Tensor]) -> int:
    """Each storage once, however many tensors look at it."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def count(casts: Sequence[Cast], adam: torch.optim.Optimizer) -> dict[str, int]:
    """Bytes of weights, buffers, gradients and moments as they are now."""
    seats = [seat for cast in casts for seat in cast.roles.values()]
    modules: list[nn.Module] = [m for seat in seats for m in (seat.trunk, seat.head) if m is not None]
    parameters = {id(p): p for module in modules for p in module.parameters()}.values()
    moments = [v for state in adam.state.values() for v in state.values() if isinstance(v, Tensor)]
    return {
        "weights": _bytes(parameters),
        "buffers": _bytes(b for module in modules for b in module.buffers()),
        "gradients": _bytes(p.grad for p in parameters if p.grad is not None),
        "moments": _bytes(moments),
    }


def _reward(shape: rig.Shape) -> Cast:
    """A reward model of its own, as an online stage loads one: a trunk without a language-model head, and a head."""
    loaded = rig.model(shape)
    trunk = type(loaded.trunk)(loaded.trunk.base, shape.vocabulary).requires_grad_(False)
    return Cast({"reward": Seat(trunk, None, fresh_head(trunk.width, "reference", rig.KEY))})


def measure(layout: Layout, shape: rig.Shape) -> dict[str, int]:
    """One PPO iteration with one step on 4 answers; the state right after Adam, counted and as resident memory."""
    sampling = Sampling(max_new_tokens=8, fixed_length=True)
    settings = {"kind": "ppo", "num_ppo_epochs": 1}
    _iterate(TINY, settings, layout, sampling)  # so that libraries and their scratch memory are there before
    before, seen = resident(), dict[str, int]()
    bench = rig.Bench(rig.model(shape), settings, layout, sampling)
    reward = _reward(shape)

    def note(adam: torch.optim.Optimizer, *_: Any) -> None:
        seen.update(count([bench.cast, reward], adam), resident=resident() - before)
        _give_back()
        seen["trimmed"] = resident() - before

    bench.stepper.adam.register_step_post_hook(note)
    bench.iteration(rig.ids(shape, 4, 8).tolist(), 1)
    return {**seen, "peak": max(seen["resident"], _peak() - before)}


def _iterate(shape: rig.Shape, settings: Mapping[str, Any], layout: Layout, sampling: Sampling) -> None:
    small = layout.model_copy(update={"unfrozen_blocks": 1})
    rig.Bench(rig.model(shape), settings, small, sampling).iteration(rig.ids(shape, 4, 8).tolist(), 1)


def _give_back() -> None:
    """Let the C library return the freed memory that it keeps for later."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)


def _peak() -> int:
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")) * 1024


def _alone(name: str) -> dict[str, int]:
    """The measurement in a process of its own."""
    command = [sys.executable, "-m", "bench.memory", "--layout", name]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def page(found: Mapping[str, Mapping[str, int]]) -> str:
    """bench/memory.md."""
    columns = ["weights", "gradients", "Adam", "counted", "on paper", "resident", "after trim", "highest"]
    rows = [f"| layout | {' | '.join(columns)} |", "|---|" + "---|" * len(columns)]
    for name, seen in found.items():
        counted = seen["weights"] + seen["buffers"], seen["gradients"], seen["moments"]
        paper = sum(sizes.state(_on_paper(name), sizes.FLOAT32).values())
        outside = seen["resident"], seen["trimmed"], seen["peak"]
        shown = (f"{part / 1e9:.3f}" for part in (*counted, sum(counted), paper, *outside))
        rows.append(f"| {name} | {' | '.join(shown)} |")
    machine = f"torch {torch.__version__}, {torch.get_num_threads()} threads, float32, GB of 10⁹ bytes"
    return "\n".join([f"{HEAD}`python -m bench.memory` · {machine}\n", *rows, "", *memory_page.rest()])


def _on_paper(name: str) -> sizes.Held:
    kind = next(kind for kind in sizes.KINDS if kind == name)
    return sizes.held(sizes.GPT2, kind, top=LAYOUTS[name].unfrozen_blocks, rank=LAYOUTS[name].lora_rank)


def main(words: Sequence[str]) -> int:
    """Measure one layout or all; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.memory")
    parser.add_argument("--layout", choices=list(LAYOUTS), help="this one alone, in this process")
    parser.add_argument("--page", type=Path, default=PAGE)
    asked = parser.parse_args(words)
    if asked.layout:
        print(json.dumps(measure(LAYOUTS[asked.layout], rig.GPT2)))
        return 0
    found = {name: _alone(name) for name in LAYOUTS}
    asked.page.write_text(page(found), encoding="utf-8")
    print(asked.page.read_text(encoding="utf-8"))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
